"""Bulk loads: rows first, the vector index after. With a live HNSW index every new row costs a search of its own.

Who loads holds a session lock. While it is held searches compare all rows, and say so; when the load ends the
indexes are built online. A loader that dies leaves no lock and a missing index: the next large write, or
`maintain`, builds it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from psycopg import Connection
from psycopg import errors as pg
from sqlalchemy import Table

from .engine import Database
from .errors import BusyError
from .locks import Purpose, advisory_lock
from .registry import StoreModel
from .vector_index import INDEXED_TABLES, drop_vector_indexes, ensure_vector_indexes

# Fewer inputs than this are written beside a live index: building one anew would cost more.
AUTO_MIN_INPUTS = 1000

# Whether each table is empty, and whether an interrupted load left its index missing. No row where the role
# may not build.
_STATE = """
    SELECT NOT EXISTS (SELECT FROM embeddings), NOT EXISTS (SELECT FROM chunks),
           NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('embeddings_vector_idx') AND indisvalid),
           NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('chunks_vector_idx') AND indisvalid)
    WHERE (SELECT bool_and(pg_has_role(relowner, 'USAGE')) FROM pg_class
           WHERE oid IN ('embeddings'::regclass, 'chunks'::regclass))
"""


@contextmanager
def bulk_load(database: Database, model: StoreModel) -> Iterator[None]:
    """Load without vector indexes, whatever the tables hold, and build them at the end, also where the block raises.

    Raises BusyError where another load runs.
    """
    with database.maintenance() as connection, _loading(connection, model, lambda: INDEXED_TABLES):
        yield


@contextmanager
def automatic(database: Database, model: StoreModel, inputs: int | None) -> Iterator[None]:
    """A bulk load where it pays and harms nobody: many inputs or an unknown number of them, and no index in use yet.

    That is an empty table, where the index is dropped, and one whose index is missing. An index that serves
    searches is never dropped here.
    """
    with ExitStack() as stack:
        if inputs is None or inputs >= AUTO_MIN_INPUTS:
            with database.connection() as pooled:
                worth_it = _loadable_tables(pooled, inputs)
            if worth_it:
                connection = stack.enter_context(database.maintenance())
                # Where another load runs, or a stranger holds the table, rows are written beside the index.
                with suppress(BusyError, pg.LockNotAvailable):
                    # Asked again under the lock: another load may have filled the tables meanwhile.
                    stack.enter_context(_loading(connection, model, lambda: _loadable_tables(connection, inputs)))
        yield


@contextmanager
def _loading(
    connection: Connection[Any], model: StoreModel, choose_tables: Callable[[], tuple[Table, ...]]
) -> Iterator[None]:
    with advisory_lock(connection, Purpose.BULK_LOAD, wait_s=0):
        try:  # from here on: one index may be dropped where the other cannot be
            drop_vector_indexes(connection, choose_tables())
            with model.indexes_deferred():
                yield
        finally:
            if model.registered is not None and not connection.closed:
                ensure_vector_indexes(connection, model.registered)


def _loadable_tables(connection: Connection[Any], inputs: int | None) -> tuple[Table, ...]:
    """Both tables where the store is empty; where many inputs come for certain, each that is empty or lacks its index.

    An unknown number may turn out to be one: that is no reason to lock a table of a store in use.
    """
    row = connection.execute(_STATE).fetchone()
    if row is None:
        return ()
    empty, missing = row[:2], row[2:]
    if inputs is None:
        return INDEXED_TABLES if all(empty) else ()
    return tuple(table for table, *why in zip(INDEXED_TABLES, empty, missing, strict=True) if any(why))
