"""Counting what became of each input, where the same id may come again in a later batch."""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

from .documents import part_of
from .errors import of_caller
from .types import Document, Item, Progress
from .upsert import Outcome

logger = logging.getLogger("vectorkeep")

T = TypeVar("T")

# Long runs tell in the log how far they are, each time so many more are done.
LOG_EVERY = 50_000
# A batch is closed by the input with which its texts reach this many characters.
MAX_BATCH_CHARACTERS = 16 * 2**20
# Ids of a call that are remembered. One that comes again beyond so many others counts as an update.
_REMEMBERED = 50_000


class Tally:
    """Every input counts once. An id given twice counts by its last valid input, the earlier as superseded.

    Two threads may count: the one that checks and embeds, and the one that writes.
    """

    def __init__(self, total: int | None, on_progress: Progress | None) -> None:
        self._counts: Counter[str] = Counter()
        # The first key of a plain dict is found by passing over all the places where others were deleted.
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()
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
            counted = outcomes
            if not self._outcomes.keys().isdisjoint(outcomes):
                counted = {id_: self._replace(id_, outcome) for id_, outcome in outcomes.items()}
            self._counts.update(counted.values())
            self._outcomes.update(counted)
            while len(self._outcomes) > _REMEMBERED:
                self._outcomes.popitem(last=False)

    def _replace(self, id_: str, outcome: Outcome) -> Outcome:
        """What `outcome` means for the whole call, where an earlier batch had the same id."""
        earlier = self._outcomes.pop(id_, None)
        if earlier is None:
            return outcome
        self._counts[earlier] -= 1
        self._counts["superseded"] += 1
        return outcome if earlier == "unchanged" else earlier

    def progress(self, inputs: int) -> None:
        """Note that `inputs` more are done, and tell the caller; now and then the log, too."""
        before, self.processed = self.processed, self.processed + inputs
        if self.processed // LOG_EVERY > before // LOG_EVERY:
            with self._lock:
                counts = {name: count for name, count in self._counts.items() if count}
            logger.info("ingestion.progress", extra={"processed": self.processed, "total": self.total, **counts})
        if self._on_progress is not None:
            self._on_progress(self.processed, self.total)


def total_of(inputs: Any) -> int | None:
    """How many inputs there are, or None where only iterating tells."""
    return len(inputs) if isinstance(inputs, Sized) else None


def callers_inputs(inputs: Iterable[T]) -> Iterator[T]:
    """The `inputs`; what iterating over them raises stays as it is."""
    with of_caller():
        for given in inputs:  # noqa: UP028  (`yield from` would close a generator that may be used further)
            yield given


def batches(inputs: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` inputs, in order, fewer where their texts are long: a batch is held in memory.

    Reads no further than the batch it gives.
    """
    batch: list[T] = []
    characters = 0
    for given in inputs:
        batch.append(given)
        characters += _characters(given)
        if len(batch) >= size or characters >= MAX_BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(given: Any) -> int:
    """How much text an input brings, with its chunks; 0 for what is no input at all. Asked for every input: fast."""
    kind = type(given)
    if (kind is Item or (kind is Document and given.chunks is None)) and type(given.text) is str:
        return len(given.text)  # nearly every one
    text = part_of(given, "text")
    characters = len(text) if isinstance(text, str) else 0
    chunks = part_of(given, "chunks")
    if isinstance(chunks, list | tuple) and chunks:
        texts = (part_of(chunk, "text") for chunk in chunks)
        characters += sum(len(text) for text in texts if isinstance(text, str))
    return characters
