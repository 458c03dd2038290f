"""`vectorkeep ingest`."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from db.documents import check_key

from .command import Cli
from .exit_codes import ExitCode
from .ingest_run import STDIN, IngestRun, Totals, sources_to_sync
from .opening import open_store
from .reading import displayable

_SHOWN_FAILURES = 20


def ingest(
    cli: Cli,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH",
            help="Folders, files (.txt .md .rst .py .html), JSONL files, '-' for JSONL on stdin.",
        ),
    ],
    source: Annotated[
        str | None, typer.Option(show_default=False, help="The source. Default: each file's folder, as given.")
    ] = None,
    workspace: Annotated[str | None, typer.Option(show_default=False, help="The workspace.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Documents in one transaction.")] = 1000,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="What made the vectors in JSONL, for a new store."),
    ] = None,
    sync: Annotated[
        bool, typer.Option("--sync", help="Also delete from each source what is no longer there to be read.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --sync: only count what it would do; write nothing.")
    ] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="With --sync: delete the whole source where there is nothing to read.")
    ] = False,
    bulk: Annotated[
        bool | None,
        typer.Option(
            "--bulk/--no-bulk",
            show_default=False,
            help="Drop the vector indexes, and build them anew after the rows: faster for many, and searches compare "
            "all rows meanwhile. Default: only into an empty store.",
        ),
    ] = None,
) -> ExitCode | None:
    """Read files, embed what changed, store it.

    Of a folder, hidden files and files of other kinds are left out, JSONL is left out and told, and links in it are
    never followed. A document's id is its source and its path in the folder, so that the same file is the same
    document again.

    A line of JSONL has id and text, and may have embedding, metadata and source_id. Where there is an embedding
    it is stored, else the text is embedded. --source and --workspace fill in what a line lacks. A line that would not
    be stored as it is written (a key twice, an integer beyond 64 bits), or is larger than 64 MiB, is reported.

    With --sync a source becomes exactly what is read: each folder is the source that it is by default, or with
    --source all that is given is that one source. What cannot be read keeps what is stored of it; where that may
    be anything (a folder that is closed, a line that is no JSON), nothing is deleted. Records with an embedding
    cannot be synced. Another sync of the same source is not waited for: exit code 7.

    Files and lines that cannot be read are reported and skipped; the exit code is then 1.
    """
    for name, value in (("--source", source), ("--workspace", workspace)):
        if value is not None:
            check_key(name, value)
    # Not Path.exists(), which raises where a name is too long or a folder is closed.
    missing = [displayable(path) for path in paths if path != STDIN and not os.path.exists(path)]  # noqa: PTH110
    if missing:
        raise typer.BadParameter(f"{missing[0]} does not exist", param_hint="PATH")
    if not sync and (dry_run or allow_empty):
        raise typer.BadParameter("needs --sync", param_hint="--dry-run" if dry_run else "--allow-empty")
    sources = sources_to_sync(paths, source) if sync else {}
    started = time.perf_counter()
    with open_store(cli.options, model_id=model) as store:
        run = IngestRun(store, cli.output, workspace, batch_size, bulk)
        if sync:
            run.sync(sources, allow_empty=allow_empty, dry_run=dry_run)
        else:
            run.ingest(paths, source)
    if dry_run:
        cli.output.say("dry run: nothing was written")
    _print(cli, run.totals, dry_run=dry_run, duration_ms=(time.perf_counter() - started) * 1000)
    return ExitCode.PARTIAL if run.totals.failed else None


def _print(cli: Cli, totals: Totals, *, dry_run: bool, duration_ms: float) -> None:
    counts = {name: value for name, value in vars(totals).items() if not isinstance(value, list)}
    fields = {**counts, "dry_run": dry_run, "duration_ms": round(duration_ms, 1)}
    cli.output.document({**fields, "record_files": totals.record_files, "errors": totals.errors})
    cli.output.fields(fields)
    for name, reason in totals.errors[:_SHOWN_FAILURES]:
        cli.output.complain(f"{name}: {reason}")
    if len(totals.errors) > _SHOWN_FAILURES:
        cli.output.complain(f"and {len(totals.errors) - _SHOWN_FAILURES} more; --json lists all")
