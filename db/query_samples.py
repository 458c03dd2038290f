"""A small sample of the vectors that were really asked for: recall of stored vectors alone flatters an index.

Only vectors are kept, no text and nothing of who asked. The setting `query_samples` is how many are kept of each
level; 0 keeps none.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import Connection
from psycopg import errors as pg

from . import vectors
from .engine import BACKGROUND_WAIT_S, Database
from .types import Level

logger = logging.getLogger("vectorkeep")

# At most so many are written at once, and not more often than this: a sample, not a log.
_PER_FLUSH = 4
_FLUSH_EVERY_S = 10.0

_DO_NOT_WAIT = "SET LOCAL lock_timeout = '500ms'"
_INSERT = "INSERT INTO query_samples (model_id, level, embedding) VALUES (%s, %s, %s::vector)"
_KEEP_NEWEST = """
    DELETE FROM query_samples
    WHERE level = %(level)s
      AND id <= (SELECT id FROM query_samples WHERE level = %(level)s ORDER BY id DESC OFFSET %(kept)s LIMIT 1)
"""
_NEWEST = """
    SELECT vector_send(embedding) FROM query_samples
    WHERE model_id = %s AND level = %s AND vector_dims(embedding) = %s ORDER BY id DESC LIMIT %s
"""


class QuerySampler:
    """Keeps a few of the queries since the last flush, each as likely as any other."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._kept_per_level = database.settings.query_samples
        self._clock = clock
        self._waiting: list[tuple[str, Level, bytes]] = []
        self._offered = 0
        self._flush_at = clock()
        self._lock = threading.Lock()

    def offer(self, model_id: str, level: Level, vector: NDArray[np.float32]) -> None:
        """Remember `vector`, perhaps: on the caller's path this costs a random number.

        Algorithm R, a reservoir: J. S. Vitter, Random Sampling with a Reservoir, ACM TOMS 11 (1985).
        """
        if not self._kept_per_level:
            return
        with self._lock:
            self._offered += 1
            place = len(self._waiting)
            if place == _PER_FLUSH:
                place = random.randrange(self._offered)
                if place >= _PER_FLUSH:
                    return
            self._waiting[place : place + 1] = [(model_id, level, vectors.encode(vector))]

    def flush(self, *, closing: bool = False) -> None:
        """Write what waits, and let go of the oldest. A role that may not write leaves no sample."""
        now = self._clock()
        with self._lock:
            if not self._waiting or (now < self._flush_at and not closing):
                return
            waiting, self._waiting = self._waiting, []
            self._offered, self._flush_at = 0, now + _FLUSH_EVERY_S
        try:
            self._write(waiting)
        except (pg.InsufficientPrivilege, pg.ReadOnlySqlTransaction):
            self._kept_per_level = 0
        except psycopg.Error as exc:
            logger.debug("query_samples.not_written", extra={"dropped": len(waiting), "reason": str(exc).strip()})

    def _write(self, samples: list[tuple[str, Level, bytes]]) -> None:
        rows = [(model_id, level, vectors.BinaryVector(data)) for model_id, level, data in samples]
        with self._database.connection(BACKGROUND_WAIT_S) as connection, connection.transaction():
            connection.execute(_DO_NOT_WAIT)
            connection.execute("SET LOCAL synchronous_commit = off")  # one that a crash loses is no loss
            connection.cursor().executemany(_INSERT, rows)
            for level in sorted({level for _, level, _ in samples}):
                connection.execute(_KEEP_NEWEST, {"level": level, "kept": self._kept_per_level})


def newest_queries(
    connection: Connection[Any], model_id: str, dimensions: int, level: Level, limit: int
) -> list[NDArray[np.float32]]:
    """The vectors last asked for, at most `limit`, float32, shape (dimensions,) each."""
    rows = connection.execute(_NEWEST, (model_id, level, dimensions, limit)).fetchall()
    return [vectors.decode(data) for (data,) in rows]
