"""The parts of an open store: opened in order, told of each commit, closed in order."""

import threading
import time
from collections import deque

from . import embedded, migrate
from .bulk_load import warn_of_missing_indexes
from .chunking import Chunker
from .config import Settings
from .engine import Database, connect_directly, require_versions
from .metrics import MetricsRecorder
from .pause import SessionPause
from .query_cache import QueryCache
from .query_samples import QuerySampler
from .registry import StoreModel
from .search import Searcher
from .transactions import LoggedWrite

# How long a store may search with what another process has tuned anew since.
_REFRESH_EVERY_S = 30.0
# So many delivered writes at most wait to be marked as such; the oldest beyond that are delivered once more.
_MAX_DELIVERED = 10_000


class OpenParts:
    """What a store works with. The embedded servers are started, and migrated, where no database is named."""

    def __init__(self, settings: Settings) -> None:
        """Raises UnavailableError, SchemaError, DimensionError; then nothing stays open."""
        self.settings = settings
        url = settings.postgres_url()
        self._servers = None if url else embedded.acquire(settings.home, settings=settings.embedded_settings)
        try:
            self.database = Database(url or self._prepare_embedded(), settings)
            self._check_schema()
            self.database.open()
            self.model = StoreModel(self.database)
            self.model.load()
            warn_of_missing_indexes(self.database, self.model.registered)
            self.chunker = Chunker(settings.chunk_size, settings.chunk_overlap)
            self.cache = self._make_cache()
        except BaseException:
            self._close_connections()
            raise
        self.pause = SessionPause(self.database)
        self.searcher = Searcher()
        self.query_sampler = QuerySampler(self.database)
        self.metrics = MetricsRecorder(self.database, background=self._work_in_background)
        self._refresh_at = time.monotonic() + _REFRESH_EVERY_S
        self._delivered: deque[int] = deque(maxlen=_MAX_DELIVERED)
        self._closing = threading.Lock()
        self.closed = False

    def _prepare_embedded(self) -> str:
        assert self._servers is not None
        migrate.upgrade(self._servers.database_url)
        return self._servers.database_url

    def _check_schema(self) -> None:
        with connect_directly(self.database.url, self.settings) as connection:
            migrate.require_head(connection)
            require_versions(connection)

    def _make_cache(self) -> QueryCache | None:
        url = self.settings.redis_url
        if url is None and self._servers is not None:
            url = self._servers.redis_url
        return QueryCache(self.database, QueryCache.connect(url, self.settings), self.settings) if url else None

    def after_commit(self, write: LoggedWrite) -> None:
        """Tell Redis of a committed write. What it did not take is delivered in the background, later."""
        if self.cache is not None and self.cache.deliver(write):
            self._delivered.append(write.id)
        self.metrics.start()

    def _work_in_background(self) -> None:
        self._deliver()
        self.query_sampler.flush(closing=self.closed)
        if time.monotonic() > self._refresh_at and not self.closed:
            self._refresh_at = time.monotonic() + _REFRESH_EVERY_S
            self.model.refresh_tuning()

    def _deliver(self) -> None:
        """Off the callers' path: note which writes were delivered, and deliver those that were not."""
        if self.cache is None:
            return
        delivered = [self._delivered.popleft() for _ in range(len(self._delivered))]
        if delivered:
            self.cache.mark_delivered(delivered)
        self.cache.deliver_undelivered()

    def deliver_invalidations(self) -> str:
        """Deliver to Redis what no process has. Says how many writes that was. Raises UnavailableError."""
        if self.cache is None:
            return "there is no cache"
        delivered = 0
        while some := self.cache.deliver_undelivered():
            delivered += some
        return f"delivered {delivered} writes" if self.cache.breaker.closed else "Redis cannot be reached now"

    def mark_closed(self) -> bool:
        """From now on calls are refused. False where that was so already."""
        with self._closing:
            was_open, self.closed = not self.closed, True
        return was_open

    def close(self) -> None:
        """Write what metrics wait, give all connections back, leave the embedded servers."""
        self.pause.close()
        self.metrics.close()
        if self.cache is not None:
            self.cache.client.close()
        self._close_connections()

    def _close_connections(self) -> None:
        if hasattr(self, "database"):
            self.database.close()
        if self._servers is not None:
            self._servers.release()
