"""Orphans: chunks whose document is NULL or gone, and documents without any vector.

A document without a vector of its own is an orphan only where none of its chunks has one.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from psycopg import Connection, sql
from psycopg import errors as pg

from . import faults
from .engine import Database
from .transactions import LoggedWrite, WriteTransaction, retried, run_write, unlimited_reading
from .types import CleanupResult, Progress
from .vacuum import vacuum

FOREIGN_KEY = "chunks_document_id_fkey"
_TABLES = ("chunks", "embeddings")

# NULL is no document's id: one condition finds both kinds, as a join. With OR it was a lookup for each row.
_ORPHANED_CHUNK = sql.SQL("""
    NOT EXISTS (SELECT FROM embeddings WHERE embeddings.id = chunks.document_id)
    AND (%(min_age)s::interval IS NULL OR chunks.created_at < now() - %(min_age)s::interval)
""")
_ORPHANED_EMBEDDING = sql.SQL("""
    embeddings.embedding IS NULL
    AND NOT EXISTS (SELECT FROM chunks
                    WHERE chunks.document_id = embeddings.id AND chunks.embedding IS NOT NULL)
    AND (%(min_age)s::interval IS NULL OR embeddings.created_at < now() - %(min_age)s::interval)
""")
_CONDITIONS = {"chunks": _ORPHANED_CHUNK, "embeddings": _ORPHANED_EMBEDDING}

_COUNT = sql.SQL("SELECT count(*) FROM {table} WHERE {orphaned}")
# Each batch goes on after the last one's ids: the tables are walked once, not once a batch, and outside of any write:
# a walk may take long, and whoever must keep writers out would wait for it.
_FIND_BATCH = sql.SQL("SELECT id FROM {table} WHERE id > %(after)s AND {orphaned} ORDER BY id LIMIT %(batch_size)s")
_LOCK_BATCH = sql.SQL("""
    SELECT id FROM {table} WHERE id = ANY(%(ids)s) AND {orphaned} ORDER BY id FOR UPDATE SKIP LOCKED
""")
# Asked again under the lock: what another writer has mended meanwhile stays.
_DELETE_BATCH = sql.SQL("""
    DELETE FROM {table} WHERE id = ANY(%(ids)s) AND {orphaned} RETURNING source_id, workspace
""")
_SIZE = "SELECT sum(pg_total_relation_size(to_regclass(name)))::bigint FROM unnest(%s::text[]) AS name"
_IS_VALIDATED = """
    SELECT convalidated FROM pg_constraint WHERE conname = %s AND conrelid = to_regclass('chunks')
