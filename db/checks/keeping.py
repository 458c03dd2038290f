"""What should be done now and then, and what was begun and not ended."""

from collections.abc import Iterator

from ..errors import BusyError
from ..pause import lapsed_pause, recorded_pause
from ..rebuild_runs import clear_remains, unfinished_rebuild
from .base import Examination, Found, Needs, age, check, ok, warn

_LAST_RUNS = """
    SELECT extract(epoch FROM now() - max(finished_at) FILTER (WHERE success))::float8,
           extract(epoch FROM now() - (SELECT min(created_at) FROM embedding_models))::float8,
           (SELECT string_agg(step || ' ' || outcome, ', ' ORDER BY step)
            FROM (SELECT success, details FROM maintenance_runs WHERE operation = 'maintain'
                  ORDER BY finished_at DESC LIMIT 1) AS last, jsonb_each_text(details) AS steps (step, outcome)
            WHERE NOT success AND outcome NOT IN ('done', 'skipped'))
    FROM maintenance_runs WHERE operation = 'maintain'
"""


# Only the one that was looked at: another may have been taken meanwhile.
_END_PAUSE = "DELETE FROM ingestion_pause WHERE paused_at = %s"


@check("maintenance", Needs.SCHEMA, "'vectorkeep maintain' ended well within the last week")
def maintenance(examination: Examination) -> Iterator[Found]:
    [(last_s, store_s, failed)] = examination.rows(_LAST_RUNS)
    limit_s = examination.limits.maintenance_days * 86_400
    remedy = "vectorkeep maintain, daily from cron, as the owner of the tables"
    tried = f"; the last try: {failed}" if failed else ""
    if last_s is not None:
        found = f"ended well {age(last_s)} ago{tried}"
        yield warn(found, remedy) if last_s > limit_s else ok(found)
    elif (store_s or 0) > limit_s:
        yield warn(f"never ended well on this store, which is {age(store_s)} old{tried}", remedy)
    else:
        yield ok("not due yet: the store is young")


@check(
    "pause",
    Needs.SCHEMA,
    "ingestion is not paused by somebody who is gone",
    fix="resumes it",
)
def pause(examination: Examination) -> Iterator[Found]:
    recorded = recorded_pause(examination.connection)
    if recorded is None:
        yield ok("ingestion is not paused")
        return
    if (lapsed := lapsed_pause(examination.connection)) is None:
        yield ok(f"ingestion is paused {recorded}")
        return

    def mend() -> str:
        with examination.mending() as connection:
            if not connection.execute(_END_PAUSE, (lapsed.paused_at,)).rowcount:
                raise BusyError("another pause was taken meanwhile")
        return "resumed"

    yield warn(f"a pause of ingestion was left {lapsed}; it stops nobody any more", "vectorkeep resume", mend=mend)


@check(
    "rebuild",
    Needs.SCHEMA,
    "no rebuild was left unfinished",
    fix="drops its shadow tables; the live ones are as they were",
    fine="no rebuild is unfinished",
)
def rebuild(examination: Examination) -> Iterator[Found]:
    def mend() -> str:
        with examination.mending() as connection:
            cleared = clear_remains(connection)
        return f"cleared: {cleared}"

    if (left := unfinished_rebuild(examination.connection)) is not None:
        store = "the store is as it was before" if left.state else "it had ended, and the store lacks nothing"
        yield warn(f"a rebuild was {left}; {store}", "vectorkeep doctor --fix", mend=mend)


CHECKS = (maintenance, pause, rebuild)
