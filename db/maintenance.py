"""Maintenance: what piles up is removed, and tables that ask for it are vacuumed."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import psycopg
from psycopg import Connection
from psycopg import errors as pg

from . import vector_cache
from .config import Settings
from .embedding_model import Model
from .engine import Database
from .index_health import inspect_indexes
from .locks import Purpose, advisory_lock
from .types import MaintenanceResult, Step, StepProgress
from .vacuum import vacuum
from .vector_index import INDEXED_TABLES, ensure_vector_indexes, rebuild_vector_index

logger = logging.getLogger("vectorkeep")

# A table is vacuumed past this share of dead rows, and not for a handful of them.
_DEAD_SHARE = 0.1
_DEAD_ROWS = 1000
# The log must outlive what it fences: no cached result lives longer than its time in Redis.
_LOG_RETENTION_FACTOR = 2

# One statement: a reader sees the watermark raised and the rows gone, or neither. It rises just above the
# rows that go: any higher, and answers that nothing has ended would be lost. A log restored from another
# cluster may hold transaction ids of its future: they fence nothing here and would block for ever.
_PRUNE_LOG = """
    WITH horizon AS (
        SELECT least(pg_snapshot_xmin(pg_current_snapshot()),
                     (SELECT min(xid) FROM write_log WHERE created_at >= now() - make_interval(secs => %(keep_s)s)
                                                       AND xid < pg_snapshot_xmax(pg_current_snapshot()))) AS xid),
    going AS (
        SELECT (max(write_log.xid)::text::bigint + 1)::text::xid8 AS above
        FROM write_log JOIN horizon ON write_log.xid < horizon.xid),
    raised AS (
        UPDATE write_log_watermark AS mark
        SET xid = CASE WHEN mark.xid > pg_snapshot_xmax(pg_current_snapshot()) THEN horizon.xid
                       ELSE greatest(mark.xid, going.above) END
        FROM horizon, going RETURNING mark.xid)
    DELETE FROM write_log USING raised
    WHERE write_log.xid < raised.xid OR write_log.xid > pg_snapshot_xmax(pg_current_snapshot())
"""
_RETIRE_METRICS = "DELETE FROM performance_metrics WHERE created_at < now() - make_interval(secs => %s)"
_RETIRE_RUNS = "DELETE FROM maintenance_runs WHERE finished_at < now() - make_interval(secs => %s)"
_DEAD = "SELECT n_live_tup, n_dead_tup FROM pg_stat_user_tables WHERE relid = to_regclass(%s)"
_SIZE = "SELECT pg_total_relation_size(to_regclass(%s))"
_OWNS_TABLES = """
    SELECT bool_and(pg_has_role(relowner, 'USAGE')) FROM pg_class
    WHERE oid IN ('embeddings'::regclass, 'chunks'::regclass)
"""
_RECORD_RUN = """
    INSERT INTO maintenance_runs (operation, success, details, started_at)
    VALUES ('maintain', %s, %s, now() - make_interval(secs => %s))
