"""The rows that are written: distinct texts made of real prose, with real vectors of them or synthetic ones."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import sha256
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import db
from ops.demo_texts import installed_packages, python_reference

DOCUMENTS_A_SOURCE = 1000
_AT_ONCE = 2000
_PIECE_CHARACTERS = range(80, 300)


class Vectors(Protocol):
    """Where a benchmark's vectors come from."""

    model_id: str
    dimensions: int
    described: str

    def of(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, float32, shape (len(texts), dimensions): the same for the same text."""
        ...


class TextVectors:
    """Vectors of the texts themselves."""

    described = "real text vectors (WordLlama over Python's language reference and packages' descriptions, varied)"

    def __init__(self) -> None:
        """Raises ValidationError where WordLlama is not installed."""
        self._embedder = db.WordLlamaEmbedder()
        self.model_id = self._embedder.model_id
        self.dimensions = self._embedder.dimensions

    def of(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._embedder.embed(texts)


class SyntheticVectors:
    """Directions without any structure, drawn from a hash of the text."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.model_id = f"synthetic-{dimensions}"
        self.described = "synthetic vectors (normal deviates, scaled to length 1)"

    def of(self, texts: Sequence[str]) -> NDArray[np.float32]:
        seeds = (int.from_bytes(sha256(text.encode()).digest()[:8]) for text in texts)
        drawn = np.stack([np.random.default_rng(seed).standard_normal(self.dimensions, np.float32) for seed in seeds])
        unit: NDArray[np.float32] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        return unit


def documents(vectors: Vectors, start: int, count: int, *, revision: int = 0) -> Iterator[db.Document]:
    """Documents number `start` and up. Another `revision` has the same ids and all else different."""
    for begin in range(start, start + count, _AT_ONCE):
        numbers = range(begin, min(begin + _AT_ONCE, start + count))
        texts = [text_of(n, revision) for n in numbers]
        for n, text, vector in zip(numbers, texts, vectors.of(texts), strict=True):
            yield db.Document(id_of(n), text, vector, metadata_of(n, revision), source_of(n))


def items(numbers: Sequence[int], *, metadata_revision: int = 0) -> list[db.Item]:
    """The same rows without their vectors, as `embed_batch` takes them; only their metadata may differ."""
    return [db.Item(id_of(n), text_of(n), metadata_of(n, metadata_revision), source_of(n)) for n in numbers]


def id_of(number: int) -> str:
    return f"document/{number:09}"


def source_of(number: int) -> str:
    return f"source-{number // DOCUMENTS_A_SOURCE}"


def metadata_of(number: int, revision: int = 0) -> dict[str, object]:
    return {"lang": "en", "number": number, "revision": revision, "workspace": f"team-{number % 7}"}


def text_of(number: int, revision: int = 0) -> str:
    """Two pieces of prose and the row's number: no two rows have the same text."""
    pieces = corpus()
    second = pieces[(number + 1 + 61 * (number // len(pieces)) + 17 * revision) % len(pieces)]
    return f"{pieces[number % len(pieces)]} {second} ({number}, {revision})"


@cache
def corpus() -> tuple[str, ...]:
    """Paragraphs of the demo's texts, each on one line and cut where it is long."""
    paragraphs = (p for item in (*python_reference(), *installed_packages()) for p in re.split(r"\n\s*\n", item.text))
    lines = (" ".join(p.split())[: _PIECE_CHARACTERS.stop].strip() for p in paragraphs)
    return tuple(dict.fromkeys(line for line in lines if len(line) >= _PIECE_CHARACTERS.start))


class KnownVectors:
    """An embedder that has its vectors ready, and counts what it is asked: its own speed is not measured."""

    def __init__(self, vectors: Vectors, known: Sequence[db.Document] = ()) -> None:
        self.model_id = vectors.model_id
        self.dimensions = vectors.dimensions
        self.asked = 0
        self._known = {document.text: document.embedding for document in known}

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of `texts`. Raises KeyError for one that is not known."""
        self.asked += len(texts)
        return np.stack([np.asarray(self._known[text], np.float32) for text in texts])
