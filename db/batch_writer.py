"""One batch is written while the caller makes the next one ready."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

R = TypeVar("R")
T = TypeVar("T")

# The rows of a batch are sent before the next one is begun, if that takes no longer: the server works on what it has,
# while two threads that both compute would only take the interpreter's lock from each other.
_HEAD_START_S = 0.02
# So many inputs are made ready before the thread that writes may have that lock. Of itself a thread that computes gives
# it up every 5 ms only, and as long the server would wait for the next statement. sleep(0) takes some 80 µs, in which
# the other thread wakes up; a shorter way to give way takes the lock back before that.
_GIVE_WAY_EVERY = 64


class BatchWriter(Generic[R]):
    """A thread that writes, one batch at a time. As a context manager it ends with nothing under way.

    stopped: set where the caller is being ended, by Ctrl-C for one: a write that only waits gives up then.
    sent: for a write to set when it has sent its rows.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.sent = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vectorkeep-writer")
        self._first = True
        self._ids: Set[str] = frozenset()
        self._write: Future[R] | None = None
        self._done: Callable[[R], None]

    def __enter__(self) -> "BatchWriter[R]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None or issubclass(kind, Exception):
                self.finish()
            else:  # nothing takes the place of what ends the caller
                self.stopped.set()
        finally:
            self._thread.shutdown()

    def start(self, ids: Set[str], write: Callable[[], R], done: Callable[[R], None], *, full: bool) -> None:
        """`write` a batch with these ids, in the thread. The one before must be finished.

        done: called by `finish` with what `write` returned.
        Without the thread, and what it raises is raised here, where that would gain nothing: nothing is to be written,
        or this is the first batch and not a full one, so probably the only one. Waking a thread takes longer.
        """
        self._ids, self._done = ids, done
        only, self._first = self._first and not full, False
        self._write = self._submit(write) if ids and not only else _write_here(write)

    def _submit(self, write: Callable[[], R]) -> "Future[R]":
        self.sent.clear()
        try:
            submitted = self._thread.submit(self._send, write)
        except RuntimeError:  # the main thread has ended, and with it no other thread may begin; or there are too many
            self._thread.shutdown(cancel_futures=True)
            return _write_here(write)
        self.sent.wait(_HEAD_START_S)
        return submitted

    def _send(self, write: Callable[[], R]) -> R:
        try:
            return write()
        finally:
            self.sent.set()

    def beside(self, batch: Iterable[T]) -> Iterator[T]:
        """The inputs of the next batch, to be made ready while the one before is written."""
        for place, given in enumerate(batch):
            if place % _GIVE_WAY_EVERY == 0 and self._write is not None and not self._write.done():
                time.sleep(0)
            yield given

    def overlaps(self, ids: Iterable[str]) -> bool:
        """Whether the batch under way has one of the `ids`: what is stored of them is not known before it ends."""
        return self._write is not None and bool(self._ids) and not self._ids.isdisjoint(ids)

    def finish(self) -> R | None:
        """Wait for the batch under way, if there is one, and tell that it is done, in the caller's thread.

        Returns what its write returned, once; what it raised is raised here.
        """
        write, self._write = self._write, None
        if write is None:
            return None
        returned = write.result()
        self._done(returned)
        return returned


def _write_here(write: Callable[[], R]) -> "Future[R]":
    """What `write()`, called now, returned, as a future that is done."""
    written: Future[R] = Future()
    written.set_result(write())
    return written
