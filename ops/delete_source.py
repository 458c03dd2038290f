"""`vectorkeep delete-source`."""

from typing import Annotated

import typer

from .command import Cli, need_terminal
from .exit_codes import ExitCode
from .opening import open_store


def delete_source(
    cli: Cli,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The source whose documents go.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    keep_chunks: Annotated[
        bool, typer.Option("--keep-chunks", help="Keep the chunks, detached; cleanup removes them later.")
    ] = False,
) -> ExitCode | None:
    """Delete all documents of a source in one transaction.

    Asks first; without a terminal to ask on, --yes is needed.
    """
    if not yes and not _confirmed(cli, source):
        cli.output.complain("nothing was deleted")
        return ExitCode.PARTIAL
    with open_store(cli.options) as store:
        result = store.delete_by_source_id(source, cascade=not keep_chunks)
    cli.output.document(result)
    cli.output.fields(
        {
            "deleted": result.deleted,
            "chunks_removed": result.chunks_removed,
            "chunks_detached": result.chunks_detached,
        }
    )
    return None


def _confirmed(cli: Cli, source: str) -> bool:
    need_terminal()
    answer = cli.output.ask(f"Delete all documents of the source {source!r}? [y/N]:")
    return answer.lower() in ("y", "yes")
