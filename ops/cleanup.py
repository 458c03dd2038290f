"""`vectorkeep cleanup`."""

from datetime import timedelta
from typing import Annotated

import typer

from .command import Cli
from .opening import open_store


def cleanup(
    cli: Cli,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count all orphans, change nothing.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Rows in one transaction.")] = 1000,
    min_age_days: Annotated[
        float | None, typer.Option(min=0, max=36_500, help="Spare what was created since.", show_default=False)
    ] = None,
) -> None:
    """Remove orphans, then VACUUM (ANALYZE).

    An orphan is a chunk whose document is gone, or a document without a vector none of whose chunks has one.
    """
    min_age = None if min_age_days is None else timedelta(days=min_age_days)
    with open_store(cli.options) as store, cli.output.progress("Removing orphans") as on_progress:
        result = store.cleanup_orphaned(
            dry_run=dry_run, batch_size=batch_size, min_age=min_age, on_progress=on_progress
        )
    cli.output.document(result)
    cli.output.fields(
        {
            "orphaned_chunks": result.orphaned_chunks,
            "orphaned_embeddings": result.orphaned_embeddings,
            "cleaned": result.cleaned,
            "reclaimed_bytes": result.reclaimed_bytes,
            "vacuumed": result.vacuumed,
        }
    )
    for sentence in result.details:
        cli.output.say(sentence)
