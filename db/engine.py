"""Connections: one pool, psycopg's, under a SQLAlchemy engine; and direct ones for maintenance."""

import logging
import select
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import orjson
import psycopg
import sqlalchemy
from psycopg import Connection, Copy, Cursor, ServerCursor, sql
from psycopg.abc import Params, Query
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg_pool import ConnectionPool, PoolTimeout
from sqlalchemy import event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.pool import NullPool

from . import vectors
from .config import Settings, redacted, session_conninfo
from .embedding_model import Model
from .errors import SchemaError, UnavailableError

logger = logging.getLogger("vectorkeep")

# A life of the store: what a snapshot, and an answer computed in it, mean anything in. After a promotion the
# timeline differs (the control file's lags). After a crash ids of aborted transactions are used again:
# statistics are reset then. After a restore of a cold copy the server was started anew. A restore in place
# makes other tables, and their primary keys only once they are filled. Roles and row security see other rows, and so
# does the same role when policies or its workspaces change: `vectorkeep_scope` tells, where any policy applies.
# Functions only, no views or subqueries: this is planned anew with every cached answer that is checked.
LIFE = sql.SQL("""
    json_build_array(
        CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END,
        (pg_stat_get_wal()).stats_reset, pg_postmaster_start_time(),
        to_regclass('write_log')::oid, to_regclass('embeddings_pkey')::oid, to_regclass('chunks_pkey')::oid,
        session_user, current_user,
        row_security_active(to_regclass('write_log')::oid),
        row_security_active(to_regclass('embeddings')::oid), row_security_active(to_regclass('chunks')::oid),
        has_table_privilege(to_regclass('embeddings'), 'SELECT'),
        has_table_privilege(to_regclass('chunks'), 'SELECT'),
        CASE WHEN row_security_active(to_regclass('embeddings')::oid)
               OR row_security_active(to_regclass('chunks')::oid) THEN vectorkeep_scope() END)::text
""")

# Names a database among all databases; a standby's has the name of its primary's.
_STORE = sql.SQL("system_identifier || '-' || (SELECT oid FROM pg_database WHERE datname = current_database())")

