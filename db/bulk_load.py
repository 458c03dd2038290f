"""Bulk loads: rows first, the vector index after. With a live HNSW index every new row costs a search of its own.

What `bulk` means to `batch_upsert`, `embed_batch` and `sync`:

True: the caller asks. Indexes in use are dropped, and built anew at the end, as by `store.bulk_load()`.
False: never. Rows are written beside the indexes that there are.
"auto": where it pays and no search loses an index. Into an empty store, 1,000 inputs or more, or an unknown
number of them, are loaded without both indexes. Where 1,000 or more come for certain, an index that an interrupted
load has left missing is built after them. Any other index stays, and no lock is taken for it. Where that cost much,
the log says at the end that a bulk load would be faster, with the seconds that are predicted for both:

    beside the index: rows inserted × 2 ms
    bulk load:        rows stored at the end / rows a second of the last build in `index_builds` (5,000 before any)

It does so where the first is more than twice the second. Only documents are counted: chunks scale both alike.

Inputs may never end. An automatic load ends with the batch after which it has run for 30 minutes, or has brought
1,000,000 inputs of an unknown number: the indexes are built, and what follows is written beside them. Where another
process builds just then, or the server cannot, the log says which index is missing: what was written is not lost to
the caller for that. A load that lost its session builds through another one.

Who loads holds a session lock. While it is held searches compare all rows, and say so; when the load ends the
indexes are built online. A loader that dies leaves no lock and a missing index. Whoever opens the store next is
warned, and the next large write, or `maintain`, builds it.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal

import psycopg
from psycopg import Connection, sql
from psycopg import errors as pg
from sqlalchemy import Table

from . import faults
from .embedding_model import Model
from .engine import Database
from .errors import BusyError, UnavailableError
from .locks import Purpose, advisory_lock, is_held
from .models import vector_index_name
from .pause import current_pause
from .registry import StoreModel
from .tally import Tally
from .transactions import retried, waiting_for_resume
from .vector_index import INDEXED_TABLES, OWNS_TABLES, drop_vector_indexes, ensure_vector_indexes

logger = logging.getLogger("vectorkeep")

Bulk = bool | Literal["auto"]

# Fewer inputs than this are written beside a live index: building one anew would cost more.
AUTO_MIN_INPUTS = 1000
# An automatic load ends here: what feeds it may have no end. Beyond so many rows a graph has also outgrown the memory
# that a build gets, and building is no longer much faster than inserting. A number that is known ends by itself.
AUTO_MAX_INPUTS = 1_000_000
AUTO_MAX_S = 1800.0
# Nobody asked for an automatic load, and its rows are committed: another builder is not waited for any longer.
_AUTO_BUILDER_WAIT_S = 5.0
# What the prediction reckons with. A build of fewer rows than AUTO_MIN_INPUTS says nothing about large ones.
_INSERT_S = 0.002
_ROWS_A_SECOND = 5000.0
_CLEARLY = 2

# Whether each table is empty, and whether an interrupted load left its index missing. No row where the role
# may not build.
_STATE = sql.SQL("""
    SELECT NOT EXISTS (SELECT FROM embeddings), NOT EXISTS (SELECT FROM chunks),
           NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('embeddings_vector_idx') AND indisvalid),
           NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('chunks_vector_idx') AND indisvalid)
    WHERE {may_build}
""").format(may_build=OWNS_TABLES)
_MISSING = sql.SQL("""
    SELECT name FROM unnest(ARRAY['embeddings_vector_idx', 'chunks_vector_idx']) AS name
    WHERE NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass(name) AND indisvalid) AND {may_build}
    ORDER BY name DESC
""").format(may_build=OWNS_TABLES)
_BUILD_RATE = """
    SELECT rows * 1000 / duration_ms FROM index_builds
    WHERE index_name = 'embeddings_vector_idx' AND rows >= %s AND duration_ms > 0 ORDER BY id DESC LIMIT 1
"""
# How many documents are stored, counted no further than is asked. No row where no index is in use.
_STORED = sql.SQL("""
    SELECT (SELECT count(*) FROM (SELECT FROM embeddings LIMIT %s) AS counted)
    WHERE EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('embeddings_vector_idx') AND indisvalid)
      AND {may_build}
