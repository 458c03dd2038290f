"""The factory state: what the migrations made is dropped and made again, empty; embedded servers lose their folder.

Only what is this store's goes: tables that the migrations made, in a database that they are known to have made,
and the keys of this database in Redis.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from psycopg import Connection, sql
from psycopg import errors as pg

from . import embedded, migrate, redis_client
from .config import Settings, redacted
from .embedded_server import DATABASE
from .engine import Database, connect_directly
from .errors import BusyError, SchemaError, UnavailableError, ValidationError, translated
from .locks import LOCK_CLASS, PAUSE_CLASS, limit_lock_waits
from .models import Base
from .shadow import SHADOW
from .swap import PREVIOUS

__all__ = ["ResetPlan", "ResetResult", "plan_reset", "reset"]

logger = logging.getLogger("vectorkeep")

# Redis is walked for keys of this store for so long and no longer; what is left is never found again, and expires.
_CLEAR_AT_MOST_S = 5.0
_KEYS_A_SCAN = 1000
_REDIS_PATIENCE_S = 2.0

_OTHERS = [table.name for table in Base.metadata.sorted_tables if table.name not in ("embeddings", "chunks")]
_TABLES = ["embeddings", "chunks", *_OTHERS]
_PRESENT = """
    SELECT name, pg_total_relation_size(to_regclass(name)) FROM unnest(%s::text[]) AS name
    WHERE to_regclass(name) IS NOT NULL
"""
# What rebuilds left, and what they replaced.
_REBUILT = (SHADOW, PREVIOUS)
_PRESENT_IN = """
    SELECT nspname, relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = ANY(%s) AND relname = ANY(%s) AND relkind = 'r'
"""
_SCHEMAS = "SELECT nspname FROM pg_namespace WHERE nspname = ANY(%s)"
# Columns that somebody added: they go with their table.
_STRANGE_COLUMNS = """
    SELECT relname || '.' || attname FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    WHERE attnum > 0 AND NOT attisdropped
      AND attrelid IN (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name)
      AND NOT relname || '.' || attname = ANY(%s)
    ORDER BY 1
"""
# Ours by name, by a lock of ours, or because they use a table of ours. Names and locks are seen by every role; the
# type of another role's session is NULL to one without pg_read_all_stats, and autovacuum has no user.
_SESSIONS = """
    SELECT pid, coalesce(nullif(application_name, ''), 'unnamed'), usename, coalesce(state, 'unknown')
    FROM pg_stat_activity AS activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
      AND (backend_type = 'client backend' OR backend_type IS NULL AND usesysid IS NOT NULL)
      AND (application_name LIKE 'vectorkeep%%' OR EXISTS (
          SELECT FROM pg_locks AS lock
          WHERE lock.pid = activity.pid
            AND lock.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND (lock.locktype = 'advisory' AND lock.objsubid = 2 AND lock.classid BETWEEN %s::oid AND %s::oid
                 OR lock.relation IN (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name))))
    ORDER BY pid
"""
# A session that its client has closed stays in the list until the server has noticed.
_CLOSING_S = 1.0
_POLL_S = 0.05
_END_SESSION = "SELECT pg_terminate_backend(%s, 5000)"
# Migrations make no function by another beginning.
_FUNCTIONS = """
    SELECT oid::regprocedure::text FROM pg_proc
    WHERE proname LIKE 'vectorkeep\\_%' AND pronamespace = current_schema()::regnamespace
