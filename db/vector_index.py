"""Building the vector indexes: online, safe to run again after a crash, with memory enough where that is known."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg import Connection, sql
from psycopg import errors as pg
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex

from .embedding_model import Model
from .locks import Purpose, advisory_lock
from .models import Chunk, Embedding, vector_index, vector_index_name

logger = logging.getLogger("vectorkeep")

INDEXED_TABLES: tuple[Table, ...] = (Embedding.metadata.tables["embeddings"], Chunk.metadata.tables["chunks"])

# A lock that others would queue behind is waited for this long. CREATE INDEX CONCURRENTLY also waits for older
# transactions, which stops nobody: that may take as long as a backup.
_LOCK_TIMEOUT_MS = 5000
_CONCURRENT_WAIT_MS = 600_000
_DROP_STINT_MS = 200
_DROP_STINTS = 8
# Another builder of ours is waited for this long.
_BUILDER_WAIT_S = 3600.0

# What a row takes while HNSW is built with m = 16: 32 neighbours of 16 bytes and the element itself.
_BYTES_PER_ELEMENT = 750
_MIN_BUILD_MB = 64
_MAX_BUILD_MB = 1024

_IS_VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)"
# Whether this role owns the tables of vectors, or is a member of who does: indexes are the owner's to build.
OWNS_TABLES = sql.SQL("""
    (SELECT bool_and(pg_has_role(relowner, 'USAGE')) FROM pg_class
     WHERE oid IN ('embeddings'::regclass, 'chunks'::regclass))
""")
# An interrupted build leaves an invalid index, an interrupted REINDEX CONCURRENTLY an invalid copy with such a name.
REINDEX_LEFTOVER = "_cc(new|old)[0-9]*$"
# Whoever builds an index of a table now has it invalid, too: it is no leftover.
# All databases of the server are in this view, and in a copy of this one its tables have the same OIDs.
NOT_BEING_BUILT = sql.SQL("""
    NOT EXISTS (SELECT FROM pg_stat_progress_create_index AS running
                WHERE running.datname = current_database() AND running.relid = index.indrelid)
""")
# Builds of other roles, of which a role without pg_read_all_stats sees the process and not the table: any invalid
# index may be what they build.
UNSEEN_BUILDS = "SELECT pid FROM pg_stat_progress_create_index WHERE datname = current_database() AND relid IS NULL"
_LEFTOVERS = sql.SQL("""
    SELECT relname FROM pg_class JOIN pg_index AS index ON index.indexrelid = pg_class.oid
    WHERE NOT index.indisvalid AND index.indrelid = ANY(%s::regclass[]) AND (relname ~ %s OR relname = ANY(%s))
      AND {not_being_built} AND NOT EXISTS ({unseen_builds})
    ORDER BY relname
""").format(not_being_built=NOT_BEING_BUILT, unseen_builds=sql.SQL(UNSEEN_BUILDS))
_EXISTS = "SELECT to_regclass(%s) IS NOT NULL"
# Rows without a vector are in no index, and yet the build reads them.
_ROWS = sql.SQL("""
    SELECT (SELECT count(*) FROM {table} WHERE embedding IS NOT NULL), EXISTS (SELECT FROM {table})
""")
_RECORD_BUILD = """
    INSERT INTO index_builds (index_name, table_name, rows, size_bytes, duration_ms, changes)
    SELECT %(index)s, %(table)s, %(rows)s, pg_relation_size(to_regclass(%(index)s)), %(duration_ms)s,
           (SELECT n_tup_ins + n_tup_upd - n_tup_hot_upd + n_tup_del
            FROM pg_stat_user_tables WHERE relid = to_regclass(%(table)s))
