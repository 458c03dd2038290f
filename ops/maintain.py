"""`vectorkeep maintain`."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from types import FrameType
from typing import Annotated

import typer

from .command import Cli
from .exit_codes import ExitCode
from .opening import open_store


def maintain(
    cli: Cli,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    deadline: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Stop then.", show_default="none")
    ] = None,
    retention_days: Annotated[float, typer.Option(min=0, help="Keep metrics and the record of runs this long.")] = 7,
    index_stale_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Rebuild an index when more than this share of it is dead.")
    ] = 0.1,
    skip_compaction: Annotated[bool, typer.Option("--skip-compaction", help="No VACUUM.")] = False,
    skip_index: Annotated[bool, typer.Option("--skip-index", help="Leave the vector indexes alone.")] = False,
    skip_cleanup: Annotated[bool, typer.Option("--skip-cleanup", help="Keep what is past its time.")] = False,
) -> ExitCode | None:
    """Do what is due: retire, build and rebuild indexes, vacuum, tune searches.

    Removes what is past its time, builds indexes that are missing or stale, online, vacuums where dead rows ask
    for it, measures recall where much has changed and sets ef_search. Steps are independent: one that fails is
    reported, and the others run. One process at a time. Ctrl-C stops the running step and leaves nothing half-built.
    """
    with open_store(cli.options) as store, cli.output.steps() as on_progress, _cancelled_by_signals() as signals:
        result = store.maintain(
            dry_run=dry_run,
            deadline_s=deadline,
            retention_days=retention_days,
            index_stale_threshold=index_stale_threshold,
            skip_compaction=skip_compaction,
            skip_index=skip_index,
            skip_cleanup=skip_cleanup,
            cancel=signals.cancel,
            on_progress=on_progress,
        )
    cli.output.document(result)
    cli.output.rows(
        ("step", "outcome", "ms", "details"),
        [(step.name, step.outcome, f"{step.duration_ms:.0f}", step.details) for step in result.steps],
    )
    if signals.received is not None:
        return ExitCode.INTERRUPTED if signals.received == signal.SIGINT else ExitCode.TERMINATED
    failed = any(step.outcome in ("failed", "not permitted", "not reached") for step in result.steps)
    return ExitCode.PARTIAL if failed else None


@dataclass
class _Signals:
    """The signal that came, and the event that it set."""

    cancel: Event = field(default_factory=Event)
    received: int | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self.cancel.set()


@contextmanager
def _cancelled_by_signals() -> Iterator[_Signals]:
    """Ctrl-C and SIGTERM set an event: the run ends in order, instead of in the middle of a build."""
    signals = _Signals()
    before = {number: signal.signal(number, signals.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