"""
_FORGET_REVISION = "DELETE FROM alembic_version"


@dataclass(frozen=True, slots=True)
class ResetPlan:
    """What a reset would remove. `database` is the name to be typed by who confirms it.

    rows: by table. columns: those that vectorkeep did not make and that go with their table. sessions: those
    that `force` would end. folder: that of the embedded servers, None on any other server.
    """

    database: str
    location: str
    rows: Mapping[str, int]
    size_bytes: int
    columns: list[str]
    sessions: list[str]
    folder: str | None


@dataclass(frozen=True, slots=True)
class ResetResult:
    """What a reset did. `revision` is that of the new, empty schema; None where the folder was deleted."""

    database: str
    rows: Mapping[str, int]
    sessions_ended: int
    cached_keys_removed: int
    revision: str | None
    details: list[str]


def plan_reset(settings: Settings, *, force: bool = False) -> ResetPlan:
    """What a reset would remove; nothing is changed. The embedded servers are started to count.

    Raises SchemaError where the database holds no store of ours, BusyError that names the sessions that work
    in it, unless `force`.
    """
    if settings.postgres_url() is None:
        return _plan_embedded(settings, force=force)
    with translated(), _connection(settings) as connection:
        return _plan(connection, settings, force=force)


def reset(settings: Settings, *, force: bool = False) -> ResetResult:
    """Remove everything that the store holds, for good, and make it new.

    Raises what `plan_reset` raises, and PermissionDeniedError to a role that does not own the tables. On a server the
    drop is one transaction: after an error nothing is changed, or all is dropped and 'vectorkeep migrate'
    makes it new.
    """
    plan = plan_reset(settings, force=force)
    logger.warning("reset.begins", extra={"database": plan.database, "location": plan.location})
    if plan.folder is not None:
        embedded.erase(settings.home, force=force)
        details = [f"stopped the embedded servers and deleted {plan.folder}; the next start begins empty"]
        return ResetResult(plan.database, plan.rows, len(plan.sessions), 0, None, details)
    url = _direct_url(settings)
    with translated(), _connection(settings) as connection:
        ended = _end_sessions(connection) if force else 0
        migrate.upgrade(url)  # only a schema that is ours to the last table is dropped by its names
        _drop(connection, settings)
    _, revision = migrate.upgrade(url)
    details = [f"dropped {len(plan.rows)} tables, migrated to {revision}"]
    removed = _clear_cache(settings, details)
    return ResetResult(plan.database, plan.rows, ended, removed, revision, details)


def _direct_url(settings: Settings) -> str:
    url = settings.direct_url() or settings.postgres_url()
    assert url is not None
    return url


@contextmanager
def _connection(settings: Settings) -> Iterator[Connection[Any]]:
    with connect_directly(_direct_url(settings), settings) as connection:
        yield connection


# -- what would go -------------------------------------------------------------------------------------------


def _plan_embedded(settings: Settings, *, force: bool) -> ResetPlan:
    home = settings.home.absolute()
    folder, location = str(home / "servers"), f"the embedded server in {home}"
    if not Path(folder).exists():
        raise SchemaError(f"there is no embedded database in {home}; nothing is to be reset")
    empty = ResetPlan(DATABASE, location, {}, 0, [], [], folder)
    try:
        servers = embedded.acquire(settings.home, settings=settings.embedded_settings, redis=False)
    except UnavailableError as exc:
        logger.warning("reset.not_counted", extra={"reason": str(exc)})
        return empty
    try:
        with translated(), connect_directly(servers.database_url, settings) as connection:
            if migrate.current_revision(connection) is None:
                return empty
            plan = _plan(connection, settings, force=force)
    finally:
        servers.release()
    return ResetPlan(DATABASE, location, plan.rows, plan.size_bytes, plan.columns, plan.sessions, folder)


def _plan(connection: Connection[Any], settings: Settings, *, force: bool) -> ResetPlan:
    _require_ours(connection)
    found = _sessions(connection) if force else _sessions_that_stay(connection)
    sessions = [f"process {pid} ({name}, {user}, {state})" for pid, name, user, state in found]
    [(database,)] = connection.execute("SELECT current_database()").fetchall()
    if sessions and not force:
        raise BusyError(
            f"{len(sessions)} sessions work in {database}: {', '.join(sessions)}; stop them first, or --force ends them"
        )
    sizes = dict(connection.execute(_PRESENT, (_TABLES,)).fetchall())
    known = [f"{table.name}.{column.name}" for table in Base.metadata.sorted_tables for column in table.columns]
    return ResetPlan(
        database=database,
        location=redacted(_direct_url(settings)) if settings.postgres_url() else "",
        rows={table: _count(connection, table) for table in sizes},
        size_bytes=sum(sizes.values()),
        columns=[name for (name,) in connection.execute(_STRANGE_COLUMNS, (_TABLES, known)).fetchall()],
        sessions=sessions,
        folder=None,
    )


def _require_ours(connection: Connection[Any]) -> None:
    """Raise SchemaError unless the migrations made this schema: tables of our names may be somebody else's."""
    from alembic.script import ScriptDirectory

    revision = migrate.current_revision(connection)
    if revision is None:
        raise SchemaError("the database has no vectorkeep schema; nothing is to be reset, see 'vectorkeep migrate'")
    ours = {script.revision for script in ScriptDirectory.from_config(migrate.alembic_config()).walk_revisions()}
    if revision not in ours:
        raise SchemaError(
            f"the database is at revision {revision}, which this vectorkeep does not know; "
            "reset it with the version that migrated it"
        )


