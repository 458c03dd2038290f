"""Vectors of real texts: the demo's corpus in small pieces, by WordLlama; and what NumPy finds among them."""

from functools import lru_cache

import numpy as np

import db
from db.chunking import Chunker
from ops.demo_texts import installed_packages, python_reference

DIMENSIONS = 256


@lru_cache(maxsize=1)
def vectors(count):
    """`count` different vectors at most, shape (count, 256), in an order that is always the same."""
    chunker = Chunker(60, 0)
    texts = [item.text for item in (*python_reference(), *installed_packages())]
    pieces = sorted({chunk.text for text in texts for chunk in chunker.split(text)})
    chosen = np.random.default_rng(0).permutation(len(pieces))[:count]
    made = db.WordLlamaEmbedder().embed([pieces[n] for n in chosen])
    return np.unique(made, axis=0)


def scaled(stored):
    """`stored` in float64, scaled to length 1."""
    unit = stored.astype(np.float64)
    return unit / np.linalg.norm(unit, axis=1, keepdims=True)


def nearest(unit, query, k, *, without=None):
    """The distance of the `k`-th nearest by cosine, and all distances; `unit` is what `scaled` gave."""
    distances = 1 - unit @ scaled(query[np.newaxis])[0]
    if without is not None:
        distances[without] = np.inf
    return np.partition(distances, k - 1)[k - 1], distances