"""


def count_orphans(connection: Connection[Any], table: str, min_age: timedelta | None = None) -> int:
    """The number of orphans in `table`, all of them."""
    statement = _COUNT.format(table=sql.Identifier(table), orphaned=_CONDITIONS[table])
    [(count,)] = connection.execute(statement, {"min_age": min_age}).fetchall()
    return int(count)


def report_orphans(database: Database, min_age: timedelta | None) -> CleanupResult:
    """What a cleanup would remove."""
    with unlimited_reading(database) as connection:
        chunks = count_orphans(connection, "chunks", min_age)
        embeddings = count_orphans(connection, "embeddings", min_age)
    details = [
        f"Found {chunks} orphaned chunks",
        f"Found {embeddings} documents without any vector",
        "Dry run - no changes made",
    ]
    return CleanupResult(chunks, embeddings, False, 0, False, details)


def remove_orphans(
    database: Database,
    *,
    batch_size: int,
    min_age: timedelta | None,
    after_commit: Callable[[LoggedWrite], None],
    on_progress: Progress | None,
) -> CleanupResult:
    """Remove all orphans in short transactions, then VACUUM (ANALYZE) and validate the foreign key."""
    removed = {"chunks": 0, "embeddings": 0}
    with database.maintenance() as connection:
        size_before = _size(connection)
        for table in _TABLES:  # chunks first: removing them never makes an orphan of a document
            for count in _remove_batches(database, table, batch_size, min_age, after_commit):
                removed[table] += count
                if on_progress is not None:
                    on_progress(sum(removed.values()), None)
        details = [
            f"Removed {removed['chunks']} orphaned chunks",
            f"Removed {removed['embeddings']} documents without any vector",
        ]
        faults.point("cleanup.committed")
        vacuumed = _vacuum(connection, details)
        faults.point("cleanup.vacuumed")
        _validate_foreign_key(connection, details)
        reclaimed = max(0, size_before - _size(connection))
    details.append(f"Reclaimed {reclaimed} bytes")
    return CleanupResult(removed["chunks"], removed["embeddings"], True, reclaimed, vacuumed, details)


def _remove_batches(
    database: Database,
    table: str,
    batch_size: int,
    min_age: timedelta | None,
    after_commit: Callable[[LoggedWrite], None],
) -> Iterator[int]:
    """Remove the orphans of `table` batch by batch; yields how many each transaction removed.

    Where there are none it tries all the same: a role that may not remove any is told so.
    """
    after = ""
    while True:
        ids = _find_batch(database, table, after, batch_size, min_age)

        def remove(transaction: WriteTransaction, ids: list[str] = ids) -> int:
            return _remove_batch(transaction, table, ids, min_age)

        yield run_write(database, remove, after_commit=after_commit, unlimited=True)
        if len(ids) < batch_size:
            return
        after = ids[-1]


def _find_batch(database: Database, table: str, after: str, batch_size: int, min_age: timedelta | None) -> list[str]:
    """The ids of the next orphans after id `after`, in order."""
    statement = _FIND_BATCH.format(table=sql.Identifier(table), orphaned=_CONDITIONS[table])
    values = {"after": after, "batch_size": batch_size, "min_age": min_age}

    def find() -> list[str]:
        with unlimited_reading(database) as connection:
            return [row[0] for row in connection.execute(statement, values)]

    return retried(find)


def _remove_batch(transaction: WriteTransaction, table: str, ids: list[str], min_age: timedelta | None) -> int:
    """Remove those of `ids` that are orphans still, and that nobody else has in hand. Returns how many."""
    parts = {"table": sql.Identifier(table), "orphaned": _CONDITIONS[table]}
    values: dict[str, Any] = {"ids": ids, "min_age": min_age}
    values["ids"] = [row[0] for row in transaction.cursor.execute(_LOCK_BATCH.format(**parts), values)]
    if not values["ids"]:
        return 0
    gone = transaction.cursor.execute(_DELETE_BATCH.format(**parts), values).fetchall()
    faults.point("cleanup.removed")
    # Else this session may report the dead rows after VACUUM has reported that there are none.
    transaction.cursor.execute("SELECT pg_stat_force_next_flush()")
    for source_id, workspace in gone:
        transaction.touch(source_id, workspace)
    return len(gone)


def _size(connection: Connection[Any]) -> int:
    [(size,)] = connection.execute(_SIZE, (list(_TABLES),)).fetchall()
    return int(size)


def _vacuum(connection: Connection[Any], details: list[str]) -> bool:
    if warnings := vacuum(connection, *_TABLES):
        details.append(f"Vacuum not done: {'; '.join(warnings)}; run it as the owner of the tables")
        return False
    details.append("Vacuum completed")
    return True


def _validate_foreign_key(connection: Connection[Any], details: list[str]) -> None:
    row = connection.execute(_IS_VALIDATED, (FOREIGN_KEY,)).fetchone()
    if row is None or row[0]:
        return
    statement = sql.SQL("ALTER TABLE chunks VALIDATE CONSTRAINT {}").format(sql.Identifier(FOREIGN_KEY))
    try:
        connection.execute(statement)
        details.append(f"Validated the foreign key {FOREIGN_KEY}")
    except pg.ForeignKeyViolation:
        details.append(f"The foreign key {FOREIGN_KEY} stays unvalidated: younger orphans remain")
    except pg.InsufficientPrivilege:
        details.append(f"The foreign key {FOREIGN_KEY} stays unvalidated: only the tables' owner may validate it")