def _sessions(connection: Connection[Any]) -> list[tuple[Any, ...]]:
    return connection.execute(_SESSIONS, (LOCK_CLASS, PAUSE_CLASS, _TABLES)).fetchall()


def _sessions_that_stay(connection: Connection[Any]) -> list[tuple[Any, ...]]:
    deadline = time.monotonic() + _CLOSING_S
    while (sessions := _sessions(connection)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return sessions


def _count(connection: Connection[Any], table: str) -> int:
    [(count,)] = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))).fetchall()
    return int(count)


# -- making it go --------------------------------------------------------------------------------------------


def _end_sessions(connection: Connection[Any]) -> int:
    sessions = _sessions(connection)
    for pid, *_ in sessions:
        with suppress(pg.InsufficientPrivilege):  # then the drop waits for its locks, and gives up
            connection.execute(_END_SESSION, (pid,))
    logger.warning("reset.sessions_ended", extra={"sessions": len(sessions)})
    return len(sessions)


def _drop(connection: Connection[Any], settings: Settings) -> None:
    """Drop the tables in one statement, so that the keys between them do not matter. Nothing of others goes."""
    try:
        with connection.transaction():
            limit_lock_waits(connection, settings.lock_timeout_s)
            present = [(name,) for name, _ in connection.execute(_PRESENT, (_TABLES,)).fetchall()]
            present += connection.execute(_PRESENT_IN, (list(_REBUILT), _TABLES)).fetchall()
            tables = sql.SQL(", ").join(sql.Identifier(*name) for name in present)
            connection.execute(sql.SQL("DROP TABLE {}").format(tables))
            for (schema,) in connection.execute(_SCHEMAS, (list(_REBUILT),)).fetchall():
                # Kept where something else is in it, or where somebody else made it.
                with suppress(pg.DependentObjectsStillExist, pg.InsufficientPrivilege), connection.transaction():
                    connection.execute(sql.SQL("DROP SCHEMA {}").format(sql.Identifier(schema)))
            for (function,) in connection.execute(_FUNCTIONS).fetchall():
                connection.execute(f"DROP FUNCTION {function}")  # quoted by the server where that is needed
            connection.execute(_FORGET_REVISION)
    except pg.DependentObjectsStillExist as exc:
        raise SchemaError(
            f"other objects depend on the tables: {exc.diag.message_detail}; drop them first; nothing was changed"
        ) from exc


def _clear_cache(settings: Settings, details: list[str]) -> int:
    """Remove this store's keys from Redis. Returns how many; says where some may be left.

    A key names the tables that its answer was computed from, by their oid: those are gone, so none is found again.
    """
    if not settings.redis_url:
        return 0
    removed = 0
    deadline = time.monotonic() + _CLEAR_AT_MOST_S
    left = f"are never found again: they name the old tables; they expire within {2 * settings.cache_ttl_s} s"
    try:
        client = redis_client.connect(
            settings.redis_url, timeout_s=_REDIS_PATIENCE_S, connect_timeout_s=_REDIS_PATIENCE_S
        )
        with client:
            for names in _keys(client, _store_name(settings), deadline):
                removed += int(client.unlink(*names)) if names else 0
    except TimeoutError:
        details.append(f"removed {removed} keys from Redis in {_CLEAR_AT_MOST_S:g} s; those that are left {left}")
    except (redis.RedisError, ValidationError) as exc:
        details.append(f"Redis did not answer ({exc}); cached answers {left}")
    else:
        details.append(f"removed {removed} keys of this store from Redis")
    return removed


def _keys(client: redis.Redis, store: str, deadline: float) -> Iterator[list[bytes | str]]:
    """Keys of this store, some at a time. Raises TimeoutError at `deadline`: Redis may be large."""
    cursor = 0
    while True:
        cursor, names = client.scan(cursor, match=f"vectorkeep:{store}:*", count=_KEYS_A_SCAN)
        yield list(names)
        if cursor == 0:
            return
        if time.monotonic() > deadline:
            raise TimeoutError


def _store_name(settings: Settings) -> str:
    """How keys name this database: see `db.engine.Identity`."""
    database = Database(_direct_url(settings), settings)
    database.open()
    try:
        with database.connection() as connection:
            return connection.identity.store
    finally:
        database.close()
