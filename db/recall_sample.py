"""What recall is measured with: stored vectors picked at random, and vectors that were asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg import Connection, sql

from . import vectors
from .embedding_model import Model
from .filters import Filter
from .page_sample import page_samples
from .query_samples import newest_queries
from .search import TABLE_OF, rows_of
from .types import Level

_HAS_VECTORS = sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE embedding IS NOT NULL)")
# The vectors are read for the rows that were picked only.
_PICK = sql.SQL("""
    WITH picked AS MATERIALIZED (
        SELECT target.id FROM {source} {part}
        WHERE target.embedding IS NOT NULL AND {condition}
        ORDER BY random() LIMIT %s)
    SELECT stored.id, vector_send(stored.embedding) FROM picked JOIN {table} AS stored USING (id)
    WHERE stored.embedding IS NOT NULL AND vector_dims(stored.embedding) = {dimensions}
    ORDER BY random()
""")


@dataclass(frozen=True, slots=True)
class Question:
    """A vector to search for, and the row that it is the vector of."""

    vector: NDArray[np.float32]
    row_id: str | None


@dataclass(frozen=True, slots=True)
class Questions:
    """What to measure with. zero_vectors: rows that were picked but have no direction to search in."""

    asked: Sequence[Question]
    zero_vectors: int


def has_vectors(connection: Connection[Any], level: Level) -> bool:
    """Whether any row of `level` has a vector."""
    [(has,)] = connection.execute(_HAS_VECTORS.format(sql.Identifier(TABLE_OF[level]))).fetchall()
    return bool(has)


def choose_questions(connection: Connection[Any], model: Model, level: Level, filters: Filter, count: int) -> Questions:
    """At most half of `count` are queries that were asked, the newest; the rest are rows that pass the filter."""
    queries = []
    if filters == Filter():
        queries = newest_queries(connection, model.model_id, model.dimensions, level, count // 2)
    rows = _pick_rows(connection, model, level, filters, count - len(queries))
    # Nothing is near a zero vector but by L2 distance.
    usable = [row for row in rows if row.vector.any() or model.distance == "l2"]
    asked = [*usable, *(Question(vector, None) for vector in queries)]
    return Questions(asked, len(rows) - len(usable))


def _pick_rows(connection: Connection[Any], model: Model, level: Level, filters: Filter, count: int) -> list[Question]:
    """Rows with a vector, each as likely as any other but for those that share a page of a large table."""
    source, condition = rows_of(level, filters, opaque=False)
    everywhere: list[sql.Composable] = [sql.SQL("")]
    parts = page_samples(connection, TABLE_OF[level], count) if filters == Filter() else everywhere
    rows: list[Any] = []
    for part in parts:
        statement = _PICK.format(
            source=source,
            part=part,
            condition=condition.sql,
            table=sql.Identifier(TABLE_OF[level]),
            dimensions=sql.Literal(model.dimensions),
        )
        rows = connection.execute(statement, [*condition.values, count], prepare=False).fetchall()
        if len(rows) >= count:
            break
    return [Question(vectors.decode(data), id_) for id_, data in rows]
