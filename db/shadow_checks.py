"""Whether a filled shadow may take the live store's place: its recall, and how many neighbours are the same."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from psycopg import Connection
from psycopg.sql import SQL, Identifier

from . import vectors
from .embedding_model import Model
from .errors import UnavailableError, ValidationError
from .filters import Filter
from .page_sample import page_samples
from .recall import RecallRequest, measure_recall
from .recall_sample import has_vectors
from .search import Query, Searcher
from .types import Level

_K = 10
_SAMPLE = 100
_DEADLINE_S = 30.0
_LEVELS: tuple[Level, ...] = ("documents", "chunks")

# None of these but the last reads a vector: mostly they lie outside the row, in pages that are many times the table's.
_PICKED = "SELECT id FROM {} {} WHERE embedding IS NOT NULL ORDER BY md5(id) LIMIT %s"
_OF_IDS = "SELECT id, vector_send(embedding) FROM {} WHERE id = ANY (%s) AND embedding IS NOT NULL"


@dataclass(frozen=True, slots=True)
class Side:
    """One store to ask: a connection that finds its tables, its model, and how hard its searches try."""

    connection: Connection[Any]
    model: Model
    ef_search: int


def measured_recall(side: Side, target: float) -> float | None:
    """Recall@10 of the side's searches, the worse of the two levels; None where there is nothing to search."""
    measured = []
    for level in _LEVELS:
        if has_vectors(side.connection, level):
            request = RecallRequest(side.ef_search, target, k=_K, sample=_SAMPLE, level=level, deadline_s=_DEADLINE_S)
            # A single row has no neighbours; and a table so large that one comparison takes longer is not measured.
            with suppress(ValidationError, UnavailableError):
                measured.append(measure_recall(side.connection, Searcher(), side.model, request).recall)
    return min(measured, default=None)


def neighbour_overlap(old: Side, new: Side) -> float | None:
    """The share of each row's ten nearest that both sides agree on, over a sample; None where there is nothing."""
    level: Level = "documents" if has_vectors(old.connection, "documents") else "chunks"
    asked = _sample(old, level)
    renewed = _vectors(new, level, list(asked))
    shares = []
    for id_, vector in asked.items():
        if id_ not in renewed:
            continue
        before = _neighbours(old, level, id_, vector)
        if before:
            shares.append(len(before & _neighbours(new, level, id_, renewed[id_])) / len(before))
    return float(np.mean(shares)) if shares else None


def _neighbours(side: Side, level: Level, id_: str, vector: Any) -> set[str]:
    query = Query(vector, _K + 1, level, Filter(), side.ef_search, False)
    return set([hit.id for hit in _search(Searcher(), side, query) if hit.id != id_][:_K])


def _search(searcher: Searcher, side: Side, query: Query) -> Any:
    return searcher.search(side.connection, query, side.model).result


def _sample(side: Side, level: Level) -> dict[str, Any]:
    """The vectors, by id, of at most _SAMPLE rows that have one of the side's model."""
    found = _vectors(side, level, _picked(side, level))
    return {id_: vector for id_, vector in found.items() if len(vector) == side.model.dimensions}


def _picked(side: Side, level: Level) -> list[str]:
    """The ids of at most _SAMPLE rows with a vector, of a large table out of a part of its pages."""
    table = _table(level)
    ids: list[str] = []
    for part in page_samples(side.connection, table, _SAMPLE, repeatable=True):
        rows = side.connection.execute(SQL(_PICKED).format(Identifier(table), part), (_SAMPLE,))
        ids = [id_ for (id_,) in rows]
        if len(ids) == _SAMPLE:
            break
    return ids


def _vectors(side: Side, level: Level, ids: list[str]) -> dict[str, Any]:
    rows = side.connection.execute(SQL(_OF_IDS).format(Identifier(_table(level))), (ids,))
    return {id_: vectors.decode(data) for id_, data in rows}


def _table(level: Level) -> str:
    return "embeddings" if level == "documents" else "chunks"
