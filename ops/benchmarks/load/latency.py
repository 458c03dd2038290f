"""Latencies of any number of calls in a space that does not grow: counts in buckets of a fixed relative width."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOWEST_S = 1e-5
_HIGHEST_S = 1e3
_RATIO = 1.02
_BUCKETS = math.ceil(math.log(_HIGHEST_S / _LOWEST_S, _RATIO)) + 1


class Latencies:
    """Counts of durations in buckets, each 2 % wider than the one before, from 10 µs to 1,000 s; the maximum exactly.

    The idea is that of HdrHistogram (G. Tene). What a percentile overstates is at most the width of a bucket.
    Of one thread: another has its own, and they are merged.
    """

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(_BUCKETS, np.int64)
        self.max_s = 0.0

    def add(self, seconds: float) -> None:
        bucket = math.ceil(math.log(max(seconds, _LOWEST_S) / _LOWEST_S, _RATIO))
        self._counts[min(bucket, _BUCKETS - 1)] += 1
        self.max_s = max(self.max_s, seconds)

    def merge(self, other: "Latencies") -> None:
        self._counts += other._counts
        self.max_s = max(self.max_s, other.max_s)

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    def percentile_s(self, percent: float) -> float:
        """The duration that `percent` % of the calls did not exceed, by nearest rank. Raises ValueError without any."""
        if not self.count:
            raise ValueError("no latency was added")
        rank = max(1, math.ceil(self.count * percent / 100))
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank))
        return min(_LOWEST_S * _RATIO**bucket, self.max_s)

    def as_json(self) -> dict[str, Any]:
        used = np.flatnonzero(self._counts)
        return {"max_s": self.max_s, "counts": {int(n): int(self._counts[n]) for n in used}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Latencies":
        made = cls()
        made.max_s = value["max_s"]
        for bucket, count in value["counts"].items():
            made._counts[int(bucket)] = count
        return made
