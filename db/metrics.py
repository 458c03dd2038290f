"""Operation metrics, recorded off the caller's path: buffered, bounded, flushed in the background."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson
from psycopg import errors as pg

from .engine import BACKGROUND_WAIT_S, Database

logger = logging.getLogger("vectorkeep")

_MAX_BUFFERED = 10_000
_FLUSH_EVERY_S = 2.0

# A table locked by somebody must not keep a connection from the callers, nor a store from closing.
_DO_NOT_WAIT = "SET LOCAL lock_timeout = '500ms'"
_INSERT = """
    INSERT INTO performance_metrics (operation, duration_ms, success, error_message, metadata, created_at)
    SELECT * FROM unnest(%s::text[], %s::float8[], %s::bool[], %s::text[], %s::jsonb[], %s::timestamptz[])
"""


@dataclass
class Operation:
    """One running operation. `counts` goes into the metric's metadata."""

    name: str
    counts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self.started) * 1000


class MetricsRecorder:
    """Records operations; a failing write of metrics never fails or slows what they measure.

    At most 10,000 wait to be written; the oldest are dropped beyond that. `background` is called by the
    same thread at each round: other work that must not be on a caller's path.
    """

    def __init__(self, database: Database, background: Callable[[], None]) -> None:
        self._database = database
        self._background = background
        self._buffer: deque[tuple[Any, ...]] = deque(maxlen=_MAX_BUFFERED)
        self._wake = threading.Event()
        self._closing = False
        self._warned: set[str] = set()
        self._refused = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, name: str) -> Iterator[Operation]:
        """Time the block as operation `name`, its success and error recorded."""
        operation = Operation(name)
        try:
            yield operation
        except BaseException as exc:
            self._record(operation, _storable(f"{type(exc).__name__}: {exc}"[:500]))
            raise
        self._record(operation, None)

    def _record(self, operation: Operation, error: str | None) -> None:
        counts = orjson.dumps(operation.counts).decode()
        row = (operation.name, operation.elapsed_ms, error is None, error, counts, datetime.now(UTC))
        self._buffer.append(row)
        self.start()

    def start(self) -> None:
        """Start the background thread, once. Where no thread can start, what waits is written at the close."""
        with self._lock, self._told("metrics.not_started"):
            if self._thread is None and not self._closing:
                thread = threading.Thread(target=self._run, name="vectorkeep-metrics", daemon=True)
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(_FLUSH_EVERY_S)
            self.flush()

    def flush(self) -> None:
        """Write what waits, and do the background's work. Never raises; what the server refuses is dropped.

        One does not wait for the other: where no metric can be written, invalidations are delivered all the same.
        """
        rows = [self._buffer.popleft() for _ in range(len(self._buffer))]
        with self._told("metrics.not_written"):
            self._write(rows)
        with self._told("background.not_done"):
            self._background()

    @contextmanager
    def _told(self, event: str) -> Iterator[None]:
        """Whatever fails in the block must not end the thread or reach a caller: one warning, the first time."""
        try:
            yield
        except Exception as exc:  # noqa: BLE001
            if event not in self._warned:
                logger.warning(event, extra={"reason": str(exc).strip()})
            self._warned.add(event)

    def _write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Keep `rows`. A role that only reads, or a tenant, leaves no metrics."""
        if not rows or self._refused:
            return
        try:
            with self._database.connection(BACKGROUND_WAIT_S) as connection, connection.transaction():
                connection.execute(_DO_NOT_WAIT)
                connection.execute(_INSERT, [list(column) for column in zip(*rows, strict=True)])
        except pg.InsufficientPrivilege as exc:
            logger.info("metrics.not_permitted", extra={"reason": str(exc).strip()})
            self._refused = True

    def close(self) -> None:
        """Stop the thread and write the rest."""
        with self._lock:
            self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if self._thread is None or not self._thread.is_alive():
            self.flush()


def _storable(text: str) -> str:
    """`text` as PostgreSQL can hold it: an embedder's message may quote anything."""
    return text.replace("\0", "").encode(errors="replace").decode()
