"""The swap: in one short transaction the shadow's tables take the live ones' names, and these are kept aside.

A table moves with its indexes and constraints from schema to schema: no name changes. Searches that run are waited
for a moment at a time, and those that come wait no longer than that; each sees the old tables or the new ones.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from psycopg import Connection
from psycopg import errors as pg
from psycopg.sql import SQL, Identifier

from . import faults, table_dress
from .embedding_model import Model
from .errors import BusyError
from .locks import LOCK_CLASS, Purpose, limit_lock_waits
from .migration_session import BlockerWatch
from .opening import OpenParts
from .pause import current_pause
from .registry import active_model
from .shadow import SHADOW, TABLES, definitions_of, in_shadow
from .transactions import EVERYTHING, LoggedWrite

logger = logging.getLogger("vectorkeep")

PREVIOUS = "vectorkeep_previous"

# Shorter than PostgreSQL's own deadlock_timeout: where a search holds one table and wants the other, the swap gives
# way before anybody is ended.
_STINTS_S = (0.05, 0.1, 0.2, 0.4, 0.8)
_REST_S = 0.05

_LOCK = SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE")
_MOVE = SQL("ALTER TABLE {} SET SCHEMA {}")
_WRITES_SINCE = "SELECT count(*) FROM write_log WHERE id > %s"
_SERIALS = """
    SELECT objid::regclass::text, quote_ident(attname)
    FROM pg_depend
    JOIN pg_class ON pg_class.oid = objid AND relkind = 'S'
    JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
    WHERE classid = 'pg_class'::regclass AND refobjid = %s::regclass AND deptype = 'a'
"""
_IDENTITIES = """
    SELECT pg_get_serial_sequence(%(live)s, attname), pg_get_serial_sequence(%(shadow)s, attname)
    FROM pg_attribute WHERE attrelid = %(live)s::regclass AND attidentity <> '' AND NOT attisdropped
"""
_ACTIVATE = """
    INSERT INTO embedding_models (model_id, dimensions, distance, active) VALUES (%s, %s, %s, true)
    ON CONFLICT (model_id) DO UPDATE
    SET dimensions = EXCLUDED.dimensions, distance = EXCLUDED.distance, active = EXCLUDED.active
"""
_LOG = "INSERT INTO write_log (tags) VALUES (%s) RETURNING id"


# Autovacuum gives way to who waits for longer than deadlock_timeout, and no stint is that long. A lock that keeps out
# vacuum alone can be waited for: nobody queues behind it.
_PATIENT = """
    SELECT set_config('lock_timeout', (setting::int + 200)::text, true)
    FROM pg_settings WHERE name = 'deadlock_timeout'
"""
_KEEP_VACUUM_OUT = SQL("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE").format(SQL(", ").join(map(Identifier, TABLES)))


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is to be exchanged, and what must still be so in the transaction that does it.

    home: the live tables' schema. definitions: `definitions_of` them from before they were copied. after_log_id: the
    last write that the shadow's contents know of. pause_pid: the session whose pause keeps writers out.
    """

    home: str
    definitions: Mapping[str, str]
    before: Model | None
    after: Model | None
    after_log_id: int
    pause_pid: int


@dataclass
class Swap:
    """One exchange, and what comes after it. done: it is committed, whatever fails from then on."""

    parts: OpenParts
    lead: Connection[Any]
    what: Exchange
    done: bool = False
    ms: float = 0

    def run(self, *, wait_s: float, conclude: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> None:
        """`exchange`, with a watch on who is in the way; then tell Redis. Raises only what stopped the exchange."""
        try:
            self._run(wait_s, conclude, prepare)
        except Exception as exc:  # a person who interrupts is heard even so
            if not self.done:
                raise
            logger.warning("swap.aftermath_failed", extra={"reason": f"{type(exc).__name__}: {exc}"})

    def _run(self, wait_s: float, conclude: Callable[[], None], prepare: Callable[[], None]) -> None:
        database = self.parts.database
        url = database.settings.direct_url() or database.url
        started = time.monotonic()
        with ExitStack() as stack:
            watch = stack.enter_context(BlockerWatch(url, database.settings, self.lead.info.backend_pid))
            logged = exchange(
                self.lead, self.what, wait_s=wait_s, blockers=lambda: watch.seen, prepare=prepare, conclude=conclude
            )
            self.done = True
            self.ms = (time.monotonic() - started) * 1000
            stack.callback(self.parts.after_commit, logged)
            faults.point("rebuild.swapped")


def exchange(
    connection: Connection[Any],
    what: Exchange,
    *,
    wait_s: float,
    blockers: Callable[[], str],
    prepare: Callable[[], None] = lambda: None,
    conclude: Callable[[], None] = lambda: None,
) -> LoggedWrite:
    """Exchange live and shadow tables; the live ones go where PREVIOUS is, what was there is dropped.

    `prepare` and `conclude` run in the same transaction, first and last. Raises BusyError where the tables' locks
    were not to be had within `wait_s`, or where something was written or altered since: nothing was changed then.
    """
    deadline = time.monotonic() + wait_s
    for attempt in range(1_000_000):
        stint_s = _STINTS_S[min(attempt, len(_STINTS_S) - 1)]
        try:
            with connection.transaction():
                connection.execute(_PATIENT)
                connection.execute(_KEEP_VACUUM_OUT)
                limit_lock_waits(connection, stint_s)
                prepare()
                logged = _exchange(connection, what)
                conclude()
                faults.point("swap.before_commit")
            return logged
        except pg.LockNotAvailable as exc:
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"waited {wait_s:g} s for the tables, which are in use by {blockers() or 'other sessions'}; "
                    "nothing was changed: end those, or give it longer"
                ) from exc
        time.sleep(_REST_S)
    raise AssertionError("unreachable: the deadline passes first")


