"""An embedder that tests can count on, and items for it."""

import hashlib

import numpy as np

DIMENSIONS = 16


def vector_of(text):
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)


class Counting:
    """An embedder whose vectors depend on the text alone, and that remembers what it was asked."""

    dimensions = DIMENSIONS

    def __init__(self, model_id="counting"):
        self.model_id = model_id
        self.asked = []

    def embed(self, texts):
        self.asked.extend(texts)
        return np.stack([vector_of(text) for text in texts])


def items(count, prefix="text"):
    return [
        {"id": f"{n:05}", "text": f"{prefix} number {n}", "metadata": {"n": n}, "source_id": f"s{n % 3}"}
        for n in range(count)
    ]


def counts(result):
    names = ("inserted", "updated", "skipped", "deleted", "superseded", "failed", "cache_hits", "embedded")
    return {name: getattr(result, name) for name in names if getattr(result, name)}
