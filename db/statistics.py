"""Statistics and diagnostics: what the store holds, how large, how fast, how healthy."""

from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Float, Text, case, column, func, select
from sqlalchemy import cast as sql_cast
from sqlalchemy import text as sql
from sqlalchemy.dialects.postgresql import array
from sqlalchemy.orm import aliased

from .embedding_model import Model
from .engine import Database
from .index_health import inspect_indexes, overall
from .migrate import current_revision
from .models import Base, Chunk, Embedding, PerformanceMetric
from .row_counts import RowCount, count_rows
from .types import Diagnostics, Performance, Statistics

_WINDOW = timedelta(days=7)
# Every search leaves a row: of a busy store nobody waits for the percentiles of all of them.
_NEWEST_METRICS = 100_000
_COUNTED: dict[str, type[Embedding] | type[Chunk]] = {"documents": Embedding, "chunks": Chunk}
_INSERTS = ("batch_upsert", "embed_batch", "sync")

# SELECT DISTINCT would read every row; this hops from one source to the next along the index.
_SOURCES = sql("""
    WITH RECURSIVE hop AS (
        (SELECT source_id FROM embeddings ORDER BY source_id LIMIT 1)
        UNION ALL
        SELECT (SELECT source_id FROM embeddings WHERE source_id > hop.source_id ORDER BY source_id LIMIT 1)
        FROM hop WHERE hop.source_id IS NOT NULL)
    SELECT source_id FROM hop WHERE source_id IS NOT NULL
""")


def get_statistics(database: Database, model: Model | None, workspace: str | None) -> Statistics:
    """Counts of the store or of one workspace, and the store's storage, health and performance."""
    known: dict[str, RowCount] = {}
    estimated: list[str] = []
    with database.connection() as direct:
        indexes = inspect_indexes(direct, model, known)
        if workspace is None:
            counts = {name: count_rows(direct, table.__tablename__, known) for name, table in _COUNTED.items()}
            rows = {name: count.rows for name, count in counts.items()}
            estimated = [name for name, count in counts.items() if count.estimated]
    with database.engine.connect() as connection:
        if workspace is not None:
            rows = {name: _count_in(connection, table, workspace) for name, table in _COUNTED.items()}
        sources = _sources(connection, workspace)
        storage_bytes = _storage_bytes(connection)
        performance = _performance(connection)
    return Statistics(
        documents=rows["documents"],
        chunks=rows["chunks"],
        sources=sources,
        storage_mb=storage_bytes / 1024**2,
        index_health=overall(indexes),
        indexes=indexes,
        performance=performance,
        reasons=[reason for index in indexes for reason in index.reasons],
        estimated=estimated,
    )


def get_diagnostics(database: Database, model: Model | None) -> Diagnostics:
    """Rows and index of the documents, and the revision that the database is at now."""
    known: dict[str, RowCount] = {}
    with database.connection() as connection:
        total = count_rows(connection, Embedding.__tablename__, known)
        reports = inspect_indexes(connection, model, known)
        revision = current_revision(connection)
    return Diagnostics(
        total_rows=total.rows,
        revision=revision or "none",
        location=database.location,
        index=next((report for report in reports if report.table == Embedding.__tablename__), None),
        estimated=total.estimated,
    )


def _count_in(connection: Connection, table: type[Embedding] | type[Chunk], workspace: str) -> int:
    statement = select(func.count()).select_from(table).where(table.workspace == workspace)
    return connection.scalars(statement).one()


def _sources(connection: Connection, workspace: str | None) -> list[str]:
    if workspace is None:
        return list(connection.scalars(_SOURCES))
    statement = select(Embedding.source_id).where(Embedding.workspace == workspace).distinct()
    return sorted(connection.scalars(statement))


def _storage_bytes(connection: Connection) -> int:
    """Tables with their indexes and TOAST, all that are ours."""
    names = array([table.name for table in Base.metadata.sorted_tables], type_=Text)
    size = func.sum(func.pg_total_relation_size(func.to_regclass(column("name"))))
    statement = select(size).select_from(func.unnest(names).alias("name"))
    return int(connection.scalars(statement).one() or 0)


def _performance(connection: Connection) -> Performance:
    """Of what was recorded within the window, the newest."""
    newest = select(PerformanceMetric).order_by(PerformanceMetric.id.desc()).limit(_NEWEST_METRICS).subquery()
    metric = aliased(PerformanceMetric, newest)
    since = func.now() - _WINDOW

    def percentile(fraction: float) -> Any:
        return func.percentile_cont(fraction).within_group(metric.duration_ms)

    statement = (
        select(
            metric.operation,
            func.count(),
            func.avg(metric.duration_ms),
            percentile(0.5),
            percentile(0.95),
            percentile(0.99),
            func.avg(sql_cast(case((metric.metadata_["cached"].as_boolean(), 1), else_=0), Float)),
        )
        .where(metric.created_at > since, metric.success)
        .group_by(metric.operation)
    )
    rows = {row[0]: row for row in connection.execute(statement)}
    search = rows.get("search")
    inserts = [rows[name] for name in _INSERTS if name in rows]
    calls = sum(row[1] for row in inserts)
    return Performance(
        avg_search_ms=float(search[2]) if search else 0.0,
        avg_insert_ms=sum(float(row[2]) * row[1] for row in inserts) / calls if calls else 0.0,
        cache_hit_rate=float(search[6]) if search else 0.0,
        percentiles={name: {"p50": row[3], "p95": row[4], "p99": row[5]} for name, row in rows.items()},
    )
