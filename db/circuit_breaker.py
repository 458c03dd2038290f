"""A circuit breaker for Redis: a server that does not answer is left alone for a while."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis

logger = logging.getLogger("vectorkeep")

_REST_S = 5.0


class CircuitBreaker:
    """Swallows Redis errors, and after one keeps callers away for five seconds.

    `failures` counts them. One warning is logged for each time that Redis stops answering, not for each call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open_until = 0.0
        self._failing = False
        self.failures = 0

    @property
    def closed(self) -> bool:
        """Whether Redis may be asked now. After a rest one caller is let through to try."""
        if not self._failing:
            return True
        with self._lock:
            now = time.monotonic()
            if now < self._open_until:
                return False
            self._open_until = now + _REST_S
            return True

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run the block; an error of Redis ends it quietly and opens the breaker."""
        try:
            yield
        except redis.RedisError as exc:
            self._fail(exc)
        else:
            self._failing = False

    def _fail(self, exc: redis.RedisError) -> None:
        with self._lock:
            first = not self._failing
            self._failing = True
            self._open_until = time.monotonic() + _REST_S
            self.failures += 1
        if first:
            logger.warning("cache.unavailable", extra={"reason": str(exc), "rest_s": _REST_S})
