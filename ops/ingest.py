"""`vectorkeep ingest`."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any

import typer

import db

from .command import Cli
from .exit_codes import ExitCode
from .opening import open_store, text_embedder
from .output import Advance
from .reading import RECORD_SUFFIXES, Reader, UnreadableError, displayable, open_records

_SHOWN_FAILURES = 20
_STDIN = Path("-")


@dataclass
class Totals:
    """The counts of all calls together, named as in the results of the library."""

    inserted: int = 0
    updated: int = 0
    skipped: int = 0
    superseded: int = 0
    failed: int = 0
    embedded: int = 0
    cache_hits: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)

    def add(self, result: db.EmbedResult | db.UpsertResult) -> None:
        self.inserted += result.inserted
        self.updated += result.updated
        self.superseded += result.superseded
        self.add_failures(result.errors)
        if isinstance(result, db.EmbedResult):
            self.skipped += result.skipped
            self.embedded += result.embedded
            self.cache_hits += result.cache_hits
        else:
            self.skipped += result.unchanged

    def add_failures(self, failures: Sequence[tuple[str, str]]) -> None:
        self.failed += len(failures)
        self.errors += failures


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
) -> ExitCode | None:
    """Read files, embed what changed, store it.

    Of a folder, hidden files and files of other kinds are left out, and links in it are never followed. A
    document's id is its source and its path in the folder, so that the same file is the same document again.

    A line of JSONL has id and text, and may have embedding, metadata and source_id. Where there is an embedding
    it is stored, else the text is embedded. --source and --workspace fill in what a line lacks.

    Files and lines that cannot be read are reported and skipped; the exit code is then 1.
    """
    missing = [displayable(path) for path in paths if path != _STDIN and not path.exists()]
    if missing:
        raise typer.BadParameter(f"{missing[0]} does not exist", param_hint="PATH")
    started = time.perf_counter()
    reader, totals = Reader(source, workspace), Totals()
    records = [path for path in paths if _holds_records(path)]
    texts = [path for path in paths if not _holds_records(path)]
    with open_store(cli.options, model_id=model) as store:
        if texts:
            with cli.output.progress("Ingesting", reader.count(texts)) as on_progress:
                items = _counted(reader.texts(texts), on_progress)
                totals.add(store.embed_batch(items, embedder=text_embedder(store), batch_size=batch_size))
        for path in records:
            with cli.output.progress(f"Ingesting {displayable(path.name)}") as on_progress:
                _ingest_records(store, path, reader, totals, batch_size, on_progress)
    totals.add_failures(reader.failed)
    _print(cli, reader, totals, (time.perf_counter() - started) * 1000)
    return ExitCode.PARTIAL if totals.failed else None


def _holds_records(path: Path) -> bool:
    return path == _STDIN or (path.suffix.lower() in RECORD_SUFFIXES and not path.is_dir())


def _counted(items: Iterable[db.Item], on_progress: Advance) -> Iterator[db.Item]:
    for number, item in enumerate(items, 1):
        on_progress(number, None)
        yield item


def _ingest_records(
    store: db.VectorStore, path: Path, reader: Reader, totals: Totals, batch_size: int, on_progress: Advance
) -> None:
    done = 0
    with _lines(path, reader) as lines:
        records = reader.records(lines, displayable(path))
        while batch := list(islice(records, batch_size)):
            for run in runs(batch):
                if "embedding" in run[0]:
                    totals.add(store.batch_upsert(run, batch_size=batch_size))
                else:
                    totals.add(store.embed_batch(run, embedder=text_embedder(store), batch_size=batch_size))
            done += len(batch)
            on_progress(done, None)


@contextmanager
def _lines(path: Path, reader: Reader) -> Iterator[Iterable[bytes]]:
    if path == _STDIN:
        yield sys.stdin.buffer
        return
    try:
        file = open_records(path)
    except (UnreadableError, OSError) as exc:
        reader.failed.append((displayable(path), getattr(exc, "strerror", None) or str(exc)))
        yield ()
        return
    with file:
        yield file


def runs(batch: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """`batch` in parts that are all with or all without an embedding, so that the last of each id still wins."""

    def has_vector(record: Mapping[str, Any]) -> bool:
        return "embedding" in record

    parts = [[r for r in batch if has_vector(r)], [r for r in batch if not has_vector(r)]]
    if {r["id"] for r in parts[0]} & {r["id"] for r in parts[1]}:
        return [list(run) for _, run in groupby(batch, has_vector)]  # an id in both: only the order tells
    return [part for part in parts if part]


def _print(cli: Cli, reader: Reader, totals: Totals, duration_ms: float) -> None:
    counts = {name: value for name, value in vars(totals).items() if name != "errors"}
    fields = {
        "read": reader.read,
        **counts,
        "empty": reader.empty,
        "passed_over": reader.passed_over,
        "duration_ms": round(duration_ms, 1),
    }
    cli.output.document({**fields, "errors": totals.errors})
    cli.output.fields(fields)
    for name, reason in totals.errors[:_SHOWN_FAILURES]:
        cli.output.complain(f"{name}: {reason}")
    if len(totals.errors) > _SHOWN_FAILURES:
        cli.output.complain(f"and {len(totals.errors) - _SHOWN_FAILURES} more; --json lists all")