""").format(may_build=OWNS_TABLES)


@contextmanager
def bulk_load(database: Database, model: StoreModel) -> Iterator[None]:
    """Load without vector indexes, whatever the tables hold, and build them at the end, also where the block raises.

    Raises BusyError where another load runs; PausedError while ingestion is paused, or waits, as a write does.
    """
    with database.maintenance() as connection:
        waiting_for_resume(lambda: _refuse_while_paused(connection), database)
        with _loading(database, connection, model, lambda: INDEXED_TABLES):
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

    That is an empty store, where the indexes are dropped, and a table whose index is missing. An index that serves
    searches is never dropped here. Yields the tables that are loaded so. It may end before the block does, see
    `AUTO_MAX_INPUTS`.
    """
    loaded: Collection[Table] = ()
    with _Begun() as stack:
        many = inputs is None or inputs >= AUTO_MIN_INPUTS
        indexed = model.registered is None or model.registered.indexed
        if many and indexed and retried(lambda: _look(database, inputs)):
            connection = stack.enter_context(database.maintenance())
            # Where another load runs, or a stranger holds the table, rows are written beside the index.
            with suppress(BusyError, pg.LockNotAvailable):
                # Asked again under the lock: another load may have filled the tables meanwhile.
                choose = partial(_loadable_tables, connection, inputs)
                loaded = stack.enter_context(_loading(database, connection, model, choose, automatic=True))
                stack.enter_context(model.telling_batches(_Bound(stack, inputs).count))
        yield loaded


class _Begun(ExitStack):
    """What a load has begun. Whichever thread ends it first does all of it, and the others wait for that."""

    def __init__(self) -> None:
        super().__init__()
        self._ending = threading.RLock()

    def __exit__(self, *raised: Any) -> bool:
        with self._ending:
            return bool(super().__exit__(*raised))


class _Bound:
    """Ends an automatic load once it has run for long, or has brought many of an unknown number of inputs."""

    def __init__(self, load: _Begun, inputs: int | None) -> None:
        self._load = load
        self._left = AUTO_MAX_INPUTS if inputs is None else math.inf
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._ended = False

    def count(self, inputs: int) -> None:
        """Note that a batch of `inputs` is written, by any thread."""
        with self._lock:
            self._left -= inputs
            seconds = time.monotonic() - self._started
            if self._ended or (self._left > 0 and seconds < AUTO_MAX_S):
                return
            self._ended = True
        logger.info("bulk_load.ended_early", extra={"seconds": seconds, "effect": "further rows go beside the index"})
        self._load.close()


@contextmanager
def _loading(
    database: Database,
    connection: Connection[Any],
    model: StoreModel,
    choose_tables: Callable[[], tuple[Table, ...]],
    *,
    automatic: bool = False,
) -> Iterator[Collection[Table]]:
    with advisory_lock(connection, Purpose.BULK_LOAD, wait_s=0):
        tables: tuple[Table, ...] = ()
        try:  # from here on: one index may be dropped where the other cannot be
            tables = choose_tables()
            drop_vector_indexes(connection, tables)
            faults.point("bulk_load.dropped")
            with model.indexes_deferred():
                yield tables
            faults.point("bulk_load.loaded")
        finally:
            if model.registered is not None and tables:
                build = _build_or_warn if automatic else _build
                build(database, connection, model.registered, tables)
                faults.point("bulk_load.built")


def _build_or_warn(database: Database, connection: Connection[Any], model: Model, tables: Collection[Table]) -> None:
    """Build the indexes of `tables`; where that fails for now, log a warning that names the remedy."""
    try:
        _build(database, connection, model, tables, wait_s=_AUTO_BUILDER_WAIT_S)
    except (BusyError, UnavailableError, psycopg.OperationalError) as exc:
        missing = [vector_index_name(table.name) for table in tables]
        logger.warning("vector_index.missing", extra=_missing_extra(missing) | {"reason": str(exc).strip()})


def _build(
    database: Database, connection: Connection[Any], model: Model, tables: Collection[Table], **wait: float
) -> None:
    """Build the indexes of `tables` on `connection`, idle since the load began; on another where it was lost."""
    try:
        ensure_vector_indexes(connection, model, tables, **wait)
    except psycopg.OperationalError as exc:
        if not connection.closed:
            raise
        logger.warning("bulk_load.session_lost", extra={"reason": str(exc).strip()})
        with database.maintenance() as another:
            ensure_vector_indexes(another, model, tables, **wait)


def _look(database: Database, inputs: int | None) -> tuple[Table, ...]:
    with database.connection() as connection:
        return _loadable_tables(connection, inputs)


def _refuse_while_paused(connection: Connection[Any]) -> None:
    if pause := current_pause(connection):
        raise pause.error()


def _loadable_tables(connection: Connection[Any], inputs: int | None) -> tuple[Table, ...]:
    """Both tables where the store is empty; where many inputs come for certain, each that lacks its index.

    A table may stay empty for ever, as that of the chunks does where documents bring vectors of their own: emptiness
    of one table alone is no reason to lock it. An unknown number of inputs may turn out to be one.
    """
    row = connection.execute(_STATE).fetchone()
    if row is None or current_pause(connection) is not None:
        return ()
    empty, missing = row[:2], row[2:]
    if all(empty):
        return INDEXED_TABLES
    return () if inputs is None else tuple(table for table, lacks in zip(INDEXED_TABLES, missing, strict=True) if lacks)


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
            logger.warning("vector_index.missing", extra=_missing_extra(missing))


def _missing_extra(indexes: list[str]) -> dict[str, Any]:
    return {"indexes": indexes, "effect": "searches compare all rows", "remedy": "run 'vectorkeep maintain'"}