"""
_VACUUMED = ("embeddings", "chunks", "vector_cache", "write_log", "performance_metrics")


@dataclass(frozen=True, slots=True)
class MaintenancePlan:
    """What a run may do, and for how long."""

    skip_compaction: bool = False
    skip_index: bool = False
    skip_cleanup: bool = False
    retention_days: float = 7
    index_stale_threshold: float = 0.1
    dry_run: bool = False
    deadline_s: float | None = None
    cancel: Event | None = None
    on_progress: StepProgress | None = None


class _Skipped(Exception):  # noqa: N818
    """A step had nothing to do, or only told what it would do."""


class _NotPermitted(Exception):  # noqa: N818
    """The role may not do this step."""


class _Run:
    """One maintenance run: its steps, each on its own."""

    def __init__(
        self, connection: Connection[Any], plan: MaintenancePlan, settings: Settings, model: Model | None
    ) -> None:
        self.connection = connection
        self.plan = plan
        self.settings = settings
        self.model = model
        self.started = time.monotonic()
        self.steps: list[Step] = []
        self.rows_removed = 0
        self.bytes_removed = 0
        self.index_built = False

    def step(self, name: str, work: Callable[[], str]) -> None:
        """Run one step; its failure is reported and the next one goes on."""
        started = time.perf_counter()
        outcome: Any = "done"
        if self._is_over():
            self.steps.append(Step(name, "not reached", "the deadline passed or the run was cancelled", 0.0))
            return
        if self.plan.on_progress is not None:
            self.plan.on_progress(name, None)
        try:
            details = work()
        except _Skipped as exc:
            outcome, details = "skipped", str(exc)
        except (_NotPermitted, pg.InsufficientPrivilege) as exc:
            outcome, details = "not permitted", str(exc).strip()
        except psycopg.Error as exc:
            outcome, details = "failed", str(exc).strip()
            logger.warning("maintain.step_failed", extra={"step": name, "reason": details})
        self.steps.append(Step(name, outcome, details, (time.perf_counter() - started) * 1000))

    def _is_over(self) -> bool:
        plan = self.plan
        late = plan.deadline_s is not None and time.monotonic() - self.started > plan.deadline_s
        return late or (plan.cancel is not None and plan.cancel.is_set())

    def _remove(self, statement: str, parameters: Any, what: str) -> str:
        if self.plan.dry_run:
            raise _Skipped(f"dry run: would remove {what}")
        removed = self.connection.execute(statement.encode(), parameters).rowcount
        self.rows_removed += removed
        return f"removed {removed} {what}"

    def prune_log(self) -> str:
        keep_s = _LOG_RETENTION_FACTOR * self.settings.cache_ttl_s
        return self._remove(_PRUNE_LOG, {"keep_s": keep_s}, "rows of the write log")

    def retire_metrics(self) -> str:
        return self._remove(_RETIRE_METRICS, (self.plan.retention_days * 86_400,), "metrics past retention")

    def retire_runs(self) -> str:
        return self._remove(_RETIRE_RUNS, (self.plan.retention_days * 86_400,), "runs past retention")

    def retire_vectors(self) -> str:
        if self.plan.dry_run:
            raise _Skipped(f"dry run: would shrink the vector cache to {self.settings.vector_cache_mb:g} MB")
        removed = vector_cache.retire(self.connection, self.settings.vector_cache_mb)
        self.rows_removed += removed
        return f"removed {removed} cached vectors beyond {self.settings.vector_cache_mb:g} MB"

    def build_indexes(self) -> str:
        if self.model is None or not self.model.indexed:
            raise _Skipped("no model with an index is registered")
        wanting = [r.table for r in inspect_indexes(self.connection, self.model) if not r.valid]
        if not wanting:
            raise _Skipped("every vector index is valid")
        if self.plan.dry_run:
            raise _Skipped(f"dry run: would build the vector index of {', '.join(wanting)}")
        [(may_build,)] = self.connection.execute(_OWNS_TABLES).fetchall()
        if not may_build:
            raise _NotPermitted(f"only the tables' owner may build the vector index of {', '.join(wanting)}")
        built = ensure_vector_indexes(self.connection, self.model)
        self.index_built = bool(built)
        return f"built {', '.join(built) or 'no index'}"

    def rebuild_stale_indexes(self) -> str:
        """REINDEX where more than the threshold of what an index holds is dead. VACUUM alone shrinks no HNSW."""
        reports = [r for r in inspect_indexes(self.connection, self.model) if r.valid]
        threshold = 100 * self.plan.index_stale_threshold
        stale = [r for r in reports if r.stale_percent > threshold and r.indexed_rows > _DEAD_ROWS]
        if not stale:
            raise _Skipped(f"no vector index is stale beyond {threshold:g} %")
        names = ", ".join(f"{r.name} ({r.stale_percent:g} %)" for r in stale)
        if self.plan.dry_run:
            raise _Skipped(f"dry run: would rebuild {names}")
        for report in stale:
            table = next(t for t in INDEXED_TABLES if t.name == report.table)
            assert self.model is not None
            rebuild_vector_index(self.connection, self.model, table, report.indexed_rows)
        self.index_built = True
        return f"rebuilt {names}"

    def vacuum(self, table: str) -> str:
        live, dead = self._row(_DEAD, table) or (0, 0)
        if dead < max(_DEAD_ROWS, _DEAD_SHARE * (live + dead)):
            raise _Skipped(f"{dead} dead rows of {live + dead} do not ask for it")
        if self.plan.dry_run:
            raise _Skipped(f"dry run: would vacuum away {dead} dead rows")
        [before] = self._row(_SIZE, table) or (0,)
        if warnings := vacuum(self.connection, table):
            raise _NotPermitted("; ".join(warnings))
        [after] = self._row(_SIZE, table) or (0,)
        self.bytes_removed += max(0, before - after)
        return f"vacuumed {dead} dead rows away"

    def _row(self, statement: str, table: str) -> tuple[Any, ...] | None:
        return self.connection.execute(statement.encode(), (table,)).fetchone()


def maintain(database: Database, model: Model | None, plan: MaintenancePlan) -> MaintenanceResult:
    """Run the steps of `plan`, one process at a time. Raises BusyError that says who runs."""
    with (
        database.maintenance() as connection,
        advisory_lock(connection, Purpose.MAINTENANCE, wait_s=0),
    ):
        run = _Run(connection, plan, database.settings, model)
        if not plan.skip_cleanup:
            run.step("prune the write log", run.prune_log)
            run.step("retire metrics", run.retire_metrics)
            run.step("retire run history", run.retire_runs)
            run.step("retire cached vectors", run.retire_vectors)
        if not plan.skip_index:
            run.step("build missing indexes", run.build_indexes)
            run.step("rebuild stale indexes", run.rebuild_stale_indexes)
        for table in () if plan.skip_compaction else _VACUUMED:
            run.step(f"vacuum {table}", lambda table=table: run.vacuum(table))  # type: ignore[misc]
        duration_s = time.monotonic() - run.started
        if not plan.dry_run:
            run.step("record the run", lambda: _record(connection, run.steps, duration_s))
        reports = inspect_indexes(connection, model)
    return MaintenanceResult(
        steps=run.steps,
        index_rebuilt=run.index_built,
        index=reports[0] if reports else None,
        bytes_removed=run.bytes_removed,
        rows_removed=run.rows_removed,
        duration_ms=duration_s * 1000,
    )


def _record(connection: Connection[Any], steps: list[Step], duration_s: float) -> str:
    outcomes = {step.name: step.outcome for step in steps}
    success = not any(step.outcome in ("failed", "not reached") for step in steps)
    connection.execute(_RECORD_RUN, (success, psycopg.types.json.Jsonb(outcomes), duration_s))
    return "recorded"
