"""Nearest-neighbour search: from a query vector to hits.

An index scan brings candidates by halfvec distance; they are ranked again by the exact distance of the
full vectors. Where few rows pass the filter, or the scan brought fewer than its candidates, every row that
passes is compared instead. The exact form is written so that no vector index can serve it.
"""

import itertools
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg import Connection, sql
from psycopg import errors as pg

from . import vectors
from .arguments import check_count
from .embedding_model import Model
from .engine import LIFE
from .errors import ValidationError
from .filters import Condition, Filter
from .models import vector_expression, vector_index_name
from .types import Hit, Level, SearchResult
from .values import shown

logger = logging.getLogger("vectorkeep")

MAX_K = 10_000
MAX_EF_SEARCH = 1000
TABLE_OF: dict[Level, str] = {"documents": "embeddings", "chunks": "chunks"}

# Below this many rows comparing all of them is as fast as an index scan, and exact.
ALWAYS_EXACT_ROWS = 1000
# An index scan that keeps a share s of what it visits needs candidates/s visits of about 10 µs; comparing
# all n·s rows costs about 1.5 µs each. They are equal where (n·s)² = 6.7 · candidates · n.
_VISIT_TO_COMPARE = 6.7
_ESTIMATE_TTL_S = 10.0
_MAX_ESTIMATES = 1000
_MAX_VISITS = 20_000  # of one scan: pgvector's own default

# By its name in this snapshot: to_regclass knows newer ones, and what a REINDEX CONCURRENTLY has just given the name to
# is not valid yet in it.
_VALID_INDEX = """
    SELECT FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE indrelid = to_regclass(%s) AND relname = %s AND indisvalid
"""
_SET_LOCAL = "SELECT set_config(name, value, true) FROM unnest(%s::text[], %s::text[]) AS setting (name, value)"

_OPERATOR = {"cosine": sql.SQL("<#>"), "inner_product": sql.SQL("<#>"), "l2": sql.SQL("<->")}


@dataclass(frozen=True, slots=True)
class Query:
    """A checked search: what is asked, of which rows."""

    vector: NDArray[np.float32]
    k: int
    level: Level
    filter: Filter
    ef_search: int
    exact: bool
    exclude_id: str | None = None  # of a stored row that is the question itself: it is found, and not told

    def __post_init__(self) -> None:
        check_asked(self.k, self.level, self.ef_search)

    @property
    def table(self) -> str:
        return TABLE_OF[self.level]

    @property
    def wanted(self) -> int:
        """How many rows are to be found."""
        return self.k + (self.exclude_id is not None)

    @property
    def candidates(self) -> int:
        """How many rows an index scan brings for the exact ranking."""
        return max(self.wanted, min(self.ef_search, 4 * self.wanted))


def check_asked(k: Any, level: Any, ef_search: Any) -> None:
    """Raise ValidationError where no search can be asked this."""
    check_count("k", k, MAX_K)
    if not isinstance(level, str) or level not in TABLE_OF:
        raise ValidationError(f"level is {shown(level)}; expected 'documents' or 'chunks'")
    check_count("ef_search", ef_search, MAX_EF_SEARCH)


@dataclass(frozen=True, slots=True)
class Answer:
    """A result with the snapshot, and the life of the store, that it was computed in: the cache needs them."""

    result: SearchResult
    snapshot: str
    life: str


