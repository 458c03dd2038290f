"""Stopping a statement that runs: when a deadline passes, or when somebody sets an event."""

import threading
import time
from contextlib import suppress
from threading import Event
from types import TracebackType
from typing import Any

import psycopg
from psycopg import Connection

_POLL_S = 0.05
_CANCEL_TIMEOUT_S = 2.0


class Interruption:
    """Why work has to end, once it has to.

    `with interruption.watching(connection):` cancels what runs there, and whatever begins there after it, until
    the block is left. The block sees `psycopg.errors.QueryCanceled`.
    """

    def __init__(self, deadline_s: float | None = None, cancel: Event | None = None) -> None:
        self._deadline_s = deadline_s
        self._started = time.monotonic()
        self._cancel = cancel

    @property
    def reason(self) -> str | None:
        """None while work may go on."""
        if self._cancel is not None and self._cancel.is_set():
            return "the run was cancelled"
        if self._deadline_s is not None and time.monotonic() - self._started >= self._deadline_s:
            return f"the deadline of {self._deadline_s:g} s has passed"
        return None

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - (time.monotonic() - self._started))

    def watching(self, connection: Connection[Any]) -> "_Watch":
        return _Watch(self, connection)


class _Watch:
    def __init__(self, interruption: Interruption, connection: Connection[Any]) -> None:
        self._interruption = interruption
        self._connection = connection
        self._left = Event()
        self._thread = threading.Thread(target=self._run, name="vectorkeep-watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._left.wait(_POLL_S):
            if self._interruption.reason is not None:
                with suppress(psycopg.Error):  # a lost connection has nothing left to be cancelled
                    self._connection.cancel_safe(timeout=_CANCEL_TIMEOUT_S)
