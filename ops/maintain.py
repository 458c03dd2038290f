"""`vectorkeep maintain`."""

from typing import Annotated

import typer

from .command import Cli
from .exit_codes import ExitCode
from .opening import open_store


def maintain(
    cli: Cli,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    retention_days: Annotated[float, typer.Option(min=0, help="Keep metrics and the record of runs this long.")] = 7,
    skip_compaction: Annotated[bool, typer.Option("--skip-compaction", help="No VACUUM.")] = False,
    skip_index: Annotated[bool, typer.Option("--skip-index", help="Leave the vector indexes alone.")] = False,
    skip_cleanup: Annotated[bool, typer.Option("--skip-cleanup", help="Keep what is past its time.")] = False,
) -> ExitCode | None:
    """Do what is due: retire, build indexes, vacuum.

    Removes what is past its time, builds missing indexes, vacuums where dead rows ask for it. Steps are
    independent: one that fails is reported, and the others run. One process at a time.
    """
    with open_store(cli.options) as store, cli.output.steps() as on_progress:
        result = store.maintain(
            dry_run=dry_run,
            retention_days=retention_days,
            skip_compaction=skip_compaction,
            skip_index=skip_index,
            skip_cleanup=skip_cleanup,
            on_progress=on_progress,
        )
    cli.output.document(result)
    cli.output.rows(
        ("step", "outcome", "ms", "details"),
        [(step.name, step.outcome, f"{step.duration_ms:.0f}", step.details) for step in result.steps],
    )
    failed = any(step.outcome in ("failed", "not permitted", "not reached") for step in result.steps)
    return ExitCode.PARTIAL if failed else None