class Searcher:
    """Runs queries for one store, and remembers for some seconds how many rows a filter passes."""

    def __init__(self) -> None:
        self._estimates: OrderedDict[tuple[Any, ...], tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()

    def search(
        self, connection: Connection[Any], query: Query, model: Model, *, incomplete_will_do: bool = False
    ) -> Answer:
        """The k nearest rows. Runs in one transaction; raises what psycopg raises.

        incomplete_will_do: where a scan brought some rows, but not all, and comparing every row that passes is
        cancelled, return those, told to be incomplete.
        """
        with connection.transaction():
            if not self._begin_scan(connection, query, model):
                return _run(connection, query, model, exact=True)
            found = _run(connection, query, model, exact=False)
            if found.result.complete:
                return found
            # The scan ran dry: few rows pass the filter or the server's policies, or it could not reach them.
            try:
                with connection.transaction():  # a savepoint: the scan's answer outlives it
                    exact = _run(connection, query, model, exact=True)
            except pg.QueryCanceled as exc:
                if not (incomplete_will_do and found.result):
                    raise
                fields = {"hits": len(found.result), "level": query.level, "reason": exc.diag.message_primary}
                logger.warning("search.incomplete", extra=fields)
                return found
            return Answer(exact.result, found.snapshot, found.life)  # the older snapshot: the safe one to cache with

    def indexes_planned(self, connection: Connection[Any], query: Query, model: Model) -> set[str]:
        """The indexes in the plan of the statement that `search` would begin with now."""
        with connection.transaction():
            exact = not self._begin_scan(connection, query, model)
            return indexes_in_plan(connection, *_bound_statement(query, model, exact=exact))

    def scan_planned(self, connection: Connection[Any], query: Query, model: Model, *, generic: bool) -> set[str]:
        """The indexes in the plan of an index scan for `query`, whether or not `search` would choose one.

        generic: in the plan made for all values, which a session uses that prepares its statements; `query`
        has no filter then.
        """
        with connection.transaction():
            _prepare_scan(connection, query, self._estimate(connection, query.table, Filter()))
            statement, values = _bound_statement(query, model, exact=False)
            if not generic:
                return indexes_in_plan(connection, statement, values)
            numbers = itertools.count(1)
            text = re.sub("%s", lambda _: f"${next(numbers)}", statement.as_string(connection))
            return indexes_in_plan(connection, sql.SQL(text), None, options="GENERIC_PLAN, ")

    def _begin_scan(self, connection: Connection[Any], query: Query, model: Model) -> bool:
        """Whether an index is to serve `query`; then the settings of its scan are set for this transaction."""
        if query.exact or not self._index_pays(connection, query, model):
            return False
        _prepare_scan(connection, query, self._estimate(connection, query.table, Filter()))
        return True

    def _index_pays(self, connection: Connection[Any], query: Query, model: Model) -> bool:
        if not model.indexed or _too_large_for_half(query.vector, model):
            return False
        if not _has_valid_index(connection, query.table):  # asked each time: a bulk load may have dropped it
            return False
        rows = self._estimate(connection, query.table, Filter())
        if rows <= ALWAYS_EXACT_ROWS:
            return False
        # `where` is left out: the planner guesses wildly about JSON, and a scan that runs dry is noticed.
        columns = Filter(workspace=query.filter.workspace, source_id=query.filter.source_id)
        passing = self._estimate(connection, query.table, columns)
        return passing**2 > _VISIT_TO_COMPARE * query.candidates * rows

    def _estimate(self, connection: Connection[Any], table: str, columns: Filter) -> int:
        """The planner's estimate of the rows that pass, at most some seconds old."""
        key = (table, columns.workspace, columns.source_id)
        now = time.monotonic()
        with self._lock:
            known = self._estimates.get(key)
            if known is not None and now - known[0] < _ESTIMATE_TTL_S:
                return known[1]
        rows = _planned_rows(connection, table, columns)
        with self._lock:
            self._estimates[key] = (now, rows)
            self._estimates.move_to_end(key)
            while len(self._estimates) > _MAX_ESTIMATES:
                self._estimates.popitem(last=False)
        return rows


def _planned_rows(connection: Connection[Any], table: str, columns: Filter) -> int:
    condition = columns.columns_sql("target")
    statement = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} AS target WHERE {}").format(
        sql.Identifier(table), condition.sql
    )
    [(plan,)] = connection.execute(statement, condition.values, prepare=False).fetchall()
    return int(plan[0]["Plan"]["Plan Rows"])


def _has_valid_index(connection: Connection[Any], table: str) -> bool:
    return connection.execute(_VALID_INDEX, (table, vector_index_name(table))).fetchone() is not None


def _too_large_for_half(vector: NDArray[np.float32], model: Model) -> bool:
    return model.distance != "cosine" and bool(np.abs(vector).max() > vectors.MAX_HALF)


def _prepare_scan(connection: Connection[Any], query: Query, rows: int) -> None:
    """Settings of an index scan, for this transaction. It gives up where comparing all `rows` would be cheaper."""
    settings = {
        "hnsw.ef_search": max(query.ef_search, min(query.candidates, MAX_EF_SEARCH)),
        "hnsw.iterative_scan": "relaxed_order",
        "hnsw.max_scan_tuples": min(_MAX_VISITS, max(ALWAYS_EXACT_ROWS, int(rows / _VISIT_TO_COMPARE))),
    }
    connection.execute(_SET_LOCAL, [list(settings), [str(value) for value in settings.values()]])


def indexes_in_plan(
    connection: Connection[Any], statement: sql.Composable, values: Sequence[Any] | None, *, options: str = ""
) -> set[str]:
    """Names of the indexes that the server would use for `statement`, with these values and settings."""
    explain = sql.SQL("EXPLAIN ({}FORMAT JSON) {}").format(sql.SQL(options), statement)
    [(plan,)] = connection.execute(explain, values, prepare=False).fetchall()
    return set(_index_names(plan[0]["Plan"]))


def _index_names(node: dict[str, Any]) -> Iterator[str]:
    if "Index Name" in node:
        yield node["Index Name"]
    for child in node.get("Plans", ()):
        yield from _index_names(child)


