"""What a version of a document is made of: everything follows from its id and its number."""

import hashlib
import re
from functools import lru_cache

import numpy as np

import db
from db import vectors
from db.chunking import Chunker

MODEL_ID = "fault-harness"
DIMENSIONS = 16
CHUNK_SIZE = 80
_CHUNKER = Chunker(CHUNK_SIZE, 0)
_MARK = re.compile(r"@(\d+)@")


class Embedder:
    """Vectors that depend on the text alone."""

    model_id = MODEL_ID
    dimensions = DIMENSIONS

    def embed(self, texts):
        return np.stack([vector_of(text) for text in texts])


def vector_of(text):
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)


def text_of(id_, version):
    """Between 3 and 6 sentences that all name the version; so does each chunk of them."""
    return " ".join(f"Document {id_} in its version @{version}@, sentence {n}." for n in range(3 + version % 4))


@lru_cache(maxsize=20_000)
def chunk_texts(id_, version):
    return tuple(chunk.text for chunk in _CHUNKER.split(text_of(id_, version)))


def workspace_of(version):
    return f"w{version % 2}"


def metadata_of(version):
    return {"version": version, "workspace": workspace_of(version), "owned": True}


def document(id_, version, source_id):
    """As `batch_upsert` takes it. `embed_batch` makes the same of `item`."""
    texts = chunk_texts(id_, version)
    found = [vector_of(text) for text in texts]
    return db.Document(
        id_,
        text_of(id_, version),
        vectors.weighted_mean(found, [len(text) for text in texts]),
        metadata_of(version),
        source_id,
        [db.DocumentChunk(text, vector) for text, vector in zip(texts, found, strict=True)],
    )


def item(id_, version, source_id):
    return db.Item(id_, text_of(id_, version), metadata_of(version), source_id)


def marks(text):
    """The versions that `text` names."""
    return {int(mark) for mark in _MARK.findall(text)}


def torn(id_, version, text, chunks):
    """What is wrong with a document of this `version` that has this `text` and these chunk texts; "" where nothing."""
    if text != text_of(id_, version):
        return f"{id_} has metadata of version {version} and a text of {sorted(marks(text))}"
    if tuple(chunks) != chunk_texts(id_, version):
        return f"{id_} is of version {version}, its chunks of {[sorted(marks(chunk)) for chunk in chunks]}"
    return ""
