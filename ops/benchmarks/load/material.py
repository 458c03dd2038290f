"""What is written and asked under load: documents that are like each other but never equal, questions that repeat."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import db

from ..rows import Vectors, metadata_of, text_of

# Shared rows lie in so many sources. The first half of these is never written again: answers from there stay true.
_SHARED_SOURCES = 10
_QUIET_SOURCES = 5
_TEXTS = 2000
_QUESTIONS = 200
_VARIATION = 0.3  # length of what is added to a unit vector, to make another one of it


@dataclass(frozen=True)
class Question:
    """What a search is given besides `k`."""

    query: NDArray[np.float32] | str
    filters: dict[str, Any]


class Material:
    """Makes documents and questions of a fixed stock of texts and vectors: it does not grow."""

    def __init__(self, vectors: Vectors) -> None:
        self.model_id = vectors.model_id
        self.dimensions = vectors.dimensions
        self._vectors = vectors
        self._texts = [text_of(number) for number in range(_TEXTS)]
        self._stock = vectors.of(self._texts)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As an embedder: questions that are texts come here where the vector cache has them not."""
        return self._vectors.of(texts)

    def document(self, id_: str, source_id: str, number: int, draw: np.random.Generator) -> db.Document:
        """A document with a text and a vector that no other has."""
        place = int(draw.integers(_TEXTS))
        revision = int(draw.integers(2**31))
        text = f"{self._texts[place]} [{id_} {revision}]"
        noise = draw.standard_normal(self.dimensions, np.float32)
        vector = self._stock[place] + _VARIATION * noise / np.linalg.norm(noise)
        return db.Document(id_, text, vector / np.linalg.norm(vector), metadata_of(number, revision), source_id)

    def shared_documents(self, rows: int) -> Iterator[db.Document]:
        """What is stored before the load begins."""
        draw = np.random.default_rng(0)
        for number in range(rows):
            yield self.document(shared_id(number), shared_source(number), number, draw)

    def changed(self, rows: int, count: int, draw: np.random.Generator) -> list[db.Document]:
        """Up to `count` of the shared rows that may change, each with another text and vector."""
        numbers = [n for n in draw.choice(rows, min(count * 3, rows), replace=False) if not is_quiet(int(n))][:count]
        return [self.document(shared_id(n), shared_source(n), n, draw) for n in map(int, numbers)]

    def questions(self) -> list[Question]:
        """The same ones in every process. A quarter are texts; half ask in a quiet source, a quarter in a workspace."""
        draw = random.Random(1)
        places = draw.sample(range(_TEXTS), _QUESTIONS)
        return [
            Question(self._texts[place] if number % 4 == 0 else self._stock[place], _filters(number, draw))
            for number, place in enumerate(places)
        ]


def _filters(number: int, draw: random.Random) -> dict[str, Any]:
    if number % 2:
        return {"source_id": shared_source(draw.randrange(_QUIET_SOURCES))}
    return {"workspace": f"team-{draw.randrange(7)}"} if number % 4 else {}


def shared_id(number: int) -> str:
    return f"shared/{number:09}"


def shared_source(number: int) -> str:
    return f"shared-{number % _SHARED_SOURCES}"


def is_quiet(number: int) -> bool:
    return number % _SHARED_SOURCES < _QUIET_SOURCES
