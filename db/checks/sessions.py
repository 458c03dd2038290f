"""Sessions: what waits, what holds others up, what keeps vacuum from its work."""

from collections.abc import Iterator

from psycopg import sql

from ..errors import BusyError
from ..locks import LOCK_CLASS, SYNC_CLASS
from ..psql import psql
from .base import Examination, Found, Needs, age, check, megabytes, ok, warn

_IDLE_OURS = """
    SELECT pid, backend_start, state_change, application_name, usename,
           extract(epoch FROM clock_timestamp() - state_change)::float8
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE 'vectorkeep%%'
      AND state LIKE 'idle in transaction%%' AND extract(epoch FROM clock_timestamp() - state_change)::float8 > %s
    ORDER BY state_change
"""
# Asked again while it is ended: it may have gone on since, and be idle in another transaction.
_END = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE pid = %s AND backend_start = %s AND state_change = %s AND state LIKE 'idle in transaction%%'
"""
_BLOCKED = """
    SELECT waiting.pid, waiting.application_name, extract(epoch FROM clock_timestamp() - waiting.query_start)::float8,
           blocker.pid, blocker.application_name, blocker.usename, coalesce(blocker.state, 'unknown')
    FROM pg_stat_activity AS waiting
    CROSS JOIN unnest(pg_blocking_pids(waiting.pid)) AS blocking (pid)
    LEFT JOIN pg_stat_activity AS blocker ON blocker.pid = blocking.pid
    WHERE waiting.datname = current_database() AND waiting.wait_event_type = 'Lock'
      AND extract(epoch FROM clock_timestamp() - waiting.query_start)::float8 > %s
    ORDER BY 3 DESC LIMIT 10
"""
_LONG = """
    SELECT pid, coalesce(nullif(application_name, ''), 'unnamed'), usename, state,
           extract(epoch FROM clock_timestamp() - xact_start)::float8
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_xmin IS NOT NULL
      AND backend_type = 'client backend'
      AND extract(epoch FROM clock_timestamp() - xact_start)::float8 > %s
    ORDER BY xact_start LIMIT 10
"""
_PREPARED = """
    SELECT gid, owner, extract(epoch FROM clock_timestamp() - prepared)::float8 FROM pg_prepared_xacts
    WHERE database = current_database() AND extract(epoch FROM clock_timestamp() - prepared)::float8 > %s
    ORDER BY prepared
"""
_SLOTS = """
    SELECT slot_name, active, xmin IS NOT NULL OR catalog_xmin IS NOT NULL,
           coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint
    FROM pg_replication_slots WHERE NOT pg_is_in_recovery() ORDER BY slot_name
"""
_IDLE_HOLDERS = """
    SELECT DISTINCT activity.pid, activity.application_name, activity.usename, activity.client_addr::text,
           extract(epoch FROM clock_timestamp() - activity.state_change)::float8, activity.backend_start
    FROM pg_locks AS lock JOIN pg_stat_activity AS activity USING (pid)
    WHERE lock.locktype = 'advisory' AND lock.granted AND lock.objsubid = 2
      AND lock.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND lock.classid IN (%s::oid, %s::oid)
      AND activity.state LIKE 'idle%%' AND extract(epoch FROM clock_timestamp() - activity.state_change)::float8 > %s
    ORDER BY 5 DESC