def _exchange(connection: Connection[Any], what: Exchange) -> LoggedWrite:
    connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_CLASS, int(Purpose.WRITERS)))
    names = [Identifier(table) for table in TABLES] + [in_shadow(table) for table in TABLES]
    connection.execute(_LOCK.format(SQL(", ").join(names)))
    _check_unchanged(connection, what)
    dress = [statement for table in TABLES for statement in table_dress.dress_of(connection, table)]
    serials = [(table, *row) for table in TABLES for row in connection.execute(_SERIALS, (table,)).fetchall()]
    for _, sequence, _ in serials:
        connection.execute(f"ALTER SEQUENCE {sequence} OWNED BY NONE".encode())
    _carry_identities(connection)
    for table in reversed(TABLES):
        connection.execute(SQL("DROP TABLE IF EXISTS {}").format(Identifier(PREVIOUS, table)))
    for table in TABLES:
        connection.execute(_MOVE.format(Identifier(table), Identifier(PREVIOUS)))
        connection.execute(f"ALTER TABLE {SHADOW}.{table} SET SCHEMA {what.home}".encode())
    for table, sequence, column in serials:
        connection.execute(f"ALTER SEQUENCE {sequence} OWNED BY {table}.{column}".encode())
    for table in TABLES:
        table_dress.strip(connection, table)
    table_dress.run(connection, dress)
    if what.before != what.after:
        _switch_model(connection, what.after)
    tags = [EVERYTHING, "store"]
    [(log_id,)] = connection.execute(_LOG, (tags,)).fetchall()
    return LoggedWrite(log_id, tags)


def _check_unchanged(connection: Connection[Any], what: Exchange) -> None:
    pause = current_pause(connection)
    writes = writes_since(connection, what.after_log_id)
    if pause is None or pause.owner_pid != what.pause_pid or writes:
        raise BusyError(
            f"ingestion did not stay paused while the new tables were filled ({writes} writes since); "
            "nothing was changed: run it again, and do not resume meanwhile"
        )
    if (active := active_model(connection)) != what.before:
        raise BusyError(f"the store's model became {active} meanwhile; nothing was changed: run it again")
    if altered := {name for name, _ in what.definitions.items() ^ definitions_of(connection).items()}:
        raise BusyError(
            f"the live tables were altered meanwhile: {', '.join(sorted(altered))}; nothing was changed: run it again"
        )


def writes_since(connection: Connection[Any], log_id: int) -> int:
    """How many write transactions were logged after the row `log_id`."""
    [(count,)] = connection.execute(_WRITES_SINCE, (log_id,)).fetchall()
    return int(count)


def _carry_identities(connection: Connection[Any]) -> None:
    """New rows go on counting where the live tables' identity columns are."""
    for table in TABLES:
        names = {"live": table, "shadow": f"{SHADOW}.{table}"}
        for live, shadow in connection.execute(_IDENTITIES, names).fetchall():
            statement = f"SELECT setval('{shadow}', last_value, is_called) FROM {live}"  # noqa: S608  (quoted names)
            connection.execute(statement.encode())


def _switch_model(connection: Connection[Any], model: Model | None) -> None:
    connection.execute("UPDATE embedding_models SET active = false WHERE active")
    if model is not None:
        connection.execute(_ACTIVATE, (model.model_id, model.dimensions, model.distance))
