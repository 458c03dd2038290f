"""The state of the vector indexes, and one verdict with its reasons."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from psycopg import Connection

from .embedding_model import Model
from .models import vector_index_name
from .types import Health, IndexReport
from .vector_index import INDEXED_TABLES

# The rules, in one place. Past `degraded` search is slower or larger than it should be; `critical` means
# that searches do without the index.
DEAD_ROWS_DEGRADED = 0.2
STALE_DEGRADED = 0.5
UNUSED_AFTER = timedelta(days=7)
_SMALL_TABLE_ROWS = 1000

_FACTS = """
    SELECT index.indexrelid IS NOT NULL, coalesce(index.indisvalid AND index.indisready, false),
           coalesce(pg_relation_size(index.indexrelid), 0),
           coalesce(tables.n_live_tup, 0), coalesce(tables.n_dead_tup, 0),
           coalesce((tables.n_tup_del + tables.n_tup_upd - tables.n_tup_hot_upd)::float8
                    / nullif(tables.n_tup_del + tables.n_tup_upd, 0), 1),
           coalesce(indexes.idx_scan, 0), indexes.last_idx_scan,
           now() - greatest(pg_postmaster_start_time(), database.stats_reset) AS counted_for
    FROM pg_class AS table_class
    LEFT JOIN pg_index AS index ON index.indexrelid = to_regclass(%(index)s)
    LEFT JOIN pg_stat_user_tables AS tables ON tables.relid = table_class.oid
    LEFT JOIN pg_stat_user_indexes AS indexes ON indexes.indexrelid = index.indexrelid
    LEFT JOIN pg_stat_database AS database ON database.datname = current_database()
    WHERE table_class.oid = to_regclass(%(table)s)
"""
_COUNT_VECTORS = {
    "embeddings": "SELECT count(*) FROM embeddings WHERE embedding IS NOT NULL",
    "chunks": "SELECT count(*) FROM chunks WHERE embedding IS NOT NULL",
}
_SEVERITY: dict[Health, int] = {"healthy": 0, "degraded": 1, "critical": 2}


@dataclass(frozen=True, slots=True)
class _Facts:
    exists: bool
    valid: bool
    size_bytes: int
    live_rows: int
    dead_rows: int
    indexed_share: float  # of the dead rows, those that the index holds too: HOT updates never reach it
    scans: int
    last_scan: Any
    counted_for: timedelta | None


def inspect_indexes(connection: Connection[Any], model: Model | None) -> list[IndexReport]:
    """A report of each vector index that the store should have; none before a model is registered."""
    if model is None:
        return []
    return [_inspect(connection, table.name, model) for table in INDEXED_TABLES]


def overall(reports: Iterable[IndexReport]) -> Health:
    """The worst of the verdicts."""
    verdicts: list[Health] = [report.verdict for report in reports]
    return max(verdicts, key=_SEVERITY.__getitem__, default="healthy")


def _inspect(connection: Connection[Any], table: str, model: Model) -> IndexReport:
    name = vector_index_name(table)
    [row] = connection.execute(_FACTS, {"index": name, "table": table}).fetchall()
    facts = _Facts(*row)
    [(vectors,)] = connection.execute(_COUNT_VECTORS[table].encode()).fetchall()
    stale = _stale_fraction(facts, vectors)
    findings = list(_findings(facts, table, vectors, model))
    return IndexReport(
        name=name,
        table=table,
        valid=facts.valid,
        size_bytes=facts.size_bytes,
        indexed_rows=vectors if facts.valid else 0,
        unindexed_rows=0 if facts.valid else vectors,
        stale_percent=round(100 * stale, 1),
        needs_rebuild=model.indexed and bool(vectors) and (not facts.valid or stale > STALE_DEGRADED),
        used=_used(facts),
        recall=None,
        verdict=max((verdict for verdict, _ in findings), key=_SEVERITY.__getitem__, default="healthy"),
        reasons=[reason for _, reason in findings],
    )


def _stale_fraction(facts: _Facts, vectors: int) -> float:
    """Dead rows that the index still holds, as a share of all it holds."""
    dead = facts.dead_rows * facts.indexed_share
    return dead / (vectors + dead) if facts.valid and vectors + dead else 0.0


def _used(facts: _Facts) -> bool | None:
    """Whether searches use the index. A crash or a reset sets the counters to 0, so 0 alone says nothing."""
    if not facts.valid or facts.scans > 0 or facts.last_scan is not None:
        return facts.valid
    if facts.counted_for is None or facts.counted_for < UNUSED_AFTER:
        return None
    return False


def _findings(facts: _Facts, table: str, vectors: int, model: Model) -> Iterable[tuple[Health, str]]:
    if not model.indexed:
        if vectors > _SMALL_TABLE_ROWS:
            yield (
                "degraded",
                f"{table}: {model.dimensions} dimensions cannot be indexed (at most 4000 can), "
                "so every search compares all rows; use a model of fewer dimensions",
            )
        return
    remedy = f"run 'vectorkeep migrate --model {model.model_id} --dimensions {model.dimensions}' as the owner"
    if not facts.exists:
        if vectors:
            yield (
                "critical",
                f"{table}: no vector index over {vectors} vectors, searches compare all; {remedy}",
            )
        return
    if not facts.valid:
        yield "critical", f"{table}: the vector index is invalid, its build was interrupted; {remedy}"
        return
    dead = facts.dead_rows / max(1, facts.dead_rows + facts.live_rows)
    if dead > DEAD_ROWS_DEGRADED and facts.dead_rows > _SMALL_TABLE_ROWS:
        yield (
            "degraded",
            f"{table}: {facts.dead_rows} dead rows ({dead:.0%}) slow every scan; run VACUUM (ANALYZE) {table}",
        )
    if _used(facts) is False and vectors > _SMALL_TABLE_ROWS:
        yield (
            "degraded",
            f"{table}: the vector index was not used once in {facts.counted_for}, the time that its counter "
            "covers; look at the plan of a slow search with VECTORKEEP_DEBUG=1",
        )
