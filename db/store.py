"""The face of the library: `connect` opens a store, and every call of it begins here."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import wraps
from threading import Event
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, cast

import numpy as np
import psycopg_pool
import redis
import sqlalchemy
from numpy.typing import NDArray

from . import bulk_load, deletion, doctor, maintenance, orphans, reading, recall, statistics, vectors
from .arguments import check_bulk, check_consistency, check_count, check_ids, check_min_age
from .config import Consistency, Distance, Settings
from .documents import check_key, check_text
from .embedding import TextEmbedder
from .embedding_model import Model
from .errors import (
    ClosedError,
    MaintenanceIncomplete,
    SchemaError,
    ValidationError,
    of_caller,
    translated,
)
from .filters import Filter
from .ingestion import Ingestion
from .metrics import Operation
from .opening import OpenParts
from .recall import RecallRequest
from .search import Query
from .sync import SourceSync
from .tally import Tally, callers_inputs, total_of
from .transactions import (
    LoggedWrite,
    begin_write,
    bounded_tags,
    log_write,
    retried,
    run_write,
    source_tag,
    workspace_tag,
)
from .types import (
    CleanupResult,
    DeleteResult,
    Diagnostics,
    Document,
    Embedder,
    EmbedResult,
    Finding,
    Item,
    Level,
    MaintenanceResult,
    Progress,
    RecallReport,
    SearchResult,
    Statistics,
    StepProgress,
    StoredHash,
    UpsertResult,
    Vector,
)

P = ParamSpec("P")
R = TypeVar("R")

MAX_BATCH = 100_000

# Set inside `VectorStore.transaction()`: what is read there must not come from, or go to, the cache.
_in_transaction: ContextVar[bool] = ContextVar("vectorkeep_in_transaction", default=False)


class _Default:
    """Marks a default of `connect`: what a caller gives, even if it is equal, wins over the environment."""


class _Str(_Default, str): ...


class _Int(_Default, int): ...


class _Float(_Default, float): ...


_COSINE = cast(Distance, _Str("cosine"))
_STRICT = cast(Consistency, _Str("strict"))


def connect(
    database_url: str | None = None,
    redis_url: str | Literal[False] | None = None,
    *,
    embedder: Embedder | None = None,
    model_id: str | None = None,
    dimensions: int | None = None,
    distance: Distance = _COSINE,
    consistency: Consistency = _STRICT,
    ef_search: int = _Int(100),
    pool_max: int = _Int(20),
    pool_idle_s: float = _Float(30),
    connect_timeout_s: float = _Float(2),
    statement_timeout_s: float = _Float(30),
    **settings: Any,
) -> "VectorStore":
    """Open a store. What is not given comes from VECTORKEEP_... in the environment.

    Without a database URL and without POSTGRES_HOST the embedded servers are started, and migrated; any
    other database must be at the newest revision. `redis_url=False` means no cache. `distance` is that of a new
    store; a store that has another one is not opened where it is given.

    Raises UnavailableError, SchemaError, ValidationError, DimensionError.
    """
    given = {
        "database_url": database_url,
        "redis_url": redis_url,
        "model_id": model_id or (embedder.model_id if embedder else None),
        "dimensions": dimensions or (embedder.dimensions if embedder else None),
        "distance": distance,
        "consistency": consistency,
        "ef_search": ef_search,
        "pool_max": pool_max,
        "pool_idle_s": pool_idle_s,
        "connect_timeout_s": connect_timeout_s,
        "statement_timeout_s": statement_timeout_s,
    }
    chosen = {name: value for name, value in given.items() if value is not None and not isinstance(value, _Default)}
    loaded = Settings.load({**chosen, **settings})
    with translated():
        return VectorStore(OpenParts(loaded), embedder)


def _call(method: Callable[Concatenate["VectorStore", P], R]) -> Callable[Concatenate["VectorStore", P], R]:
    """A public call: refused on a closed store, drivers' errors raised as ours."""

    @wraps(method)
    def call(store: "VectorStore", /, *args: P.args, **kwargs: P.kwargs) -> R:
        store._check_open()
        with translated():
            return method(store, *args, **kwargs)

    return call


