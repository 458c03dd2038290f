"""Bulk loads: rows first, the vector index after. With a live HNSW index every new row costs a search of its own.

What `bulk` means to `batch_upsert`, `embed_batch` and `sync`:

True: the caller asks. Indexes in use are dropped, and built anew at the end, as by `store.bulk_load()`.
False: never. Rows are written beside the indexes that there are.
"auto": where it pays and no search loses an index. Into an empty store, 1,000 inputs or more, or an unknown
number of them, are loaded without both indexes; 1,000 or more for certain, without the index of each table that
is empty, or whose index an interrupted load has left missing. An index in use stays. Where that cost much, the
log says at the end that a bulk load would be faster, with the seconds that are predicted for both:

    beside the index: rows inserted × 2 ms
    bulk load:        rows stored at the end / rows a second of the last build in `index_builds` (5,000 before any)

It does so where the first is more than twice the second. Only documents are counted: chunks scale both alike.

Who loads holds a session lock. While it is held searches compare all rows, and say so; when the load ends the
indexes are built online. A loader that dies leaves no lock and a missing index. Whoever opens the store next is
warned, and the next large write, or `maintain`, builds it.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import psycopg
from psycopg import Connection, sql
from psycopg import errors as pg
from sqlalchemy import Table

from . import faults
from .embedding_model import Model
from .engine import Database
from .errors import BusyError
from .locks import Purpose, advisory_lock, is_held
from .pause import current_pause
from .registry import StoreModel
from .tally import Tally
from .transactions import waiting_for_resume
from .vector_index import INDEXED_TABLES, drop_vector_indexes, ensure_vector_indexes

logger = logging.getLogger("vectorkeep")

Bulk = bool | Literal["auto"]

# Fewer inputs than this are written beside a live index: building one anew would cost more.
AUTO_MIN_INPUTS = 1000
# What the prediction reckons with. A build of fewer rows than AUTO_MIN_INPUTS says nothing about large ones.
_INSERT_S = 0.002
_ROWS_A_SECOND = 5000.0
_CLEARLY = 2

_MAY_BUILD = sql.SQL("""
    (SELECT bool_and(pg_has_role(relowner, 'USAGE')) FROM pg_class
     WHERE oid IN ('embeddings'::regclass, 'chunks'::regclass))
""")
# Whether each table is empty, and whether an interrupted load left its index missing. No row where the role
# may not build.
_STATE = sql.SQL("""
    SELECT NOT EXISTS (SELECT FROM embeddings), NOT EXISTS (SELECT FROM chunks),
           NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('embeddings_vector_idx') AND indisvalid),
           NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('chunks_vector_idx') AND indisvalid)
    WHERE {may_build}
""").format(may_build=_MAY_BUILD)
_MISSING = sql.SQL("""
    SELECT name FROM unnest(ARRAY['embeddings_vector_idx', 'chunks_vector_idx']) AS name
    WHERE NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass(name) AND indisvalid) AND {may_build}
    ORDER BY name DESC
""").format(may_build=_MAY_BUILD)
_BUILD_RATE = """
    SELECT rows * 1000 / duration_ms FROM index_builds
    WHERE index_name = 'embeddings_vector_idx' AND rows >= %s AND duration_ms > 0 ORDER BY id DESC LIMIT 1
"""
# How many documents are stored, counted no further than is asked. No row where no index is in use.
_STORED = sql.SQL("""
    SELECT (SELECT count(*) FROM (SELECT FROM embeddings LIMIT %s) AS counted)
    WHERE EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('embeddings_vector_idx') AND indisvalid)
      AND {may_build}
