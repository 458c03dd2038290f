"""The database session in which migrations run: alone, patient, and able to say who is in the way."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import psycopg
import sqlalchemy
from psycopg import errors as pg
from sqlalchemy import Connection, text

from .config import Settings, session_conninfo
from .errors import BusyError, PermissionDeniedError, SchemaError, VectorKeepError, from_driver
from .locks import LOCK_CLASS

logger = logging.getLogger("vectorkeep")

OnWait = Callable[[str], None]
Fetch = Callable[[str], Sequence[Any]]

_LOCK_KEY = {"class": LOCK_CLASS, "purpose": 0x6462}  # "db"
_LOCK_POLL_S = 0.1
_WATCH_POLL_S = 0.1

_TRY_LOCK = text("SELECT pg_try_advisory_lock(:class, :purpose)")
_UNLOCK = text("SELECT pg_advisory_unlock(:class, :purpose)")
_SHOW = text("SELECT current_setting(:name, true)")
_SET = text("SELECT set_config(:name, :value, false)")

# Whom the schema belongs to, where this role is another that may act as it: what a migration makes is that role's.
_OWNER = text("""
    SELECT pg_get_userbyid(relowner)::text FROM pg_class
    WHERE oid = to_regclass('alembic_version') AND pg_get_userbyid(relowner) <> current_user
      AND pg_has_role(relowner, 'SET') AND has_schema_privilege(relowner, relnamespace, 'CREATE')
""")

_SESSION = """
    pid, coalesce(nullif(application_name, ''), 'unnamed') AS application, usename AS role, state,
    extract(epoch FROM clock_timestamp() - xact_start)::bigint AS age_s
"""
_LOCK_HOLDER = text(f"""
    SELECT {_SESSION} FROM pg_stat_activity WHERE pid IN (
        SELECT pid FROM pg_locks
        WHERE locktype = 'advisory' AND granted AND objsubid = 2
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND classid = CAST(:class AS oid) AND objid = CAST(:purpose AS oid))
""")  # noqa: S608  (constants)
_BLOCKERS = f"SELECT {_SESSION} FROM pg_stat_activity WHERE pid = ANY (pg_blocking_pids(%s))"  # noqa: S608

_RIGHTS = """
    SELECT quote_ident(current_user), quote_ident(current_database()), quote_ident(current_schema()),
        EXISTS (SELECT FROM pg_extension WHERE extname = 'vector'),
        EXISTS (SELECT FROM pg_available_extensions WHERE name = 'vector'),
        has_schema_privilege(current_schema(), 'CREATE')