class VectorStore(AbstractContextManager["VectorStore"]):
    """An open store. Threads may share it; processes must not: open one in each.

    Use `connect` to make one. Every call raises ClosedError after `close`, and UnavailableError where the
    server cannot be reached or cannot serve after several tries.
    """

    engine: sqlalchemy.Engine
    pool: psycopg_pool.ConnectionPool[Any]
    cache_client: redis.Redis | None

    def __init__(self, parts: OpenParts, embedder: Embedder | None) -> None:
        self._parts = parts
        self._embedder = embedder
        self.pool, self.engine = parts.database.pool, parts.database.engine
        self.cache_client = parts.cache.client if parts.cache else None

    @property
    def model(self) -> Model | None:
        """The registered embedding model, or None while no vector was ever stored."""
        return self._parts.model.registered

    @property
    def settings(self) -> Settings:
        return self._parts.settings

    # -- writing ---------------------------------------------------------------------------------------

    @_call
    def batch_upsert(
        self,
        documents: Iterable[Document | Mapping[str, Any]],
        *,
        batch_size: int = 1000,
        bulk: bulk_load.Bulk = "auto",
        on_progress: Progress | None = None,
    ) -> UpsertResult:
        """Insert or update `documents`, a batch a transaction; rows that did not change are not touched.

        A document that is not valid, or that the server refuses, is listed in `errors` and stops no other.
        `documents` may be a generator of any length. It is read one batch ahead of what is written:
        `on_progress(processed, total)` is called for a batch, or what its write raised is raised, once the next one was
        read. A batch ends early where its texts come to 16 Mi characters. `bulk` decides whether vector indexes are
        built after the rows, see `db.bulk_load`; only True raises BusyError, where another bulk load runs.

        Raises ValidationError for a bad argument; UnavailableError, ClosedError, PausedError, SchemaError or
        PermissionDeniedError where nothing more can be written. The batches before it are stored.
        """
        check_count("batch_size", batch_size, MAX_BATCH)
        check_bulk(bulk)
        tally = _callers_tally(documents, on_progress)
        with self._parts.metrics.measure("batch_upsert") as operation:
            with bulk_load.chosen(self._parts.database, self._parts.model, bulk, tally):
                self._ingestion().upsert(callers_inputs(documents), batch_size, tally)
            operation.counts = _counts(tally, "inserted", "updated", "unchanged", "superseded", "failed")
        return UpsertResult(**operation.counts, errors=tally.errors, duration_ms=operation.elapsed_ms)

    @_call
    def embed_batch(
        self,
        items: Iterable[Item | Mapping[str, Any]],
        *,
        embedder: Embedder | None = None,
        batch_size: int = 1000,
        bulk: bulk_load.Bulk = "auto",
        on_progress: Progress | None = None,
    ) -> EmbedResult:
        """Chunk, embed and store those of `items` that changed; the rest are skipped before anything is embedded.

        Where only metadata or source changed, the row is updated and nothing is embedded. An exception of the
        embedder passes through; the batches before it are stored, and running again finishes the rest. `bulk` and
        `on_progress` are those of `batch_upsert`.
        """
        check_count("batch_size", batch_size, MAX_BATCH)
        check_bulk(bulk)
        texts = self._text_embedder(embedder)
        tally = _callers_tally(items, on_progress)
        with self._parts.metrics.measure("embed_batch") as operation:
            with bulk_load.chosen(self._parts.database, self._parts.model, bulk, tally):
                self._ingestion().embed(callers_inputs(items), texts, batch_size, tally)
            operation.counts = _embed_counts(tally, texts, deleted=0)
        return EmbedResult(**operation.counts, errors=tally.errors, duration_ms=operation.elapsed_ms)

    @_call
    def sync(
        self,
        items: Iterable[Item | Mapping[str, Any]],
        *,
        source_id: str,
        allow_empty: bool = False,
        dry_run: bool = False,
        embedder: Embedder | None = None,
        batch_size: int = 1000,
        bulk: bulk_load.Bulk = "auto",
        keep: Callable[[str], bool] | None = None,
        on_progress: Progress | None = None,
        wait_s: float = 0,
    ) -> EmbedResult:
        """Bring one source to exactly what `items` holds; their own `source_id` is not looked at.

        Documents of the source that `items` does not hold are deleted after the whole iteration ended well. An
        item that is not valid keeps what is stored of it, and so does a document for which `keep(id)`, asked at the
        end, is true: one that could not be read. No items at all need `allow_empty`. `dry_run` only counts.
        Another sync of the source is waited for up to `wait_s` seconds, then BusyError says who runs it. `bulk`
        and `on_progress` are those of `batch_upsert`.
        """
        check_count("batch_size", batch_size, MAX_BATCH)
        check_bulk(bulk)
        check_key("source_id", source_id)
        texts = self._text_embedder(embedder, register=not dry_run)
        tally = _callers_tally(items, on_progress)
        bulk = False if dry_run else bulk
        with self._parts.metrics.measure("sync_dry_run" if dry_run else "sync") as operation:
            deleted = SourceSync(self._ingestion(), source_id, tally).run(
                callers_inputs(items),
                texts,
                batch_size=batch_size,
                allow_empty=allow_empty,
                dry_run=dry_run,
                keep=keep or (lambda _: False),
                wait_s=wait_s,
                bulk=bulk_load.chosen(self._parts.database, self._parts.model, bulk, tally),
            )
            operation.counts = _embed_counts(tally, texts, deleted)
        return EmbedResult(**operation.counts, errors=tally.errors, duration_ms=operation.elapsed_ms)

    @contextmanager
    def bulk_load(self, *, only_into_empty: bool = False) -> Iterator[None]:
        """Inside, rows are written without vector indexes; at the end they are built, online and in parallel.

        Searches go on and compare all rows meanwhile. Large writes into an empty store do this by themselves;
        `only_into_empty` does it for several calls together, and nothing where a row is stored or another bulk
        load runs. Else BusyError is raised where another runs.
        """
        self._check_open()
        database, model = self._parts.database, self._parts.model
        load = bulk_load.automatic(database, model, None) if only_into_empty else bulk_load.bulk_load(database, model)
        with translated(), load, of_caller():
            yield

    @_call
    def delete(self, ids: Sequence[str]) -> DeleteResult:
        """Delete documents with their chunks, in one transaction. Ids that do not exist are passed over."""
        checked = check_ids(ids)
        with self._parts.metrics.measure("delete") as operation:
            return self._delete(operation, lambda transaction: deletion.delete_ids(transaction, checked))

    @_call
    def delete_by_source_id(self, source_id: str, *, cascade: bool = True) -> DeleteResult:
        """Delete all documents of a source in one transaction, their chunks with them.

        `cascade` False keeps the chunks, detached: `document_id` NULL, `origin_id` what it was.
        """
        check_key("source_id", source_id)
        with self._parts.metrics.measure("delete_by_source_id") as operation:
            return self._delete(
                operation, lambda transaction: deletion.delete_source(transaction, source_id, cascade=cascade)
            )

    def _delete(self, operation: Operation, work: Callable[[Any], DeleteResult]) -> DeleteResult:
        result = run_write(self._parts.database, work, after_commit=self._parts.after_commit, unlimited=True)
        operation.counts = {"deleted": result.deleted, "chunks_removed": result.chunks_removed}
        return result

    @_call
    def cleanup_orphaned(
        self,
        *,
        dry_run: bool = False,
        batch_size: int = 1000,
        min_age: timedelta | None = None,
        on_progress: Progress | None = None,
    ) -> CleanupResult:
        """Remove chunks without a document and documents without any vector, then VACUUM (ANALYZE).

        `dry_run` counts all of them and changes nothing. `min_age` spares what was created since. Each batch is
        one short transaction. Validates the foreign key from chunks to documents where it was not yet.
        """
        check_count("batch_size", batch_size, MAX_BATCH)
        check_min_age(min_age)
        if dry_run:
            return orphans.report_orphans(self._parts.database, min_age)
        with self._parts.metrics.measure("cleanup_orphaned") as operation:
            result = orphans.remove_orphans(
                self._parts.database,
                batch_size=batch_size,
                min_age=min_age,
                after_commit=self._parts.after_commit,
                on_progress=on_progress,
            )
            operation.counts = {"chunks": result.orphaned_chunks, "embeddings": result.orphaned_embeddings}
        return result

    @contextmanager
    def transaction(self) -> Iterator[sqlalchemy.Connection]:
        """A transaction for the caller's own SQL. What it writes is told with `record_write` before it ends.

        Inside it, searches of this thread neither read nor fill the cache. Raises PausedError while ingestion is
        paused, or waits for its end, as the setting `on_pause` says; SchemaError where the store was moved to another
        model. A lock that another session holds is waited for a little shorter than a statement may take.
        """
        self._check_open()
        token = _in_transaction.set(True)
        told: list[LoggedWrite] = []
        try:
            with translated(), begin_write(self._parts.database) as connection:
                connection.info["vectorkeep_writes"] = told
                yield connection
        finally:
            _in_transaction.reset(token)
        for write in told:
            self._parts.after_commit(write)

    @_call
    def record_write(
        self,
        connection: sqlalchemy.Connection,
        *,
        sources: Sequence[str] = (),
        workspaces: Sequence[str] = (),
        everything: bool = False,
    ) -> None:
        """Tell what the caller's own SQL changes on `connection`, in the same transaction, before it commits.

        Name the old and the new sources and workspaces of every changed row, or `everything`. Where
        `vectorkeep migrate --with-triggers` made triggers, statements on the tables need not be told.
        """
        if isinstance(sources, str) or isinstance(workspaces, str):
            raise ValidationError("sources or workspaces is a string; expected a sequence of them")
        tags = {source_tag(check_key("source", s)) for s in sources}
        tags |= {workspace_tag(check_key("workspace", w)) for w in workspaces}
        if not tags and not everything:
            raise ValidationError("nothing is named; give sources, workspaces or everything=True")
        write = log_write(connection, ["all", "store"] if everything else bounded_tags(tags))
        connection.info.setdefault("vectorkeep_writes", []).append(write)

    # -- reading ---------------------------------------------------------------------------------------

    @_call
    def search(
        self,
        query: Vector | str,
        k: int = 10,
        *,
        workspace: str | None = None,
        source_id: str | None = None,
        where: Mapping[str, Any] | None = None,
        level: Level = "documents",
        consistency: Consistency | None = None,
        ef_search: int | None = None,
        exact: bool = False,
    ) -> SearchResult:
        """The `k` nearest documents or chunks to a vector, or to a text that the store's embedder embeds.

        Fewer than `k` come back only where no more exist that pass the filters. Where few pass, all of them are
        compared; if that takes longer than `statement_timeout_s`, or is cancelled, what the index brought comes back
        and `complete` is False. An answer from the cache is as fresh as one from the database, unless `consistency`
        is "bounded".

        Raises ValidationError for a bad filter, k or vector; DimensionError for one of another length; SchemaError
        where stored vectors are of another length, written by other means; UnavailableError where the time is over
        and the index brought nothing, or was not to be asked.
        """
        consistency = check_consistency(self._parts.settings.consistency if consistency is None else consistency)
        filters = Filter(workspace, source_id, where)
        with self._parts.metrics.measure("search") as operation:
            vector = self._embed_query(query) if isinstance(query, str) else vectors.as_vector(query)
            model = self.model or self._reload_model()
            if ef_search is None:
                ef_search = model.ef_search_of(self.settings) if model else self.settings.ef_search
            wanted = Query(vector, k, level, filters, ef_search, exact)
            if model is None:
                return SearchResult(hits=(), complete=True, cached=False, exact=True)
            model.check_query(vector)
            self._parts.query_sampler.offer(model.model_id, level, vector)
            cache = None if _in_transaction.get() else self._parts.cache
            result = retried(
                lambda: reading.search(self._parts.database, self._parts.searcher, cache, wanted, model, consistency)
            )
            operation.counts = {"hits": len(result), "cached": result.cached, "exact": result.exact}
        return result

    @_call
    def embed(self, text: str) -> NDArray[np.float32]:
        """The vector of one text, float32, shape (dimensions,), through the vector cache."""
        return self._embed_query(text)

    @_call
    def get(self, ids: Sequence[str]) -> list[Document]:
        """The documents of `ids` with their chunks, in the order asked; missing ones are left out."""
        checked = check_ids(ids)
        return retried(lambda: reading.get_documents(self.engine, checked))

    @_call
    def iter_hashes(self, source_id: str | None = None, *, batch_size: int = 1000) -> Iterator[StoredHash]:
        """The hashes of all stored documents, or of one source's, in order of id; one batch is in memory at a time.

        They are those of one moment: the iterator holds a connection and its snapshot until it ends or is
        closed, and while it does no VACUUM removes what died since. Close one that is not read to its end.
        """
        check_count("batch_size", batch_size, MAX_BATCH)
        if source_id is not None:
            check_key("source_id", source_id)
        return reading.iter_hashes(self._parts.database, source_id, batch_size)

    @_call
    def get_statistics(self, workspace: str | None = None) -> Statistics:
        """Counts of the store or of one workspace; the store's storage, index health and performance."""
        if workspace is not None:
            check_key("workspace", workspace)
        return retried(
            lambda: statistics.get_statistics(self._parts.database, self.model or self._reload_model(), workspace)
        )

    @_call
    def get_diagnostics(self) -> Diagnostics:
        """Rows, schema revision, location without its password, and the state of the document index."""
        model = self.model or self._reload_model()
        return retried(lambda: statistics.get_diagnostics(self._parts.database, model))

    @_call
    def measure_recall(
        self,
        *,
        k: int = 10,
        sample: int = 200,
        level: Level = "documents",
        workspace: str | None = None,
        where: Mapping[str, Any] | None = None,
        ef_search: int | None = None,
        deadline_s: float = 600,
        on_progress: Progress | None = None,
    ) -> RecallReport:
        """Compare the store's own searches with exact answers to the same `sample` questions.

        The questions are stored vectors picked at random and, where there is no filter, vectors lately searched
        for. `ef_search` is what searches use by default. All rows are compared for each question, for `deadline_s`
        at most: then the report is of the questions until there. Kept in `recall_measurements`.

        Raises ValidationError where nothing can be asked, MeasurementError where no exact answer can be had.
        """
        model = self.model or self._reload_model()
        if model is None:
            raise ValidationError("there is nothing to measure: no vector was ever stored; store some first")
        request = RecallRequest(
            ef_search=model.ef_search_of(self.settings) if ef_search is None else ef_search,
            target=self.settings.target_recall,
            k=k,
            sample=sample,
            level=level,
            filter=Filter(workspace, None, where),
            deadline_s=deadline_s,
            on_progress=on_progress,
        )
        with self._parts.database.maintenance() as connection:
            return recall.measure_recall(connection, self._parts.searcher, model, request)

    # -- keeping ---------------------------------------------------------------------------------------

    @_call
    def maintain(
        self,
        *,
        skip_compaction: bool = False,
        skip_index: bool = False,
        skip_cleanup: bool = False,
        retention_days: float = 7,
        index_stale_threshold: float = 0.1,
        dry_run: bool = False,
        deadline_s: float | None = None,
        cancel: Event | None = None,
        on_progress: StepProgress | None = None,
    ) -> MaintenanceResult:
        """Remove what is past its time, build and rebuild indexes, vacuum, tune searches: each where it is due.

        One process at a time: a second caller gets BusyError, which says who runs. Steps are independent; what
        failed, was not permitted or not reached is said in `steps`. `deadline_s` seconds from now, or when `cancel`
        is set, the running step is stopped and the rest not begun; nothing half-built is left. An index is rebuilt
        beyond `index_stale_threshold` (the dead share of what it holds), below it where VACUUM is due and would take
        longer. `dry_run` says what would be done. `on_progress(step, details)` is told of each step, and every
        second how far a build is.
        """
        if _in_transaction.get():
            raise ValidationError("maintain() cannot run inside transaction(); call it after the block")
        plan = maintenance.MaintenancePlan(
            skip_compaction=skip_compaction,
            skip_index=skip_index,
            skip_cleanup=skip_cleanup,
            retention_days=retention_days,
            index_stale_threshold=index_stale_threshold,
            dry_run=dry_run,
            deadline_s=deadline_s,
            cancel=cancel,
            on_progress=on_progress,
        )
        result = maintenance.maintain(
            self._parts.database, self.model or self._reload_model(), plan, self._parts.deliver_invalidations
        )
        self._parts.model.refresh_tuning()
        return result

    @_call
    def pause_ingestion(self, reason: str, *, ttl_s: float = 3600) -> None:
        """Stop all writes to the store, by whichever process; searches go on. Returns when none is under way any more.

        Writers wait or get PausedError, as their setting `on_pause` says. The pause ends with `resume_ingestion`,
        after `ttl_s`, or when this store is closed or its process dies. Again: the pause begins anew.
        Raises BusyError where another's pause is in force, or where a write does not end within a minute.
        """
        if _in_transaction.get():
            raise ValidationError("pause_ingestion() cannot run inside transaction(), whose end it would wait for")
        self._parts.pause.begin(reason, ttl_s=ttl_s)

    @_call
    def resume_ingestion(self) -> None:
        """End the pause of ingestion, whoever took it."""
        self._parts.pause.end()

    @_call
    def doctor(self, *, fix: bool = False) -> list[Finding]:
        """Look at the store, its servers and its cache: findings of every check, with evidence and remedy.

        `fix` mends what is safe while everybody works; documents and chunks are never touched. A check that
        cannot look is a finding, too.
        """
        return doctor.examine(self.settings, fix=fix, database=self._parts.database)

    def close(self, *, deadline_s: float = 30, maintain: bool | None = None) -> None:
        """Write what metrics wait, give all connections back, leave the embedded servers. Safe to call twice.

        `maintain` True runs `maintain` first, for at most `deadline_s`. None leaves it to the setting
        `maintenance_on_close`: then it runs only where the last good run is longer ago than `maintenance_due_s`,
        where nobody else is at work in the database, and in one process at a time. The store closes in any case;
        MaintenanceIncomplete is raised afterwards where a step failed or was not reached.
        """
        if not self._parts.mark_closed():
            return
        unfinished: list[str] = []
        try:
            if maintain or (maintain is None and self.settings.maintenance_on_close):
                self._parts.metrics.close()  # else its own background work would pass for somebody's
                unfinished = maintenance.before_close(
                    self._parts.database, self.model, deadline_s, asked=maintain is True
                )
        finally:
            self._parts.close()
        if unfinished:
            raise MaintenanceIncomplete(f"the store is closed, but not done: {'; '.join(unfinished)}")

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        """Close; after an exception at once, so that no maintenance delays it or raises an error in its place."""
        self.close(maintain=None if exc_type is None else False)

    def __repr__(self) -> str:
        state = "closed" if self._parts.closed else "open"
        return f"<VectorStore {self._parts.database.location} {state}>"

    # -- within ----------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._parts.closed:
            raise ClosedError("the store is closed; open another with db.connect(...)")

    def _ingestion(self) -> Ingestion:
        return Ingestion(self._parts.database, self._parts.model, self._parts.after_commit)

    def _text_embedder(self, embedder: Embedder | None, *, register: bool = True) -> TextEmbedder:
        """`embedder`, or the store's own, checked against the store's model, behind the vector cache."""
        chosen = embedder or self._embedder
        if chosen is None:
            raise ValidationError("the store has no embedder; give one to connect(embedder=...) or to this call")
        check_key("model_id of the embedder", chosen.model_id)
        check_count("dimensions of the embedder", chosen.dimensions, vectors.MAX_DIMENSIONS)
        model = self._parts.model.register(chosen.dimensions, chosen.model_id) if register else self.model
        if model is not None and (model.model_id, model.dimensions) != (chosen.model_id, chosen.dimensions):
            raise SchemaError(
                f"the embedder is {chosen.model_id!r} of {chosen.dimensions} dimensions, the store's model is "
                f"{model.model_id!r} of {model.dimensions}; vectors of two models cannot be compared"
            )
        return TextEmbedder(self._parts.database, chosen, self._parts.chunker)

    def _embed_query(self, text: str) -> NDArray[np.float32]:
        check_text(text, "the text to embed")
        [vector] = self._text_embedder(None, register=False).embed_texts([text]).values()
        return vector

    def _reload_model(self) -> Model | None:
        """The model, read again: another process may have registered it since this store was opened."""
        self._parts.model.load()
        return self.model


def _callers_tally(inputs: Iterable[Any], on_progress: Progress | None) -> Tally:
    return Tally(total_of(inputs), on_progress and of_caller()(on_progress))


def _counts(tally: Tally, *names: str) -> dict[str, int]:
    return {name: tally[name] for name in names}


def _embed_counts(tally: Tally, texts: TextEmbedder, deleted: int) -> dict[str, int]:
    return _counts(tally, "inserted", "updated", "superseded", "failed") | {
        "skipped": tally["unchanged"],
        "deleted": deleted,
        "cache_hits": texts.cache_hits,
        "embedded": texts.embedded,
    }
