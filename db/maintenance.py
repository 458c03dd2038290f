"""Maintenance: what piles up is removed, indexes that ask for it are built anew, tables vacuumed, searches tuned."""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from .embedding_model import Model
from .engine import BACKGROUND_WAIT_S, Database
from .errors import BusyError, VectorKeepError, translated
from .locks import Purpose, advisory_lock
from .types import IndexReport, MaintenanceResult
from .upkeep import cleanup, compaction, indexes
from .upkeep.run import MaintenancePlan, Run
from .vector_index import OWNS_TABLES, drop_leftovers

logger = logging.getLogger("vectorkeep")

__all__ = ["MaintenancePlan", "before_close", "maintain"]

# What an interrupted build left is dropped at once only where nobody holds it.
_TIDY_WAIT_MS = 2000

# A store is not maintained by itself before its model has been there for as long, nor by who may not record it.
# Whoever does not own the tables may have to leave what is due to the owner, for whom it stays due: its own runs, good
# or not, keep it and its like from trying again at every close.
# The state of another role's session is NULL to a role without pg_read_all_stats: such a session counts as busy.
_IS_DUE = sql.SQL("""
    SELECT greatest((SELECT max(finished_at) FROM maintenance_runs WHERE success OR NOT {owns_tables}),
                    (SELECT min(created_at) FROM embedding_models)) < now() - make_interval(secs => %s)
           AND has_table_privilege('maintenance_runs', 'INSERT')
           AND NOT EXISTS (SELECT FROM pg_stat_activity
                           WHERE datname = current_database() AND pid <> pg_backend_pid()
                             AND (backend_type = 'client backend' OR backend_type IS NULL AND usesysid IS NOT NULL)
                             AND state IS DISTINCT FROM 'idle')
""").format(owns_tables=OWNS_TABLES)
_RECORD_RUN = """
    INSERT INTO maintenance_runs (operation, success, details, started_at)
    VALUES ('maintain', %s, %s, now() - make_interval(secs => %s))
"""


def maintain(
    database: Database, model: Model | None, plan: MaintenancePlan, deliver: Callable[[], str] | None = None
) -> MaintenanceResult:
    """Run the steps of `plan`, one process at a time. Raises BusyError that says who runs.

    `deliver` hands the cache what it was not told yet, and says how much that was.
    """
    with (
        database.maintenance() as connection,
        advisory_lock(connection, Purpose.MAINTENANCE, wait_s=0),
    ):
        run = Run(database, connection, plan, model)
        try:
            if not plan.skip_cleanup:
                _clean_up(run, deliver)
            if not plan.skip_index:
                run.step("build missing indexes", indexes.build_missing)
                run.step("rebuild stale indexes", indexes.rebuild_stale)
            for table in () if plan.skip_compaction else compaction.VACUUMED_TABLES:
                run.step(f"vacuum {table}", partial(compaction.vacuum, table=table))
            if not plan.skip_index:
                run.step("tune searches", indexes.tune)
        finally:
            _tidy(run)
        _record(run)
        reports = _inspected(run)
    return MaintenanceResult(
        steps=run.steps,
        index_rebuilt=run.index_built,
        index=reports[0] if reports else None,
        bytes_removed=run.bytes_removed,
        rows_removed=run.rows_removed,
        duration_ms=run.duration_s * 1000,
    )


def before_close(database: Database, model: Model | None, deadline_s: float, *, asked: bool) -> list[str]:
    """Maintain a store that is about to close. Returns what failed or was not reached.

    Not asked for, only where it is due, where nobody else is at work in the database, and where no other process
    maintains already.
    """
    try:
        with translated():
            if not asked and not _is_due(database):
                return []
            result = maintain(database, model, MaintenancePlan(deadline_s=deadline_s))
    except BusyError as exc:
        return [str(exc)] if asked else []
    except VectorKeepError as exc:
        return [str(exc)]
    return [f"{s.name}: {s.details}" for s in result.steps if s.outcome in ("failed", "not reached")]


def _is_due(database: Database) -> bool:
    """Not where the server or the role does not tell: nobody has asked."""
    try:
        with database.connection(BACKGROUND_WAIT_S) as connection:
            [(due,)] = connection.execute(_IS_DUE, (database.settings.maintenance_due_s,)).fetchall()
    except psycopg.Error as exc:
        logger.info("maintenance.not_known_to_be_due", extra={"reason": str(exc).strip()})
        return False
    return bool(due)


def _clean_up(run: Run, deliver: Callable[[], str] | None) -> None:
    if deliver is not None and not run.plan.dry_run:
        run.step("deliver invalidations", lambda _: deliver())
    run.step("prune the write log", cleanup.prune_log)
    run.step("retire metrics", cleanup.retire_metrics)
    run.step("retire run history", cleanup.retire_runs)
    run.step("retire cached vectors", cleanup.retire_vectors)
    run.step("retire previous tables", cleanup.retire_previous_tables)
    run.step("remove leftovers", cleanup.remove_leftovers)


def _inspected(run: Run) -> list[IndexReport]:
    """How the indexes are now; not told of a run that was stopped."""
    if run.interruption.reason is not None:
        return []
    try:
        with run.interruption.watching(run.connection):
            return run.inspect_indexes()
    except psycopg.errors.QueryCanceled:
        return []


def _tidy(run: Run) -> None:
    """Drop what a build left that was stopped or failed; what is held then is left to the next run or the doctor."""
    ended_well = run.interruption.reason is None and not any(step.outcome == "failed" for step in run.steps)
    if ended_well or run.plan.dry_run or run.connection.closed:
        return
    with suppress(psycopg.Error, BusyError):
        drop_leftovers(run.connection, wait_ms=_TIDY_WAIT_MS)


def _record(run: Run) -> None:
    """Keep what became of the steps, also of a run that was stopped. One that did nothing leaves no record.

    A run that was not permitted what is due is no success: somebody else has to do it.
    """
    if run.plan.dry_run:
        return
    outcomes = {step.name: step.outcome for step in run.steps}
    if outcomes and set(outcomes.values()) == {"not reached"}:
        run.note("record the run", "not reached", "nothing was done")
        return
    success = not {"failed", "not permitted", "not reached"} & set(outcomes.values())
    try:
        run.connection.execute(_RECORD_RUN, (success, Jsonb(outcomes), run.duration_s))
        run.note("record the run", "done", "recorded")
    except psycopg.errors.InsufficientPrivilege as exc:
        run.note("record the run", "not permitted", str(exc).strip())
