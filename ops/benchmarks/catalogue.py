"""The measures by name, and a run of those that are wanted."""

import time
from collections.abc import Callable, Collection

from .keeping import measure_large
from .plan import Run
from .unchanged import measure_metadata, measure_unchanged
from .writes import (
    measure_bulk_load,
    measure_first_load,
    measure_live_index,
    measure_upsert_changed,
    measure_upsert_new,
)

_MEASURES: dict[str, Callable[[Run], None]] = {
    "first-load": measure_first_load,
    "upsert-new": measure_upsert_new,
    "upsert-changed": measure_upsert_changed,
    "unchanged": measure_unchanged,
    "live-index": measure_live_index,
    "bulk-load": measure_bulk_load,
    "metadata": measure_metadata,
}
# They share two large databases, which take a while to make.
_LARGE = ("delete-source", "cleanup", "memory")

NAMES = (*_MEASURES, *_LARGE)


def measure(run: Run, names: Collection[str]) -> None:
    """Run the measures of `names`, in their own order."""
    for name, work in _MEASURES.items():
        if name in names:
            _timed(run, name, work)
    if large := [name for name in _LARGE if name in names]:
        _timed(run, ", ".join(large), lambda run: measure_large(run, large))


def _timed(run: Run, name: str, work: Callable[[Run], None]) -> None:
    run.say(name)
    started = time.perf_counter()
    work(run)
    run.say(f"{name}: measured in {time.perf_counter() - started:.0f} s")