# An answer can be kept where the log that ends its validity can be read, all of it, or asked by the function that
# tenants have for it, and nothing is half restored.
_IDENTITY = sql.SQL("""
    SELECT {store},
           {life},
           NOT pg_is_in_recovery() AND (reads_log OR asks_log)
           AND num_nulls(to_regclass('embeddings_pkey'), to_regclass('chunks_pkey')) = 0,
           reads_log
    FROM pg_control_system(), LATERAL (
        SELECT coalesce(has_table_privilege(to_regclass('write_log'), 'SELECT'), false)
               AND coalesce(has_table_privilege(to_regclass('write_log_watermark'), 'SELECT'), false)
               AND NOT row_security_active(to_regclass('write_log')::oid) AS reads_log,
               coalesce(has_function_privilege(
                   to_regprocedure('vectorkeep_still_true(pg_snapshot, text[])'), 'EXECUTE'), false) AS asks_log
    ) AS may
""").format(store=_STORE, life=LIFE)
_WHICH_STORE = sql.SQL("SELECT {store} FROM pg_control_system()").format(store=_STORE)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which store a connection is to, and in which life of it.

    store: names the database among all databases. life: changes with a restart, a promotion, a restore, the
    role and what it may see. cacheable: answers from here may be kept; not those of a standby, nor where
    this role can neither read the whole write log (reads_log) nor ask the function that does it for tenants.
    """

    store: str
    life: str
    cacheable: bool
    reads_log: bool


# What works in the background does not queue for long for a connection that callers want, or that is not to be had.
BACKGROUND_WAIT_S = 2.0

# A connection that answered so short a time ago is asked again only where the server has said something since: it does
# where it ends a session. To ask costs every call a round trip.
_TRUSTED_S = 1.0

MIN_POSTGRES = 16
MIN_PGVECTOR = (0, 8)  # iterative index scans


class StoreConnection(Connection[Any]):
    """A pooled connection that knows what it is connected to, and when it was last known to work."""

    identity: Identity
    worked_at = float("-inf")

    def identify(self) -> None:
        [row] = self.execute(_IDENTITY, prepare=False).fetchall()
        self.identity = Identity(*row)

    def check(self) -> None:
        """Raise OperationalError where the session has been ended."""
        now = time.monotonic()
        if now - self.worked_at > _TRUSTED_S or self._is_told_something():
            ConnectionPool.check_connection(self)
            self.worked_at = now

    def _is_told_something(self) -> bool:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return bool(poll.poll(0))


class _Pool(ConnectionPool[StoreConnection]):
    """psycopg's pool, which forgets callers that gave up waiting.

    psycopg's own keeps each in its queue until a connection comes back, and with it the error that the caller got and,
    by its traceback, all that the caller had in hand: of a server that is gone for an hour, every batch that failed.
    """

    def getconn(self, timeout: float | None = None) -> StoreConnection:
        try:
            return super().getconn(timeout)
        except PoolTimeout:
            with self._lock:
                waiting = [client for client in self._waiting if client.error is None]
                self._waiting.clear()
                self._waiting.extend(waiting)
            raise


class _Dialect(PGDialect_psycopg):
    """psycopg's dialect for connections that a pool of psycopg's lends."""

    supports_statement_cache = True
    take_back: Callable[[Any], None]

    def on_connect(self) -> None:
        """No notice handler: SQLAlchemy takes each checkout for a new connection and would add one every time."""

    def initialize(self, connection: sqlalchemy.Connection) -> None:
        """Ask what server this is. Where that fails SQLAlchemy forgets the connection; the pool gets it back here."""
        lent: Any = connection.connection.dbapi_connection
        try:
            super().initialize(connection)  # type: ignore[no-untyped-call]
        except BaseException:
            lent.pgconn.finish()  # SQLAlchemy would roll back on it, while the pool may have lent it again
            self.take_back(lent)
            raise


registry.register("postgresql.vectorkeep", __name__, "_Dialect")


class _LoggingCursor(Cursor[Any]):
    """Logs every statement with its time (VECTORKEEP_DEBUG=1): of a COPY, with the rows that travel in it."""

    def execute(self, query: Query, params: Params | None = None, **kwargs: Any) -> "_LoggingCursor":
        with _logged(self, query):
            return super().execute(query, params, **kwargs)  # type: ignore[arg-type]

    def executemany(self, query: Query, params_seq: Iterable[Params], **kwargs: Any) -> None:
        with _logged(self, query):
            super().executemany(query, params_seq, **kwargs)

    @contextmanager
    def copy(self, statement: Query, params: Params | None = None, **kwargs: Any) -> Iterator[Copy]:
        with _logged(self, statement), super().copy(statement, params, **kwargs) as copy:
            yield copy


class _LoggingServerCursor(ServerCursor[Any]):
    """The same for a cursor on the server: its declaration, not the fetches."""

    def execute(self, query: Query, params: Params | None = None, **kwargs: Any) -> "_LoggingServerCursor":
        with _logged(self, query):
            return super().execute(query, params, **kwargs)


@contextmanager
def _logged(cursor: Cursor[Any], query: Query) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        elapsed_ms = (time.perf_counter() - started) * 1000
        text = query.as_string(cursor) if isinstance(query, sql.Composable) else query
        text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        logger.debug("sql %.2f ms: %s", elapsed_ms, " ".join(text.split()))


class Database:
    """The connections of one store."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url
        self.settings = settings
        self.identity: Identity | None = None  # as the newest connection saw it
        # The store's model as its calls know it, and the life of the store in which it was last seen to be that.
        self.model: Model | None = None
        self.model_life: str | None = None
        self._maintenance_url = settings.direct_url() or url
        self.pool: ConnectionPool[StoreConnection] = _Pool(
            session_conninfo(url, settings),
            connection_class=StoreConnection,
            kwargs={"autocommit": True, "prepare_threshold": settings.prepare_threshold},
            min_size=0,
            max_size=settings.pool_max,
            max_idle=settings.pool_idle_s,
            timeout=settings.pool_timeout_s,
            reconnect_timeout=settings.pool_timeout_s,
            configure=self._configure,
            # No `reset`: with one a worker takes connections back, and of a pool that is being closed it drops
            # them, open, until they are collected as garbage.
            check=StoreConnection.check,
            close_returns=True,
            name="vectorkeep",
            open=False,
        )
        self.engine = self._make_engine()

    @property
    def location(self) -> str:
        """The database URL without its password."""
        return redacted(self.url)

    def open(self) -> None:
        self.pool.open()

    def close(self) -> None:
        self.pool.close()

    @contextmanager
    def connection(self, wait_s: float | None = None) -> Iterator[StoreConnection]:
        """A pooled connection in autocommit: each statement is its own transaction.

        `wait_s`: how long to wait for one that is free; by default `pool_timeout_s`.
        """
        with self.pool.connection(wait_s) as connection:
            yield connection

    @contextmanager
    def maintenance(self) -> Iterator[Connection[Any]]:
        """A direct connection in autocommit, its timeouts off: for VACUUM, index builds, session locks.

        Raises SchemaError where `maintenance_url` leads to another database than that of the store.
        """
        with connect_directly(self._maintenance_url, self.settings) as connection:
            if self._maintenance_url != self.url and self.identity is not None:
                self._require_store(connection, self.identity.store)
            yield connection

    def _require_store(self, connection: Connection[Any], expected: str) -> None:
        [(actual,)] = connection.execute(_WHICH_STORE).fetchall()
        if actual != expected:
            raise SchemaError(
                f"maintenance_url leads to another database, {redacted(self._maintenance_url)}, than that of the "
                f"store, {self.location}; with a database_url of your own give a maintenance_url beside it, or None"
            )

    def identify(self, connection: StoreConnection) -> None:
        """Ask again what `connection` is connected to: something there has changed."""
        connection.identify()
        self.identity = connection.identity

    def _configure(self, connection: StoreConnection) -> None:
        adapt(connection, debug=self.settings.debug)
        self.identify(connection)

    def _make_engine(self) -> sqlalchemy.Engine:
        engine = sqlalchemy.create_engine(
            "postgresql+vectorkeep://", poolclass=NullPool, creator=self._checkout, use_native_hstore=False
        )
        event.listen(engine, "close", self._give_back)
        cast(_Dialect, engine.dialect).take_back = self.pool.putconn
        return engine

    def _checkout(self) -> Any:
        connection = self.pool.getconn()
        connection.autocommit = False  # SQLAlchemy counts on psycopg to begin its transactions
        return connection

    def _give_back(self, connection: Any, _record: Any) -> None:
        # psycopg's close(), which comes next, gives a live connection back, but returns at once on one that the
        # server killed: the pool would count it as lent for ever.
        if connection.closed:
            self.pool.putconn(cast(StoreConnection, connection))
            return
        with suppress(psycopg.Error):  # one that fails is found broken, and not kept
            connection.rollback()
            connection.autocommit = True


