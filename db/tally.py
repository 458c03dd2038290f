"""Counting what became of each input, where the same id may come again in a later batch."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sized
from itertools import islice
from typing import Any, TypeVar

from .types import Progress
from .upsert import Outcome

T = TypeVar("T")

# Ids of a call that are remembered. One that comes again beyond so many others counts as an update.
_REMEMBERED = 100_000


class Tally:
    """Every input counts once. An id given twice counts by its last valid input, the earlier as superseded.

    Two threads may count: the one that checks and embeds, and the one that writes.
    """

    def __init__(self, total: int | None, on_progress: Progress | None) -> None:
        self._counts: Counter[str] = Counter()
        self._outcomes: dict[str, Outcome] = {}
        self.total = total
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self.errors: list[tuple[str, str]] = []
        self.processed = 0

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def fail(self, id_: str, reason: str) -> None:
        with self._lock:
            self._counts["failed"] += 1
            self.errors.append((id_, reason))

    def supersede(self) -> None:
        with self._lock:
            self._counts["superseded"] += 1

    def add(self, outcomes: Mapping[str, Outcome]) -> None:
        with self._lock:
            for id_, outcome in outcomes.items():
                counted = self._replace(id_, outcome)
                self._counts[counted] += 1
                self._outcomes[id_] = counted
            while len(self._outcomes) > _REMEMBERED:
                del self._outcomes[next(iter(self._outcomes))]

    def _replace(self, id_: str, outcome: Outcome) -> Outcome:
        """What `outcome` means for the whole call, where an earlier batch had the same id."""
        earlier = self._outcomes.pop(id_, None)
        if earlier is None:
            return outcome
        self._counts[earlier] -= 1
        self._counts["superseded"] += 1
        return outcome if earlier == "unchanged" else earlier

    def progress(self, inputs: int) -> None:
        """Note that `inputs` more are done, and tell the caller."""
        self.processed += inputs
        if self._on_progress is not None:
            self._on_progress(self.processed, self.total)


def total_of(inputs: Any) -> int | None:
    """How many inputs there are, or None where only iterating tells."""
    return len(inputs) if isinstance(inputs, Sized) else None


def batches(inputs: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` inputs, in order. Reads no further than the batch it gives."""
    while batch := list(islice(inputs, size)):
        yield batch