""").format(may_build=_MAY_BUILD)


@contextmanager
def bulk_load(database: Database, model: StoreModel) -> Iterator[None]:
    """Load without vector indexes, whatever the tables hold, and build them at the end, also where the block raises.

    Raises BusyError where another load runs; PausedError while ingestion is paused, or waits, as a write does.
    """
    with database.maintenance() as connection:
        waiting_for_resume(lambda: _refuse_while_paused(connection), database)
        with _loading(connection, model, lambda: INDEXED_TABLES):
            yield


@contextmanager
def chosen(database: Database, model: StoreModel, bulk: Bulk, tally: Tally) -> Iterator[None]:
    """A write that `tally` counts, loaded in bulk where `bulk` says so.

    Raises BusyError where `bulk` is True and another load runs.
    """
    if bulk is True:
        with bulk_load(database, model):
            yield
    elif bulk == "auto":
        with automatic(database, model, tally.total) as loaded:
            yield
        if INDEXED_TABLES[0] not in loaded:
            _advise(database, model.registered, tally["inserted"])
    else:
        yield


@contextmanager
def automatic(database: Database, model: StoreModel, inputs: int | None) -> Iterator[Collection[Table]]:
    """A bulk load where it pays and harms nobody: many inputs or an unknown number of them, and no index in use yet.

    That is an empty table, where the index is dropped, and one whose index is missing. An index that serves
    searches is never dropped here. Yields the tables that are loaded so.
    """
    loaded: Collection[Table] = ()
    with ExitStack() as stack:
        if inputs is None or inputs >= AUTO_MIN_INPUTS:
            with database.connection() as pooled:
                worth_it = _loadable_tables(pooled, inputs)
            if worth_it:
                connection = stack.enter_context(database.maintenance())
                # Where another load runs, or a stranger holds the table, rows are written beside the index.
                with suppress(BusyError, pg.LockNotAvailable):
                    # Asked again under the lock: another load may have filled the tables meanwhile.
                    loaded = stack.enter_context(
                        _loading(connection, model, lambda: _loadable_tables(connection, inputs))
                    )
        yield loaded


@contextmanager
def _loading(
    connection: Connection[Any], model: StoreModel, choose_tables: Callable[[], tuple[Table, ...]]
) -> Iterator[Collection[Table]]:
    with advisory_lock(connection, Purpose.BULK_LOAD, wait_s=0):
        try:  # from here on: one index may be dropped where the other cannot be
            tables = choose_tables()
            drop_vector_indexes(connection, tables)
            faults.point("bulk_load.dropped")
            with model.indexes_deferred():
                yield tables
            faults.point("bulk_load.loaded")
        finally:
            if model.registered is not None and not connection.closed:
                ensure_vector_indexes(connection, model.registered)
                faults.point("bulk_load.built")


def _refuse_while_paused(connection: Connection[Any]) -> None:
    if pause := current_pause(connection):
        raise pause.error()


def _loadable_tables(connection: Connection[Any], inputs: int | None) -> tuple[Table, ...]:
    """Both tables where the store is empty; where many inputs come for certain, each that is empty or lacks its index.

    An unknown number may turn out to be one: that is no reason to lock a table of a store in use.
    """
    row = connection.execute(_STATE).fetchone()
    if row is None or current_pause(connection) is not None:
        return ()
    empty, missing = row[:2], row[2:]
    if inputs is None:
        return INDEXED_TABLES if all(empty) else ()
    return tuple(table for table, *why in zip(INDEXED_TABLES, empty, missing, strict=True) if any(why))


def _advise(database: Database, model: Model | None, inserted: int) -> None:
    """Log that a bulk load would clearly have been faster than writing `inserted` documents beside an index in use."""
    if inserted < AUTO_MIN_INPUTS or model is None or not model.indexed:
        return
    beside_s = inserted * _INSERT_S
    with suppress(psycopg.Error), database.connection() as connection:  # the write has succeeded, whatever this meets
        measured = connection.execute(_BUILD_RATE, (AUTO_MIN_INPUTS,)).fetchone()
        rows_a_second = measured[0] if measured else _ROWS_A_SECOND
        most = int(rows_a_second * beside_s / _CLEARLY)
        found = connection.execute(_STORED, (most + 1,)).fetchone()
        if found is not None and found[0] <= most:
            seconds = {"seconds_beside_index": beside_s, "seconds_bulk_load": found[0] / rows_a_second}
            logger.info("bulk_load.would_be_faster", extra={"rows": inserted, "stored": found[0], **seconds})


def warn_of_missing_indexes(database: Database, model: Model | None) -> None:
    """Log a warning where a vector index is missing that this role could build, and nobody is about to."""
    if model is None or not model.indexed:
        return
    with database.connection() as connection:
        missing = [name for (name,) in connection.execute(_MISSING)]
        if missing and not is_held(connection, Purpose.BULK_LOAD, Purpose.INDEX_BUILD):
            extra = {"indexes": missing, "effect": "searches compare all rows", "remedy": "run 'vectorkeep maintain'"}
            logger.warning("vector_index.missing", extra=extra)