"""


def direct_engine(url: str, settings: Settings) -> sqlalchemy.Engine:
    """An engine that opens connections of their own to `url`, their timeouts off."""
    conninfo = session_conninfo(url, settings, maintenance=True)
    return sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(conninfo),
        poolclass=sqlalchemy.NullPool,
        use_native_hstore=False,
    )


@contextmanager
def migration_session(
    connection: Connection, *, lock_timeout_s: float, on_wait: OnWait | None = None
) -> Iterator[None]:
    """Hold the migrations' lock on `connection` as the schema's owner, the timeouts off but for `lock_timeout`.

    Role and timeouts are restored after.

    Raises SchemaError where a transaction is open: an index is built CONCURRENTLY outside one.
    """
    if connection.in_transaction():
        raise SchemaError(
            "migrations need a connection without an open transaction; pass one from engine.connect(), "
            "not from engine.begin()"
        )
    before = _configure(connection, lock_timeout_s)
    _acquire_lock(connection, on_wait)
    try:
        yield
    finally:
        if not connection.invalidated:
            connection.rollback()
            connection.execute(_UNLOCK, _LOCK_KEY)
            for name, value in before.items():
                connection.execute(_SET, {"name": name, "value": value})
            connection.commit()


def _configure(connection: Connection, lock_timeout_s: float) -> dict[str, str]:
    wanted = {
        "lock_timeout": f"{round(lock_timeout_s * 1000)}ms",
        "statement_timeout": "0",
        "idle_in_transaction_session_timeout": "0",
        "transaction_timeout": "0",  # from PostgreSQL 17
    }
    if (owner := connection.execute(_OWNER).scalar_one_or_none()) is not None:
        wanted["role"] = owner
    before = {}
    for name, value in wanted.items():
        current: str | None = connection.execute(_SHOW, {"name": name}).scalar_one()
        if current is not None:
            before[name] = current
            connection.execute(_SET, {"name": name, "value": value})
    connection.commit()
    return before


def _acquire_lock(connection: Connection, on_wait: OnWait | None) -> None:
    # Polled, and outside a transaction between the polls: a session that waits inside a statement holds a
    # snapshot, and the other upgrader's CREATE INDEX CONCURRENTLY would wait for that for ever.
    told: int | None = None
    while not connection.execute(_TRY_LOCK, _LOCK_KEY).scalar_one():
        holder = connection.execute(_LOCK_HOLDER, _LOCK_KEY).first()
        connection.commit()
        if holder is not None and holder.pid != told:
            told = holder.pid
            _tell(on_wait, f"another migration runs: {_described(holder)}")
        time.sleep(_LOCK_POLL_S)
    connection.commit()


def _described(session: Any) -> str:
    pid, application, role, state, age_s = session
    since = f", in a transaction for {age_s} s" if age_s is not None else ""
    return f"process {pid} ({application}, role {role}, {state}{since})"


def _tell(on_wait: OnWait | None, message: str) -> None:
    logger.info("migration.waits", extra={"reason": message})
    if on_wait is not None:
        on_wait(message)


class BlockerWatch:
    """Looks, from a connection of its own, at who blocks a session. `seen` is the last that did."""

    def __init__(self, url: str, settings: Settings, pid: int, on_wait: OnWait | None = None) -> None:
        self.seen = ""
        self._conninfo = session_conninfo(url, settings, maintenance=True)
        self._pid = pid
        self._on_wait = on_wait
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vectorkeep-blockers", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with psycopg.connect(self._conninfo, autocommit=True) as connection:
                told: set[int] = set()
                while not self._stop.wait(_WATCH_POLL_S):
                    self._look(connection, told)
        except psycopg.Error as exc:  # it only explains: without it the migration still runs
            logger.debug("migration.watch_failed", extra={"reason": str(exc)})

    def _look(self, connection: psycopg.Connection[Any], told: set[int]) -> None:
        blockers = connection.execute(_BLOCKERS, (self._pid,)).fetchall()
        if not blockers:
            return
        self.seen = ", ".join(_described(blocker) for blocker in blockers)
        if new := {blocker[0] for blocker in blockers} - told:
            told |= new
            _tell(self._on_wait, f"waiting for a lock of {self.seen}")


def refused(exc: psycopg.Error, fetch: Fetch) -> VectorKeepError | None:
    """What a person can do about an extension that is missing or a right that is lacking, or None.

    `fetch` runs a query on the same database, outside the transaction that failed, and returns its one row.
    """
    if not isinstance(exc, pg.InsufficientPrivilege | pg.FeatureNotSupported | pg.UndefinedFile):
        return None
    role, database, schema, extended, installed, may_create = fetch(_RIGHTS)
    if not (extended or installed):
        return SchemaError(
            "pgvector is not installed on the database server; install its package there (Debian: "
            "postgresql-NN-pgvector; container: the image pgvector/pgvector), then, as a superuser, run: "
            f"psql -d {database} -c 'CREATE EXTENSION vector'"
        )
    if not isinstance(exc, pg.InsufficientPrivilege):
        return None
    lacking = [] if extended else ["CREATE EXTENSION vector"]
    lacking += [] if may_create else [f"GRANT CREATE ON SCHEMA {schema} TO {role}"]
    if not lacking:
        return None
    message = (
        f"{exc.diag.message_primary} (role {role!r}, database {database!r}); as a superuser, or as the owner "
        f"of the database, run: psql -d {database} " + " ".join(f"-c '{command}'" for command in lacking)
    )
    return PermissionDeniedError(message) if extended else SchemaError(message)


def request_to_end(exc: BaseException, outer: BaseException | None) -> KeyboardInterrupt | SystemExit | None:
    """Ctrl-C or SIGTERM that `exc` came of, or None: what is put back after one fails on its lost connection.

    outer: what was being handled before; what came of that is no business of ours.
    """
    cause: BaseException | None = exc
    while cause is not None and cause is not outer:
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            return cause
        cause = cause.__context__
    return None


def explained(exc: BaseException, fetch: Fetch, *, lock_timeout_s: float, blockers: str) -> VectorKeepError | None:
    """The error of ours that says what to do about a migration that failed with `exc`, or None."""
    cause = exc.orig if isinstance(exc, sqlalchemy.exc.DBAPIError) else exc
    match cause:
        case pg.LockNotAvailable():
            return BusyError(
                f"waited {lock_timeout_s:g} s for a lock of {blockers or 'another session'}; run the migration "
                "again when that has finished, which is safe: it goes on where it stopped "
                "(VECTORKEEP_LOCK_TIMEOUT_S sets how long to wait)"
            )
        case pg.UniqueViolation():
            return BusyError(
                f"{cause.diag.message_primary} ({cause.diag.message_detail}): a program of an older version wrote that "
                "meanwhile; run the migration again when it has ended, which is safe"
            )
        case pg.DuplicateTable():
            return SchemaError(
                f"{cause.diag.message_primary}, and vectorkeep did not make it; 'vectorkeep migrate --adopt' "
                "takes over plain tables, or use another database"
            )
        case psycopg.Error() if ours := refused(cause, fetch):
            return ours
    return from_driver(exc)
