"""What is past its time: rows of the write log, metrics, records of runs, cached vectors, remains of failed work."""

from .. import vector_cache
from ..rebuild_runs import clear_remains, previous_tables, retire_previous, unfinished_rebuild
from ..vector_index import drop_leftovers, leftovers
from .run import Run, Skipped

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
# The newest good run stays: it tells how long ago that was.
_RETIRE_RUNS = """
    DELETE FROM maintenance_runs
    WHERE finished_at < now() - make_interval(secs => %s)
      AND id IS DISTINCT FROM (SELECT max(id) FROM maintenance_runs WHERE success)
"""
# The newest of each index stay, and its newest of many rows: index health and predictions compare with them.
_RETIRE_BUILDS = """
    WITH numbered AS (
        SELECT id, row_number() OVER (PARTITION BY index_name ORDER BY id DESC) AS newest,
               row_number() OVER (PARTITION BY index_name, rows >= 1000 ORDER BY id DESC) AS newest_of_size
        FROM index_builds)
    DELETE FROM index_builds USING numbered
    WHERE index_builds.id = numbered.id AND index_builds.created_at < now() - make_interval(secs => %s)
      AND newest > 5 AND NOT (rows >= 1000 AND newest_of_size = 1)
"""
_MAY_RETIRE_BUILDS = "SELECT has_table_privilege('index_builds', 'DELETE')"


def prune_log(run: Run) -> str:
    keep_s = _LOG_RETENTION_FACTOR * run.settings.cache_ttl_s
    return run.remove(_PRUNE_LOG, {"keep_s": keep_s}, "rows of the write log")


def retire_metrics(run: Run) -> str:
    return run.remove(_RETIRE_METRICS, (run.plan.retention_days * 86_400,), "metrics past retention")


def retire_runs(run: Run) -> str:
    """Retire the records of runs, and where the role may those of builds of indexes."""
    keep_s = run.plan.retention_days * 86_400
    done = run.remove(_RETIRE_RUNS, (keep_s,), "runs past retention")
    before = run.rows_removed
    [(may,)] = run.connection.execute(_MAY_RETIRE_BUILDS).fetchall()
    builds = run.remove(_RETIRE_BUILDS, (keep_s,), "builds of indexes past retention") if may else ""
    return f"{done}; {builds}" if run.rows_removed > before else done


def retire_vectors(run: Run) -> str:
    if run.plan.dry_run:
        raise Skipped(f"dry run: would shrink the vector cache to {run.settings.vector_cache_mb:g} MB")
    removed = vector_cache.retire(run.connection, run.settings.vector_cache_mb)
    run.rows_removed += removed
    return f"removed {removed} cached vectors beyond {run.settings.vector_cache_mb:g} MB"


def retire_previous_tables(run: Run) -> str:
    """Drop the tables that a rebuild replaced, once nobody will roll back to them."""
    previous = previous_tables(run.connection)
    if previous is None:
        raise Skipped("no rebuild left tables to roll back to")
    days = run.settings.keep_previous_days
    if previous.age_s < days * 86_400:
        raise Skipped(f"the previous tables are kept for {days:g} days")
    if run.plan.dry_run:
        raise Skipped(f"dry run: would drop the previous tables, {previous.bytes / 1024**2:.0f} MB")
    freed = retire_previous(run.connection, days * 86_400)
    run.bytes_removed += freed
    return f"dropped the previous tables, {freed / 1024**2:.0f} MB"


def remove_leftovers(run: Run) -> str:
    """Drop what interrupted builds of indexes and rebuilds of tables left; invalid indexes slow every write."""
    names, rebuild = leftovers(run.connection), unfinished_rebuild(run.connection)
    found = [*names, *(["the tables of an unfinished rebuild"] if rebuild else [])]
    if not found:
        raise Skipped("nothing interrupted left anything")
    if run.plan.dry_run:
        raise Skipped(f"dry run: would drop {', '.join(found)}")
    if names:
        drop_leftovers(run.connection)
    if rebuild:
        run.bytes_removed += rebuild.shadow_bytes
        clear_remains(run.connection)
    return f"dropped {', '.join(found)}"
