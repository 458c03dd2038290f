"""Write transactions: one way for every write, so that none forgets the write log, a retry or the cache.

A transaction begins with the writers' shared lock, does its work, logs what it touched in `write_log`
within itself, commits, and then tells the cache. Transient faults run the whole of it again.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any, TypeVar, cast

import psycopg
import sqlalchemy
import stamina
from psycopg import Connection, Cursor, sql
from psycopg import errors as pg

from . import faults
from .embedding_model import Model
from .engine import Database
from .errors import PausedError, UnavailableError, is_transient
from .locks import LOCK_CLASS, Purpose
from .pause import current_pause

logger = logging.getLogger("vectorkeep")

T = TypeVar("T")
R = TypeVar("R")

# A transaction that touches more sources and workspaces than this is logged as touching everything.
MAX_TAGS = 200
EVERYTHING = "all"

# A lock is waited for a little shorter than a statement may take: what is held by others is told from what is slow.
# Two statements in one message: the second's snapshot is younger than the lock, so a pause that was taken, or a model
# that the store was moved to, while this one waited is seen.
_LOCK_WRITERS = sql.SQL("""
    SELECT set_config('lock_timeout', {}, true), pg_advisory_xact_lock_shared({}, {});
    SELECT EXISTS (SELECT FROM ingestion_pause), model_id, dimensions, distance
    FROM (SELECT) AS one LEFT JOIN embedding_models ON active
""")
_UNLIMITED = "SET LOCAL statement_timeout = 0"
_LOG_WRITE = "INSERT INTO write_log (tags) VALUES (%s) RETURNING id, xid::text, now()::text"
_IS_RUNNING = "SELECT pg_xact_status(%s::xid8) IS NOT DISTINCT FROM 'in progress'"
_IS_LOGGED = "SELECT EXISTS (SELECT FROM write_log WHERE id = %s AND xid = %s::xid8 AND created_at = %s::timestamptz)"
_HAS_NUMBERS = "SELECT EXISTS (SELECT FROM write_log WHERE id = %s AND xid = %s::xid8)"
_POLL_S = 0.05
_PAUSE_POLL_S = 0.25


def source_tag(source_id: str) -> str:
    return f"source:{source_id}"


def workspace_tag(workspace: str) -> str:
    return f"workspace:{workspace}"


def bounded_tags(tags: Iterable[str]) -> list[str]:
    """The tags to log, sorted: what was touched, or that everything was where that is too much to list."""
    tags = set(tags)
    return sorted(tags | {"store"}) if len(tags) <= MAX_TAGS else [EVERYTHING, "store"]


@dataclass
class WriteTransaction:
    """What a write works with: a cursor, and a note of what it touched."""

    cursor: Cursor[Any]
    tags: set[str] = field(default_factory=set)
    wrote: bool = False

    def touch(self, source_id: str | None, workspace: str | None) -> None:
        """Note that a row of this source and workspace is, or was, changed."""
        self.wrote = True
        if source_id is not None:
            self.tags.add(source_tag(source_id))
        if workspace is not None:
            self.tags.add(workspace_tag(workspace))


@dataclass(frozen=True, slots=True)
class LoggedWrite:
    """A committed row of write_log, to be delivered to the cache."""

    id: int
    tags: list[str]


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What a transaction that was about to commit would have returned."""

    xid: str
    created_at: str
    life: str
    outcome: Any
    logged: LoggedWrite


class _CommitUnknown(Exception):  # noqa: N818
    """The connection was lost during COMMIT: whether it happened is not known yet."""

    def __init__(self, attempt: _Attempt, lost: psycopg.OperationalError) -> None:
        self.attempt = attempt
        self.lost = lost


def retried(work: Callable[[], R]) -> R:
    """`work()`, run again with backoff and jitter where a transient fault stopped it."""
    for attempt in stamina.retry_context(on=is_transient, attempts=6, timeout=30, wait_initial=0.05, wait_max=2):
        with attempt:
            return work()
    raise AssertionError("unreachable: the last attempt returns or raises")


def run_write(
    database: Database,
    work: Callable[[WriteTransaction], T],
    *,
    after_commit: Callable[[LoggedWrite], None],
    unlimited: bool = False,
    stopped: Event | None = None,
) -> T:
    """Run `work` in one transaction and return what it returned, for certain committed.

    `work` may run several times and must have no effect outside its transaction. `after_commit` is called
    once, with the logged write, where anything was touched. `unlimited`: its statements may take any time, where
    nobody can tell how many rows there are; for locks it waits no longer than any other. Once `stopped` is set it waits
    for the end of a pause no more.

    Raises PausedError while ingestion is paused; with the setting `on_pause` "wait", once `pause_wait_s` are over.
    """
    outcome, logged = waiting_for_resume(
        lambda: retried(lambda: _run_once(database, work, unlimited)), database, stopped
    )
    if logged is not None:
        faults.point("write.committed")
        after_commit(logged)
        faults.point("write.told")
    return outcome


@contextmanager
def unlimited_reading(database: Database) -> Iterator[Connection[Any]]:
    """A pooled connection whose statements may take any time, in a transaction that takes no writers' lock."""
    with database.connection() as connection, connection.transaction():
        connection.execute(_UNLIMITED)
        yield connection


@contextmanager
def begin_write(database: Database) -> Iterator[sqlalchemy.Connection]:
    """A transaction of the caller's own that has joined the writers; it commits at the end of the block.

    Waits for the end of a pause, where the setting `on_pause` says so, with no transaction open and no connection
    held: a session that waits inside one would be ended by the server. Raises as `_lock_writers` does.
    """
    with ExitStack() as begun:

        def begin() -> sqlalchemy.Connection:
            with ExitStack() as attempt:
                connection = attempt.enter_context(database.engine.begin())
                driver = cast(Connection[Any], connection.connection.driver_connection)
                with driver.cursor() as cursor:
                    _lock_writers(cursor, database)
                begun.push(attempt.pop_all())
                return connection

        yield waiting_for_resume(lambda: retried(begin), database)


