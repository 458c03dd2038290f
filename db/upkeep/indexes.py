"""The vector indexes: those that are missing are built, those that are stale are built anew, searches are tuned."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psycopg
from psycopg import sql

from ..health_rules import BLOAT_DEGRADED, UNREACHABLE_DEGRADED
from ..index_facts import build_progress
from ..locks import Purpose, is_held
from ..tuning import tune_ef_search, tuning_due
from ..types import BuildProgress, IndexReport
from ..vector_index import INDEXED_TABLES, OWNS_TABLES, ensure_vector_indexes, rebuild_vector_index
from .compaction import asks_for_vacuum, predict
from .run import NotPermitted, Run, Skipped

_MIN_ROWS = 1000
_TELL_EVERY_S = 1.0
_TUNING_S = 300.0
_BUILDER_WAIT_S = 5.0


def build_missing(run: Run) -> str:
    """Build vector indexes that are missing or invalid, where no build of them runs."""
    if run.model is None or not run.model.indexed:
        raise Skipped("no model with an index is registered")
    wanting = [r.table for r in run.inspect_indexes() if not r.valid and r.building is None]
    if not wanting:
        raise Skipped("every vector index is valid")
    if run.plan.dry_run:
        raise Skipped(f"dry run: would build the vector index of {', '.join(wanting)}")
    if is_held(run.connection, Purpose.BULK_LOAD):
        raise Skipped(f"a bulk load runs, and builds the vector index of {', '.join(wanting)} at its end")
    _require_owner(run, f"build the vector index of {', '.join(wanting)}")
    tables = [table for table in INDEXED_TABLES if table.name in wanting]
    with _progress_told(run, "build missing indexes"):
        built = ensure_vector_indexes(run.connection, run.model, tables, wait_s=_builder_wait_s(run))
    run.index_built = bool(built)
    return f"built {', '.join(built) or 'no index'}"


def rebuild_stale(run: Run) -> str:
    """REINDEX where too much of what an index holds is dead, or where it has grown. VACUUM alone shrinks no HNSW."""
    reports = [r for r in run.inspect_indexes() if r.valid]
    asking = {r.name: why for r in reports if (why := _why_rebuild(run, r))}
    if not asking:
        raise Skipped(f"no vector index is stale beyond {100 * run.plan.index_stale_threshold:g} %")
    told = "; ".join(f"{name} ({why})" for name, why in asking.items())
    if run.plan.dry_run:
        raise Skipped(f"dry run: would rebuild {told}")
    _require_owner(run, f"rebuild {', '.join(asking)}")
    for report in reports:
        if report.name in asking and run.model is not None:
            table = next(t for t in INDEXED_TABLES if t.name == report.table)
            with _progress_told(run, "rebuild stale indexes"):
                wait_s = _builder_wait_s(run)
                rebuild_vector_index(run.connection, run.model, table, report.indexed_rows, wait_s=wait_s)
            run.index_built = True
    return f"rebuilt {told}"


def _why_rebuild(run: Run, report: IndexReport) -> str:
    """Why `report`'s index is to be built anew, with the figure; empty where it is not."""
    if report.indexed_rows + report.dead_rows < _MIN_ROWS:
        return ""
    if report.unreachable and report.unreachable > UNREACHABLE_DEGRADED * (report.looked_up or 0):
        return f"{report.unreachable} of {report.looked_up} rows do not find themselves"
    if (report.bloat or 0) * (1 - report.stale_percent / 100) >= BLOAT_DEGRADED:  # beyond what the dead rows explain
        return f"{report.bloat:.1f} times the size after its build"
    stale = f"{report.stale_percent:g} % stale"
    prediction = predict(run.connection, report)
    if report.stale_percent > 100 * run.plan.index_stale_threshold:
        return f"{stale}; {prediction}"
    if asks_for_vacuum(run, report.table) and not run.plan.skip_compaction and prediction.rebuild_is_cheaper:
        return f"{stale}, and VACUUM is due; {prediction}"
    return ""


def tune(run: Run) -> str:
    """Measure recall and set `ef_search` to the least that meets the target, where something changed since."""
    if run.model is None:
        raise Skipped("no model is registered")
    due = tuning_due(run.connection, run.model, run.settings)
    if not due:
        raise Skipped("nothing asks for another measure of recall")
    told = "; ".join(f"{level}: {why}" for level, why in due.items())
    if run.plan.dry_run:
        raise Skipped(f"dry run: would measure recall ({told})")
    left_s = run.interruption.left_s
    limit_s = _TUNING_S if left_s is None else min(left_s, _TUNING_S)
    return tune_ef_search(run.connection, run.model, run.settings, cancel=run.plan.cancel, deadline_s=limit_s).reason


def _builder_wait_s(run: Run) -> float:
    """How long another process that builds is waited for: what it builds is not due here."""
    left_s = run.interruption.left_s
    return _BUILDER_WAIT_S if left_s is None else min(left_s, _BUILDER_WAIT_S)


def _require_owner(run: Run, what: str) -> None:
    [(owner,)] = run.connection.execute(sql.SQL("SELECT {}").format(OWNS_TABLES)).fetchall()
    if not owner:
        raise NotPermitted(f"only the tables' owner may {what}")


@contextmanager
def _progress_told(run: Run, step: str) -> Iterator[None]:
    """Tell every second how far the build on the run's connection is; from a connection of its own."""
    if run.plan.on_progress is None:
        yield
        return
    done = threading.Event()

    def tell() -> None:
        with suppress(psycopg.Error), run.database.maintenance() as connection:
            while not done.wait(_TELL_EVERY_S):
                for table in INDEXED_TABLES:
                    if progress := build_progress(connection, table.name):
                        run.tell(step, _shown(table.name, progress))

    teller = threading.Thread(target=tell, name="vectorkeep-build-progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _shown(table: str, progress: BuildProgress) -> str:
    percent = "" if progress.percent is None else f", {progress.percent:.0f} %"
    left = "" if progress.eta_s is None else f", about {progress.eta_s:.0f} s left"
    return f"{table}: {progress.phase}{percent}{left}"
