"""One run of `vectorkeep ingest`: what was read goes into the store, and is counted."""

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import typer

import db
from db.tally import batches

from .opening import text_embedder
from .output import Advance, Output
from .reading import RECORD_SUFFIXES, Reader, UnreadableError, bounded_lines, displayable, open_records

STDIN = Path("-")

Given = TypeVar("Given")


@dataclass
class Totals:
    """The counts of all calls together, named as in the results of the library."""

    read: int = 0
    inserted: int = 0
    updated: int = 0
    skipped: int = 0
    deleted: int = 0
    superseded: int = 0
    failed: int = 0
    embedded: int = 0
    cache_hits: int = 0
    empty: int = 0
    passed_over: int = 0
    record_files: list[str] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)

    def add(self, result: db.EmbedResult | db.UpsertResult) -> None:
        self.inserted += result.inserted
        self.updated += result.updated
        self.superseded += result.superseded
        self._add_failures(result.errors)
        if isinstance(result, db.EmbedResult):
            self.skipped += result.skipped
            self.deleted += result.deleted
            self.embedded += result.embedded
            self.cache_hits += result.cache_hits
        else:
            self.skipped += result.unchanged

    def add_reading(self, reader: Reader) -> None:
        self.read += reader.read
        self.empty += reader.empty
        self.passed_over += reader.passed_over
        self.record_files += reader.record_files
        self._add_failures(reader.failed)

    def _add_failures(self, failures: Sequence[tuple[str, str]]) -> None:
        self.failed += len(failures)
        self.errors += failures


@dataclass
class IngestRun:
    """The store, one embedder for all texts, and what was done so far. `bulk` None leaves it to the store."""

    store: db.VectorStore
    output: Output
    workspace: str | None
    batch_size: int
    bulk: bool | None
    totals: Totals = field(default_factory=Totals)

    @cached_property
    def embedder(self) -> db.Embedder:
        """Made at its first use: records that have vectors need none."""
        return text_embedder(self.store)

    def ingest(self, paths: Sequence[Path], source: str | None) -> None:
        """Store what `paths` hold, in their own sources or in `source`."""
        reader = Reader(source, self.workspace)
        texts, records = texts_and_records(paths)
        if texts:
            _ = self.embedder  # one that does not fit the store is told before an index is dropped
        with self._bulk_load():
            if texts:
                with self.output.progress("Ingesting", reader.count(texts)) as on_progress:
                    items = _counted(reader.texts(texts), on_progress)
                    self.totals.add(self.store.embed_batch(items, embedder=self.embedder, **self._how))
            for path in records:
                with self.output.progress(f"Ingesting {displayable(path.name)}") as on_progress:
                    self._ingest_records(path, reader, on_progress)
        self._tell_of(reader)

    def sync(self, sources: Mapping[str, Sequence[Path]], *, allow_empty: bool, dry_run: bool) -> None:
        """Bring each of `sources` to exactly what its paths hold; with `dry_run` count what that would do."""
        _ = self.embedder
        with nullcontext() if dry_run else self._bulk_load():
            for source, paths in sources.items():
                self._sync_source(source, paths, allow_empty=allow_empty, dry_run=dry_run)

    @property
    def _how(self) -> dict[str, Any]:
        """How the library is called: what `_bulk_load` has decided for all calls is not asked again in each."""
        bulk: bool | Literal["auto"] = "auto" if self.bulk is None else False
        return {"batch_size": self.batch_size, "bulk": bulk}

    def _bulk_load(self) -> AbstractContextManager[None]:
        """One bulk load around all calls: the one that was asked for, or where the store is empty."""
        return nullcontext() if self.bulk is False else self.store.bulk_load(only_into_empty=self.bulk is None)

    def _ingest_records(self, path: Path, reader: Reader, on_progress: Advance) -> None:
        done = 0
        with _lines(path, reader) as lines:
            for batch in batches(reader.records(lines, displayable(path)), self.batch_size):
                for run in runs(batch):
                    if "embedding" in run[0]:
                        self.totals.add(self.store.batch_upsert(run, **self._how))
                    else:
                        self.totals.add(self.store.embed_batch(run, embedder=self.embedder, **self._how))
                done += len(batch)
                on_progress(done, None)

    def _sync_source(self, source: str, paths: Sequence[Path], *, allow_empty: bool, dry_run: bool) -> None:
        reader = Reader(source, self.workspace)
        items = _items_to_sync(reader, paths)
        first = list(islice(items, 1))
        if not first and not allow_empty and not reader.failed:
            self._tell_of(reader)
            raise db.ValidationError(
                f"there is nothing to read for source {source!r}; give --allow-empty to delete all that is stored of it"
            )
        if first or allow_empty:
            with self.output.progress(f"Syncing {source}") as on_progress:
                result = self.store.sync(
                    _counted(chain(first, items), on_progress),
                    source_id=source,
                    embedder=self.embedder,
                    allow_empty=allow_empty,
                    dry_run=dry_run,
                    keep=reader.may_hold,
                    **self._how,
                )
            self.totals.add(result)
        if reader.unsure:
            self.output.complain(
                f"nothing is deleted from source {source!r}: what could not be read may be any document of it"
            )
        self._tell_of(reader)

    def _tell_of(self, reader: Reader) -> None:
        """Count what was read, and name what was not though it looks as if it was meant."""
        self.totals.add_reading(reader)
        if files := reader.record_files:
            self.output.complain(
                f"{len(files)} JSONL files in folders were passed over: records are read from files that are named; "
                f"run 'vectorkeep ingest {' '.join(map(shlex.quote, files[:3]))}{' …' if len(files) > 3 else ''}'"
            )
        elif not reader.read and not reader.failed:
            self.output.say("nothing was read: there is no file of a known kind with text in it")