def _run(connection: Connection[Any], query: Query, model: Model, *, exact: bool) -> Answer:
    statement, values = _bound_statement(query, model, exact=exact)
    # A plan made for all values is wrong for a filter that few rows pass: no prepared statement there.
    prepare = None if query.filter == Filter() and not exact else False
    rows = connection.execute(statement, values, prepare=prepare).fetchall()
    snapshot, life, candidates = rows[0][:3]
    hits = tuple(_hit(row[3:], model) for row in rows if row[3] is not None)
    # k hits of a scan that gave up are not the k nearest: it looks around the query, but not in order.
    complete = exact or (candidates or 0) >= query.candidates
    return Answer(SearchResult(hits=hits, complete=complete, cached=False, exact=exact), snapshot, life)


def _bound_statement(query: Query, model: Model, *, exact: bool) -> tuple[sql.Composed, list[Any]]:
    vector = vectors.normalized(query.vector) if model.distance == "cosine" else query.vector
    return _statement(query, model, vectors.BinaryVector(vectors.encode(vector)), exact=exact)


def _statement(
    query: Query, model: Model, vector: vectors.BinaryVector, *, exact: bool
) -> tuple[sql.Composed, list[Any]]:
    """One statement that gives the snapshot in every row, and one row even where there is no hit."""
    source, condition = rows_of(query.level, query.filter, opaque=not exact)
    operator = _OPERATOR[model.distance]
    full = sql.SQL("l2_normalize(target.embedding)") if model.distance == "cosine" else sql.SQL("target.embedding")
    distance = sql.SQL("({} {} %s::vector)").format(full, operator)
    order: sql.Composable = sql.SQL("distance, target.id")
    order_values = []
    if not exact:
        expression = sql.SQL(vector_expression(model.dimensions, model.distance, "target.embedding"))
        half = sql.SQL("halfvec({})").format(sql.Literal(model.dimensions))
        order = sql.SQL("{} {} %s::vector::{}").format(expression, operator, half)
        order_values = [vector]
    # Not a condition of the scan: that would go on for one more, and be more patient than a user's.
    excluded = [] if query.exclude_id is None else [query.exclude_id]
    others = sql.SQL("WHERE id <> %s" if excluded else "")
    # The limits are literals: a plan made for any limit reckons with a tenth of the table.
    statement = _TEMPLATE.format(
        life=LIFE,
        distance=distance,
        source=source,
        condition=condition.sql,
        order=order,
        limit=sql.Literal(query.wanted if exact else query.candidates),
        others=others,
        k=sql.Literal(query.k),
        hits=_HITS[query.level],
    )
    return statement, [vector, *condition.values, *order_values, *excluded]


def rows_of(level: Level, filters: Filter, *, opaque: bool) -> tuple[sql.Composed, Condition]:
    """FROM and WHERE of the rows that a search is about, called `target`."""
    metadata: sql.Composable = sql.Identifier("target", "metadata")
    source = sql.SQL("{} AS target").format(sql.Identifier(TABLE_OF[level]))
    if level == "chunks":
        # A chunk's metadata is read over its document's.
        metadata = sql.SQL("(coalesce(document.metadata, '{}') || target.metadata)")
        joined = sql.SQL("{} LEFT JOIN embeddings AS document ON document.id = target.document_id")
        source = joined.format(source) if filters.where else source
    return source, filters.sql("target", metadata, opaque=opaque)


# The candidates carry ids and distances only: texts and metadata are read for the k that remain.
_TEMPLATE = sql.SQL("""
    SELECT pg_current_snapshot()::text, (SELECT {life}), hit.* FROM (SELECT) AS one LEFT JOIN (
        WITH candidates AS MATERIALIZED (
            SELECT target.id, {distance} AS distance FROM {source}
            WHERE target.embedding IS NOT NULL AND {condition}
            ORDER BY {order} LIMIT {limit}),
        nearest AS (SELECT id, distance FROM candidates {others} ORDER BY distance, id LIMIT {k})
        {hits}
    ) AS hit ON true ORDER BY hit.distance, hit.id
""")
_HITS = {
    "documents": sql.SQL("""
        SELECT (SELECT count(*) FROM candidates), target.id,
               target.id AS document_id, target.source_id, target.text, target.metadata, nearest.distance
        FROM nearest JOIN embeddings AS target ON target.id = nearest.id
    """),
    "chunks": sql.SQL("""
        SELECT (SELECT count(*) FROM candidates), target.id,
               coalesce(target.document_id, target.origin_id) AS document_id, target.source_id, target.text,
               coalesce(document.metadata, '{}') || target.metadata AS metadata, nearest.distance
        FROM nearest JOIN chunks AS target ON target.id = nearest.id
        LEFT JOIN embeddings AS document ON document.id = target.document_id
    """),
}


def _hit(row: tuple[Any, ...], model: Model) -> Hit:
    id_, document_id, source_id, text, metadata, distance = row
    if model.distance == "cosine":
        distance = max(0.0, 1.0 + distance)  # the negative product of two unit vectors, back to 1 − product
        score = 1.0 - distance
    else:
        score = -distance
    return Hit(id_, document_id or "", source_id, text, metadata, distance, score)