"""


@check(
    "idle transactions",
    Needs.SERVER,
    "no session of ours sits idle in a transaction",
    fix="ends those that have been idle for ten minutes",
    fine="no session of ours is idle in a transaction",
)
def idle_transactions(examination: Examination) -> Iterator[Found]:
    settings, limit_s = examination.settings, examination.limits.idle_transaction_s
    patience_s = min(settings.idle_in_transaction_timeout_s, limit_s)
    for pid, started, since, application, user, idle_s in examination.rows(_IDLE_OURS, patience_s):

        def mend(pid: int = pid, started: object = started, since: object = since) -> str:
            ended = examination.rows(_END, pid, started, since)
            if not ended or not ended[0][0]:
                raise BusyError("it went on meanwhile")
            return f"process {pid} ended"

        yield warn(
            f"process {pid} ({application}, {user}) has been idle in a transaction for {age(idle_s)}",
            f"vectorkeep doctor --fix after {age(limit_s)}, or {_terminate(pid)}",
            subject=str(pid),
            mend=mend if idle_s > limit_s else None,
        )


@check("blockers", Needs.SERVER, "nobody waits for another session's lock for long", fine="nobody waits for a lock")
def blockers(examination: Examination) -> Iterator[Found]:
    for pid, application, waited_s, blocker, name, user, state in examination.rows(
        _BLOCKED, examination.limits.blocked_s
    ):
        who = f"process {blocker} ({name or 'unnamed'}, {user}, {state})" if blocker else "a prepared transaction"
        yield warn(
            f"process {pid} ({application or 'unnamed'}) has waited {age(waited_s)} for a lock of {who}",
            f"let it finish, or {_terminate(blocker)}" if blocker else "ROLLBACK PREPARED",
        )


@check(
    "long transactions",
    Needs.SERVER,
    "no transaction has been open for long: vacuum cannot remove what it may still see",
    fine="no transaction has been open for long",
)
def long_transactions(examination: Examination) -> Iterator[Found]:
    for pid, application, user, state, open_s in examination.rows(_LONG, examination.limits.long_transaction_s):
        yield warn(
            f"process {pid} ({application}, {user}, {state}) has had a transaction open for {age(open_s)}: "
            "vacuum removes nothing that died since",
            f"let it finish, or {_terminate(pid)}",
        )


@check(
    "prepared transactions",
    Needs.SERVER,
    "no prepared transaction was forgotten: it holds its locks and holds back vacuum, restarts included",
    fine="no prepared transaction is open",
)
def prepared_transactions(examination: Examination) -> Iterator[Found]:
    for gid, owner, open_s in examination.rows(_PREPARED, examination.limits.prepared_transaction_s):
        rollback = f"ROLLBACK PREPARED {sql.Literal(gid).as_string()}"
        yield warn(
            f"the transaction {gid!r} of {owner} has been prepared for {age(open_s)} and not ended",
            f"ask its owner, then {psql(rollback)} (or COMMIT PREPARED)",
        )


@check(
    "replication slots",
    Needs.SERVER,
    "no replication slot that nobody reads holds back vacuum or keeps WAL",
)
def replication_slots(examination: Examination) -> Iterator[Found]:
    slots = examination.rows(_SLOTS)
    for name, active, holds_vacuum, kept_bytes in slots:
        too_much = kept_bytes > examination.limits.slot_bytes
        if (active or not holds_vacuum) and not too_much:
            continue
        holding = " and holds back vacuum" if holds_vacuum else ""
        drop = f"SELECT pg_drop_replication_slot('{name}')"
        yield warn(
            f"the slot {name} ({'in use' if active else 'nobody reads it'}) keeps {megabytes(kept_bytes)} of WAL"
            f"{holding}",
            f"start its reader, or {psql(drop)}",
        )
    if slots:
        yield ok(f"{len(slots)} slots: {', '.join(slot[0] for slot in slots)}")
    else:
        yield ok("there are none")


@check(
    "advisory locks",
    Needs.SERVER,
    "no lock of ours is held by a session that has done nothing for an hour",
    fine="no lock of ours is held by an idle session",
)
def advisory_locks(examination: Examination) -> Iterator[Found]:
    limits = examination.limits
    for pid, application, user, address, idle_s, _ in examination.rows(
        _IDLE_HOLDERS, LOCK_CLASS, SYNC_CLASS, limits.idle_lock_s
    ):
        yield warn(
            f"process {pid} ({application or 'unnamed'}, {user}, {address or 'local'}) holds a lock of ours and "
            f"has been idle for {age(idle_s)}: a bulk load or a sync that works, or a program that hangs",
            f"look at that program; if it is gone, {_terminate(pid)}",
        )


@check("privileges", Needs.SERVER, "this role sees the sessions of all roles, which the checks above need")
def privileges(examination: Examination) -> Iterator[Found]:
    if examination.sees_all_sessions:
        yield ok("all sessions are seen")
        return
    hidden = examination.value("""
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND NOT pg_has_role(usesysid, 'USAGE')
    """)
    if hidden:
        yield warn(
            f"not permitted to see what {hidden} sessions of other roles do: they were left out",
            "psql -c 'GRANT pg_read_all_stats TO <this role>', as a superuser",
        )
    else:
        yield ok("no other role has a session here")


CHECKS = (
    idle_transactions,
    blockers,
    long_transactions,
    prepared_transactions,
    replication_slots,
    advisory_locks,
    privileges,
)


def _terminate(pid: int) -> str:
    return psql(f"SELECT pg_terminate_backend({pid})")