"""


def ensure_vector_indexes(
    connection: Connection[Any],
    model: Model,
    tables: Iterable[Table] = INDEXED_TABLES,
    *,
    wait_s: float = _BUILDER_WAIT_S,
) -> list[str]:
    """Build the vector indexes that are missing or invalid, on a maintenance connection. Returns their names.

    Online on a table with rows. Where the role may not, or another session builds the index or holds the table for
    long, a warning is logged and searches stay exact. Where nothing is missing no lock is taken. Raises BusyError
    where another process builds for longer than `wait_s`.
    """
    wanting = [table for table in tables if model.indexed and not _is_valid(connection, table)]
    if not wanting:
        return []
    with advisory_lock(connection, Purpose.INDEX_BUILD, wait_s=wait_s):
        return [
            vector_index_name(table.name)
            for table in wanting
            if not _is_valid(connection, table) and _try_build(connection, table, model)  # who had the lock may have
        ]


def drop_vector_indexes(connection: Connection[Any], tables: Iterable[Table]) -> None:
    """Drop the vector indexes of `tables`; from then on searches compare all rows."""
    for table in tables:
        _drop(connection, vector_index_name(table.name))


def rebuild_vector_index(
    connection: Connection[Any], model: Model, table: Table, rows: int, *, wait_s: float = _BUILDER_WAIT_S
) -> None:
    """REINDEX online; one that is interrupted or fails leaves an invalid copy, see `drop_leftovers`.

    Raises BusyError where another process builds for longer than `wait_s`.
    """
    name = vector_index_name(table.name)
    with advisory_lock(connection, Purpose.INDEX_BUILD, wait_s=wait_s):
        started = time.perf_counter()
        with _lock_timeout(connection, _CONCURRENT_WAIT_MS):
            statement = sql.SQL("REINDEX INDEX CONCURRENTLY {}").format(sql.Identifier(name))
            _build(connection, table, model, rows, statement)
        _record(connection, table, rows, started)


def leftovers(connection: Connection[Any]) -> list[str]:
    """Invalid indexes that interrupted builds left: they serve nobody and slow every write."""
    return _leftovers_of(connection, INDEXED_TABLES)


def drop_leftovers(connection: Connection[Any], *, wait_ms: int = _CONCURRENT_WAIT_MS) -> list[str]:
    """Drop them, online. Returns their names. Raises BusyError where another process of ours builds."""
    with advisory_lock(connection, Purpose.INDEX_BUILD, wait_s=0), _lock_timeout(connection, wait_ms):
        return _drop_unfinished(connection, INDEXED_TABLES)


def build_unused_index(connection: Connection[Any], table: Table, model: Model, rows: int) -> None:
    """Build the vector index of a table that nobody uses yet, and drop nothing that has its name elsewhere."""
    started = time.perf_counter()
    _build(connection, table, model, rows, _create_index(table, model, concurrently=False))
    _record(connection, table, rows, started)


def _drop(connection: Connection[Any], name: str) -> None:
    """Drop an index that may be in use. Others queue behind a DROP that waits: it waits in short stints.

    Raises LockNotAvailable where none of them got the lock.
    """
    statement = sql.SQL("DROP INDEX IF EXISTS {}").format(sql.Identifier(name))
    for _ in range(_DROP_STINTS - 1):
        with suppress(pg.LockNotAvailable), _lock_timeout(connection, _DROP_STINT_MS):
            connection.execute(statement)
            return
        time.sleep(2 * _DROP_STINT_MS / 1000)
    with _lock_timeout(connection, _DROP_STINT_MS):
        connection.execute(statement)


def _leftovers_of(connection: Connection[Any], tables: Iterable[Table]) -> list[str]:
    names = [table.name for table in tables]
    indexes = [vector_index_name(name) for name in names]
    return [name for (name,) in connection.execute(_LEFTOVERS, (names, REINDEX_LEFTOVER, indexes)).fetchall()]


def _drop_unfinished(connection: Connection[Any], tables: Iterable[Table]) -> list[str]:
    """Drop what builds of the indexes of `tables` left: it serves nobody, and nobody queues behind that."""
    names = _leftovers_of(connection, tables)
    for name in names:
        connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(name)))
    return names


def _record(connection: Connection[Any], table: Table, rows: int, started: float) -> None:
    name, duration_ms = vector_index_name(table.name), (time.perf_counter() - started) * 1000
    record = {"index": name, "table": table.name, "rows": rows, "duration_ms": duration_ms}
    connection.execute(_RECORD_BUILD, record)
    logger.info("vector_index.built", extra=record)


def _is_valid(connection: Connection[Any], table: Table) -> bool:
    row = connection.execute(_IS_VALID, (vector_index_name(table.name),)).fetchone()
    return bool(row and row[0])


def _exists(connection: Connection[Any], name: str) -> bool:
    [(exists,)] = connection.execute(_EXISTS, (name,)).fetchall()
    return bool(exists)


def _try_build(connection: Connection[Any], table: Table, model: Model) -> bool:
    name = vector_index_name(table.name)
    started = time.perf_counter()
    [(rows, filled)] = connection.execute(_ROWS.format(table=sql.Identifier(table.name))).fetchall()
    try:
        with _lock_timeout(connection, _CONCURRENT_WAIT_MS):
            _drop_unfinished(connection, [table])  # an interrupted build leaves an invalid index behind
        if _exists(connection, name):  # and is no leftover: it is for whoever builds it to finish
            logger.warning(
                "vector_index.not_built", extra={"index": name, "reason": "another session may be building it"}
            )
            return False
        with _lock_timeout(connection, _CONCURRENT_WAIT_MS if filled else _LOCK_TIMEOUT_MS):
            _build(connection, table, model, rows, _create_index(table, model, concurrently=filled))
    except (pg.InsufficientPrivilege, pg.LockNotAvailable) as exc:
        _drop_leftover(connection, table)
        logger.warning("vector_index.not_built", extra={"index": name, "reason": str(exc).strip()})
        return False
    except pg.DataError:  # a row that the index cannot take: what was begun would only be in the way
        _drop_leftover(connection, table)
        raise
    _record(connection, table, rows, started)
    return True


def _build(
    connection: Connection[Any], table: Table, model: Model, rows: int, statement: sql.SQL | sql.Composed
) -> None:
    """Execute `statement`, which builds the vector index of `table`, with the memory that `rows` vectors need."""
    with _build_memory(connection, model, rows), _spill_notices(connection, model, rows):
        try:
            connection.execute(statement)
        except pg.DiskFull:
            # A parallel build keeps the graph in shared memory, which containers limit to 64 MB.
            _drop_unfinished(connection, [table])
            connection.execute("SET max_parallel_maintenance_workers = 0")
            connection.execute(statement)


def _create_index(table: Table, model: Model, *, concurrently: bool) -> sql.SQL:
    """CREATE INDEX of the vector index: CONCURRENTLY, but for an empty table, where it is instant."""
    index = vector_index(table, model.dimensions, model.distance)
    index.dialect_options["postgresql"]["concurrently"] = concurrently
    return sql.SQL(str(CreateIndex(index).compile(dialect=postgresql.dialect())))  # type: ignore[no-untyped-call]


def build_memory_mb(model: Model, rows: int) -> int:
    """Memory in which the graph of `rows` vectors fits, from pgvector's in-memory layout."""
    return _MIN_BUILD_MB + rows * (2 * model.dimensions + _BYTES_PER_ELEMENT) // 1024**2