def adapt(connection: Connection[Any], *, debug: bool = False) -> None:
    """Teach `connection` our vectors and a fast, exact JSON."""
    vectors.register(connection)
    set_json_loads(orjson.loads, connection)
    set_json_dumps(orjson.dumps, connection)
    if debug:
        connection.cursor_factory = _LoggingCursor
        connection.server_cursor_factory = _LoggingServerCursor


def require_versions(connection: Connection[Any]) -> None:
    """Raise SchemaError where the server or pgvector is older than what searches and statistics need."""
    row = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    pgvector = tuple(int(part) for part in row[0].split(".")[:2]) if row else (0, 0)
    if connection.info.server_version < MIN_POSTGRES * 10_000 or pgvector < MIN_PGVECTOR:
        raise SchemaError(
            f"the server is PostgreSQL {connection.info.server_version // 10_000} with pgvector "
            f"{row[0] if row else 'missing'}; expected at least {MIN_POSTGRES} with "
            f"{'.'.join(map(str, MIN_PGVECTOR))}: install the newer package, then ALTER EXTENSION vector UPDATE"
        )


def connect_directly(url: str, settings: Settings) -> Connection[Any]:
    """A direct connection in autocommit, its timeouts off. Raises UnavailableError."""
    try:
        connection = psycopg.connect(session_conninfo(url, settings, maintenance=True), autocommit=True)
    except psycopg.OperationalError as exc:
        raise UnavailableError(f"cannot connect to PostgreSQL: {str(exc).strip()}") from exc
    adapt(connection, debug=settings.debug)
    return connection
