"""Whether a filled shadow may take the live store's place: its recall, and how many neighbours are the same."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from psycopg import Connection
from psycopg.sql import SQL, Identifier

from . import vectors
from .embedding_model import Model
from .filters import Filter
from .search import Query, Searcher
from .types import Level

_K = 10
_SAMPLE = 100
# Distances within the rounding of float32 are equal.
_ROUNDING = 1e-6

_SAMPLED = """
    SELECT id, vector_send(embedding) FROM {} WHERE embedding IS NOT NULL AND vector_dims(embedding) = %s
    ORDER BY md5(id) LIMIT %s
"""
_OF_IDS = "SELECT id, vector_send(embedding) FROM {} WHERE id = ANY (%s) AND embedding IS NOT NULL"


@dataclass(frozen=True, slots=True)
class Side:
    """One store to ask: a connection that finds its tables, its model, and how hard its searches try."""

    connection: Connection[Any]
    model: Model
    ef_search: int


def measured_recall(side: Side) -> float | None:
    """Recall@10 of the side's searches for a sample of its own rows; None where there is nothing to search.

    Ties count, rows do not count as answers to themselves. The worse of the two levels.
    """
    measured = [recall for level in ("documents", "chunks") if (recall := _recall(side, level)) is not None]
    return min(measured, default=None)


def _recall(side: Side, level: Level) -> float | None:
    found = possible = 0
    searcher = Searcher()
    for id_, vector in _sample(side, level).items():
        query = Query(vector, _K + 1, level, Filter(), side.ef_search, False)
        # The statement of an exact search is one that no vector index can serve.
        exact = [hit for hit in _search(searcher, side, replace(query, exact=True)) if hit.id != id_][:_K]
        if not exact:
            continue
        reach = exact[-1].distance + _ROUNDING * max(1.0, abs(exact[-1].distance))
        indexed = [hit for hit in _search(searcher, side, query) if hit.id != id_]
        found += min(len(exact), sum(hit.distance <= reach for hit in indexed))
        possible += len(exact)
    return found / possible if possible else None


def neighbour_overlap(old: Side, new: Side) -> float | None:
    """The share of each row's ten nearest that both sides agree on, over a sample; None where there is nothing."""
    level: Level = "documents" if _sample(old, "documents") else "chunks"
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
    statement = SQL(_SAMPLED).format(Identifier(_table(level)))
    rows = side.connection.execute(statement, (side.model.dimensions, _SAMPLE))
    return {id_: vectors.decode(data) for id_, data in rows}


def _vectors(side: Side, level: Level, ids: list[str]) -> dict[str, Any]:
    rows = side.connection.execute(SQL(_OF_IDS).format(Identifier(_table(level))), (ids,))
    return {id_: vectors.decode(data) for id_, data in rows}


def _table(level: Level) -> str:
    return "embeddings" if level == "documents" else "chunks"