def log_write(connection: sqlalchemy.Connection, tags: Sequence[str]) -> LoggedWrite:
    """Insert the write-log row of a caller's own transaction."""
    [(log_id, *_)] = connection.exec_driver_sql(_LOG_WRITE, (list(tags),)).all()
    return LoggedWrite(log_id, list(tags))


def waiting_for_resume(write: Callable[[], R], database: Database, stopped: Event | None = None) -> R:
    """`write()`, tried again when a pause ends, where the setting `on_pause` says so. Raises PausedError."""
    settings, stopped = database.settings, stopped or Event()
    deadline = time.monotonic() + settings.pause_wait_s
    while True:
        try:
            return write()
        except PausedError as exc:
            if settings.on_pause == "raise":
                raise
            paused = exc
        logger.info("write.waits_for_resume", extra={"reason": str(paused)})
        while retried(lambda: _is_paused(database)):
            if time.monotonic() >= deadline:
                raise PausedError(f"waited {settings.pause_wait_s:g} s: {paused}") from paused
            if stopped.wait(_PAUSE_POLL_S):
                raise paused


def _is_paused(database: Database) -> bool:
    with database.connection() as connection:
        return current_pause(connection) is not None


def _run_once(
    database: Database, work: Callable[[WriteTransaction], T], unlimited: bool
) -> tuple[T, LoggedWrite | None]:
    try:
        return _transact(database, work, unlimited)
    except _CommitUnknown as exc:
        if _committed(database, exc.attempt):
            logger.info("write.commit_confirmed", extra={"xid": exc.attempt.xid})
            return exc.attempt.outcome, exc.attempt.logged
        raise exc.lost from None


def _lock_writers(cursor: Cursor[Any], database: Database) -> None:
    """Join the writers, or raise PausedError; SchemaError where the store was moved to another model.

    A wait that is cut off is no refusal of what is to be written: it gets its own error.
    """
    try:
        lock_timeout_ms = max(1, int(900 * database.settings.statement_timeout_s))
        statements = _LOCK_WRITERS.format(str(lock_timeout_ms), LOCK_CLASS, int(Purpose.WRITERS))
        cursor.execute(statements, prepare=False)  # several at once cannot be prepared
    except (pg.QueryCanceled, pg.LockNotAvailable) as exc:
        raise UnavailableError(
            "writers are locked out by a session that keeps them all waiting; try again when it has finished"
        ) from exc
    cursor.nextset()
    [(any_pause, *active)] = cursor.fetchall()
    if any_pause and (pause := current_pause(cursor.connection)):
        raise pause.error()
    if database.model is not None:
        database.model.require_active(Model(*active) if active[0] is not None else None)


def _transact(
    database: Database, work: Callable[[WriteTransaction], T], unlimited: bool
) -> tuple[T, LoggedWrite | None]:
    with database.connection() as connection:
        attempt: _Attempt | None = None
        try:
            with connection.transaction(), connection.cursor() as cursor:
                _lock_writers(cursor, database)
                if unlimited:
                    cursor.execute(_UNLIMITED)
                transaction = WriteTransaction(cursor)
                outcome = work(transaction)
                if not transaction.wrote:
                    return outcome, None
                tags = bounded_tags(transaction.tags)
                [(log_id, xid, created_at)] = cursor.execute(_LOG_WRITE, (tags,)).fetchall()
                attempt = _Attempt(xid, created_at, connection.identity.life, outcome, LoggedWrite(log_id, tags))
                faults.point("write.logged")
        except pg.LockNotAvailable as exc:
            raise UnavailableError(
                f"another session holds rows that this would write: {exc.diag.message_primary}; try again later"
            ) from exc
        except psycopg.OperationalError as exc:
            # Only COMMIT is left once there is an attempt: a lost connection leaves its outcome open.
            if attempt is not None and connection.closed:
                raise _CommitUnknown(attempt, exc) from exc
            raise
    return attempt.outcome, attempt.logged


def _committed(database: Database, attempt: _Attempt) -> bool:
    """Whether `attempt` committed: its own row in the log tells. Waits while its backend is still at it.

    The status of its transaction id would not do, nor that and the row's: a crash forgets both numbers together, and
    another write gets them again. It has another time.
    """
    deadline = time.monotonic() + database.settings.statement_timeout_s
    while True:
        logged, running = retried(lambda: _is_logged(database, attempt))
        if logged or not running or time.monotonic() > deadline:
            return logged
        time.sleep(_POLL_S)


def _is_logged(database: Database, attempt: _Attempt) -> tuple[bool, bool]:
    """Whether `attempt` is in the log, and whether it was still running before that was asked."""
    with database.connection() as connection:
        try:
            [(running,)] = connection.execute(_IS_RUNNING, (attempt.xid,)).fetchall()
        except pg.InvalidParameterValue:  # an id of the future: a crash has undone it
            running = False
        numbers = (attempt.logged.id, attempt.xid)
        try:
            [(logged,)] = connection.execute(_IS_LOGGED, (*numbers, attempt.created_at)).fetchall()
        except pg.InsufficientPrivilege:  # a tenant's login may not read the time: after a crash it writes again
            [(logged,)] = connection.execute(_HAS_NUMBERS, numbers).fetchall()
            database.identify(connection)  # a pooler keeps the connection and changes the server's session
            logged = logged and connection.identity.life == attempt.life
        return logged, running
