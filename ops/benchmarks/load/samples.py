"""What is looked at every second while a load runs: memory and open files of each process, sessions on the server."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from psycopg import Connection

from .plan import LoadPlan
from .workers import WorkerProcess

_EVERY_S = 1.0
_TELL_EVERY_S = 10.0
# At the beginning pools, caches and the interpreter's own memory fill.
_WARM_UP_S = 60.0
_WINDOW_S = 60.0
# A shorter run says nothing about growth.
_JUDGED_FROM_S = 120.0

_SESSIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


@dataclass(frozen=True)
class Trend:
    """How something went: medians of the first and of the last window after the warm-up, and the slope between.

    judged: whether the time between them is long enough to speak of growth.
    """

    first: float
    last: float
    slope_a_minute: float
    window_s: float
    judged: bool

    @property
    def growth(self) -> float:
        return self.last - self.first


def trend(times_s: Sequence[float], values: Sequence[float]) -> Trend | None:
    """The trend of `values` at `times_s` (ascending, from the start of the run); None without any.

    The slope is that of the least-squares line through all samples after the warm-up.
    """
    if not times_s:
        return None
    whole_s = times_s[-1]
    warm_up_s = min(_WARM_UP_S, whole_s / 4)
    window_s = min(_WINDOW_S, (whole_s - warm_up_s) / 3)
    warm = [(t, v) for t, v in zip(times_s, values, strict=True) if t >= warm_up_s]
    # Of a process that soon died there may be one sample or two: each window has one at least.
    first = [v for t, v in warm if t <= warm_up_s + window_s] or [warm[0][1]]
    last = [v for t, v in warm if t >= whole_s - window_s]
    times, levels = zip(*warm, strict=True)
    slope = float(np.polyfit(times, levels, 1)[0]) * 60 if len(warm) > 1 else 0.0
    judged = whole_s - warm_up_s >= _JUDGED_FROM_S
    return Trend(median(first), median(last), slope, window_s, judged)


@dataclass
class Samples:
    """What was seen, a value a second."""

    times_s: list[float] = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)
    memory_mb: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    files: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def look(self, seconds: float, workers: Sequence[WorkerProcess], connection: Connection[Any]) -> bool:
        """Note how it is now. False where no process works any more."""
        [(sessions,)] = connection.execute(_SESSIONS).fetchall()
        self.times_s.append(seconds)
        self.sessions.append(sessions)
        held = {worker.number: resources for worker in workers if (resources := worker.resources()) is not None}
        for number, (memory_mb, files) in held.items():
            self.memory_mb.setdefault(number, []).append((seconds, memory_mb))
            self.files.setdefault(number, []).append((seconds, files))
        return bool(held)

    def sessions_trend(self) -> Trend | None:
        return trend(self.times_s, self.sessions)

    def memory_trends(self) -> dict[int, Trend]:
        return _trends(self.memory_mb)

    def file_trends(self) -> dict[int, Trend]:
        return _trends(self.files)


def _trends(seen: dict[int, list[tuple[float, float]]]) -> dict[int, Trend]:
    found = {number: trend(*zip(*values, strict=True)) for number, values in seen.items()}
    return {number: value for number, value in found.items() if value is not None}


def watch(
    plan: LoadPlan, workers: Sequence[WorkerProcess], connection: Connection[Any], say: Callable[[str], None]
) -> Samples:
    """Look every second until the plan's time is over, or until no process works any more."""
    samples = Samples()
    started = time.monotonic()
    tell_at = _TELL_EVERY_S
    while (seconds := time.monotonic() - started) < plan.seconds:
        if not samples.look(seconds, workers, connection):
            break
        if seconds >= tell_at:
            memory = sum(values[-1][1] for values in samples.memory_mb.values())
            say(f"  {seconds:.0f} s: {samples.sessions[-1]} connections, {memory:.0f} MB in all processes")
            tell_at += _TELL_EVERY_S
        time.sleep(min(_EVERY_S, max(0.0, plan.seconds - (time.monotonic() - started))))
    return samples