def sources_to_sync(paths: Sequence[Path], source: str | None) -> dict[str, Sequence[Path]]:
    """All of `paths` as the one `source`, or else each folder as the source that it is by default.

    Raises typer.BadParameter where a path would not be all of its source.
    """
    if source is not None:
        return {source: paths}
    for path in paths:
        if path == STDIN or not path.is_dir():
            raise typer.BadParameter(
                f"{displayable(path)} is not a folder; with --sync say by --source which source it is all of",
                param_hint="PATH",
            )
    folders = sorted({path.resolve() for path in paths})
    for folder in folders:
        if outer := next((other for other in folders if other in folder.parents), None):
            raise typer.BadParameter(
                f"{displayable(folder)} lies in {displayable(outer)}; with --sync a file belongs to one source: "
                "leave one out, or give --source",
                param_hint="PATH",
            )
    return {displayable(folder): [folder] for folder in folders}


def texts_and_records(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """`paths` in two: files and folders of texts, and JSONL."""
    texts: list[Path] = []
    records: list[Path] = []
    for path in paths:
        holds_records = path == STDIN or (path.suffix.lower() in RECORD_SUFFIXES and not path.is_dir())
        (records if holds_records else texts).append(path)
    return texts, records


def runs(batch: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """`batch` in parts that are all with or all without an embedding, so that the last of each id still wins."""

    def has_vector(record: Mapping[str, Any]) -> bool:
        return "embedding" in record

    parts = [[r for r in batch if has_vector(r)], [r for r in batch if not has_vector(r)]]
    if {r["id"] for r in parts[0]} & {r["id"] for r in parts[1]}:
        return [list(run) for _, run in groupby(batch, has_vector)]  # an id in both: only the order tells
    return [part for part in parts if part]


def _items_to_sync(reader: Reader, paths: Sequence[Path]) -> Iterator[db.Item | Mapping[str, Any]]:
    """What `paths` hold of the reader's source."""
    texts, records = texts_and_records(paths)
    yield from reader.texts(texts)
    for path in records:
        with _lines(path, reader) as lines:
            for record in reader.records(lines, displayable(path)):
                if "embedding" in record:
                    raise db.ValidationError(
                        f"the record {record['id']!r} has an embedding, and --sync makes them itself from the texts; "
                        "leave 'embedding' out, or ingest it without --sync"
                    )
                if record["source_id"] == reader.source:
                    yield record
                else:
                    reason = f"its source is {record['source_id']!r}; --sync reads only what is of {reader.source!r}"
                    reader.fail(record["id"], UnreadableError(reason), record["id"])


@contextmanager
def _lines(path: Path, reader: Reader) -> Iterator[Iterable[bytes]]:
    if path == STDIN:
        yield bounded_lines(sys.stdin.buffer)
        return
    try:
        file = open_records(path)
    except (UnreadableError, OSError) as exc:
        reader.fail(displayable(path), exc, None)
        yield ()
        return
    with file:
        yield bounded_lines(file)


def _counted(items: Iterable[Given], on_progress: Advance) -> Iterator[Given]:
    for number, item in enumerate(items, 1):
        on_progress(number, None)
        yield item