@contextmanager
def _build_memory(connection: Connection[Any], model: Model, rows: int) -> Iterator[None]:
    """Give the build what it needs, up to 1 GB; never less than the server's own setting."""
    wanted = min(build_memory_mb(model, rows), _MAX_BUILD_MB)
    connection.execute(
        "SELECT set_config('maintenance_work_mem', greatest(%s, setting::bigint) || 'kB', false) "
        "FROM pg_settings WHERE name = 'maintenance_work_mem'",
        (wanted * 1024,),
    )
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("RESET maintenance_work_mem")
            connection.execute("RESET max_parallel_maintenance_workers")


@contextmanager
def _spill_notices(connection: Connection[Any], model: Model, rows: int) -> Iterator[None]:
    """Warn, with the figure that would fit, where the server says that the graph outgrew its memory."""
    needed = build_memory_mb(model, rows)

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        extra = {"notice": diagnostic.message_primary, "maintenance_work_mem_needed_mb": needed}
        logger.warning("vector_index.build_outgrew_memory", extra=extra)

    connection.execute("SET client_min_messages = notice")
    connection.add_notice_handler(note)
    try:
        yield
    finally:
        connection.remove_notice_handler(note)
        if not connection.closed:
            connection.execute("SET client_min_messages = warning")


@contextmanager
def _lock_timeout(connection: Connection[Any], timeout_ms: int = _LOCK_TIMEOUT_MS) -> Iterator[None]:
    """Do not queue for long behind another session's lock: others would queue behind us."""
    connection.execute(f"SET lock_timeout = {timeout_ms}")
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("RESET lock_timeout")


def _drop_leftover(connection: Connection[Any], table: Table) -> None:
    for name in _leftovers_of(connection, [table]):
        try:
            _drop(connection, name)
        except psycopg.Error as exc:
            logger.warning("vector_index.leftover", extra={"index": name, "reason": str(exc).strip()})
