"""`vectorkeep demo`: the main job on real text. Each step says what it shows, and fails where that is not so."""

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import db
from db import embedded
from db.config import Settings, libpq_url
from db.migrate import upgrade

from .command import Cli, Common
from .demo_texts import PACKAGES, REFERENCE, installed_packages, python_reference
from .migrate import revision_at
from .opening import redis_url, tried
from .output import excerpt
from .search import title
from .stats import print_statistics

_NOTES = "demo-notes"
_OURS = {REFERENCE, PACKAGES, _NOTES}
_STEPS = 8
_QUESTION = "what do the notes of this demo say about a cached search?"


class ClaimFailed(db.VectorKeepError):
    """The demo shows something that is not so."""


def demo(cli: Cli) -> None:
    """Run the main job on text that is on every machine.

    The language reference of Python and the descriptions of the installed packages are embedded, stored,
    searched and deleted, in embedded servers of the demo's own. Only --database-url, not the environment, makes
    it use another database, which must be empty or an earlier demo's.
    """
    started = time.perf_counter()
    with _place(cli.options) as open_store:
        texts = [python_reference(), installed_packages()]
        with open_store() as store:
            _refuse_anothers(store)
            run = _Demo(cli, store, {"location": store.get_diagnostics().location})
            run.ingest(texts)
            run.ingest_again(texts)
            run.searches()
            run.cached_search()
            run.orphans()
            run.delete_a_source(len(texts[1]))
        with open_store() as run.store:  # closed and opened again: the times of all that was done are written
            run.statistics(len(texts[0]))
    run.summary["duration_s"] = round(time.perf_counter() - started, 2)
    cli.output.document(run.summary)
    cli.output.line(f"\nEvery step held what it claims. {run.summary['duration_s']} s", style="bold green")


@contextmanager
def _place(options: Common) -> Iterator[Callable[[], db.VectorStore]]:
    """Where the demo works, at the newest schema. Not the store that the environment names."""
    with ExitStack() as stack:
        database_url, redis = options.database_url, redis_url(options)
        if database_url is None or redis is None:
            home = Settings.load({}).home / "demo"
            with tried(f"the embedded server in {home}"):
                servers = embedded.acquire(home)
            stack.callback(servers.release)
            stack.enter_context(_alone(home))
            database_url = database_url or servers.database_url
            redis = servers.redis_url if redis is None else redis
        if not redis:
            raise db.ValidationError(
                "the demo shows the cache and found no Redis; give --redis-url, or install vectorkeep[embedded]"
            )
        if options.database_url is None or revision_at(libpq_url(database_url)) is None:
            upgrade(libpq_url(database_url))
        embedder = db.WordLlamaEmbedder()
        yield lambda: db.connect(database_url, redis, embedder=embedder, maintenance_url=None)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One demo at a time: what another one writes and deletes would make the claims of both untrue."""
    with (home / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise db.BusyError(f"another demo is running in {home}; wait for it, or set VECTORKEEP_HOME") from exc
        yield


def _refuse_anothers(store: db.VectorStore) -> None:
    others = set(store.get_statistics().sources) - _OURS
    if others:
        raise db.ValidationError(
            f"the database holds other sources ({', '.join(sorted(others)[:3])}); the demo deletes what it "
            "wrote and runs only in a database of its own: give it an empty one"
        )


@dataclass
class _Demo:
    """The steps, and what they found."""

    cli: Cli
    store: db.VectorStore
    summary: dict[str, Any] = field(default_factory=dict)
    _step: int = 0

    def ingest(self, texts: Sequence[Sequence[db.Item]]) -> None:
        self._begin("Ingest: two sources of real prose are cut into chunks, embedded and stored.")
        for items in texts:
            result = self._ingest(items)
            done = result.inserted + result.updated + result.skipped
            _claim(done == len(items) and not result.failed, f"{len(items)} documents stored", result)
            self._keep("ingest", items, result)

    def ingest_again(self, texts: Sequence[Sequence[db.Item]]) -> None:
        self._begin("The same again: nothing changed, so all of it is skipped and nothing is embedded.")
        for items in texts:
            result = self._ingest(items)
            _claim(result.skipped == len(items) and result.embedded == 0, "all of it skipped", result)
            self._keep("ingest_again", items, result)

    def _ingest(self, items: Sequence[db.Item]) -> db.EmbedResult:
        with self.cli.output.progress(items[0].source_id, len(items)) as on_progress:
            return self.store.embed_batch(items, batch_size=25, on_progress=on_progress)

    def _keep(self, step: str, items: Sequence[db.Item], result: db.EmbedResult) -> None:
        source = items[0].source_id
        self.summary.setdefault(step, {})[source] = asdict(result)
        self.cli.output.line(
            f"  {source}: {result.inserted} inserted, {result.updated} updated, {result.skipped} skipped; "
            f"{result.embedded} texts embedded, {result.cache_hits} from the vector cache; {result.duration_ms:.0f} ms"
        )

    def searches(self) -> None:
        self._begin("Search: three questions, and the passages nearest to each.")
        self._search("what happens when an exception is raised and nobody catches it?")
        self._search("how does a class inherit attributes from its bases?", source_id=REFERENCE)
        self._search("a client for a relational database", source_id=PACKAGES)

    def _search(self, question: str, source_id: str | None = None) -> None:
        hits = self.store.search(question, 3, source_id=source_id, level="chunks")
        scores = [hit.score for hit in hits]
        _claim(len(hits) == 3 and scores == sorted(scores, reverse=True), "three hits, best first", scores)
        _claim(source_id is None or {hit.source_id for hit in hits} == {source_id}, "hits of that source", hits)
        within = f", in {source_id}" if source_id else ""
        self.cli.output.line(f"  “{question}”{within}")
        self.cli.output.rows(
            ("  score", "source", "title", "text"),
            [(f"  {hit.score:.3f}", hit.source_id, title(hit), excerpt(hit.text, 90)) for hit in hits],
        )
        found = [{"id": h.id, "source": h.source_id, "title": title(h), "score": h.score} for h in hits]
        self.summary.setdefault("searches", []).append({"question": question, "hits": found})

    def cached_search(self) -> None:
        self._begin("Cache: a repeated search is served from it, until a write might have changed the answer.")
        before = self._ask("asked")
        again = self._ask("asked again", cached=True)
        _claim(before.hits == again.hits, "the same answer from the cache", again.hits)
        written = self.store.embed_batch(_notes())
        _claim(written.inserted + written.updated == len(_notes()), "notes written", written)
        self.cli.output.line(f"  {len(_notes())} notes written about just this")
        after = self._ask("asked after the write", cached=False)
        _claim(after[0].source_id == _NOTES, "the new note is found first", after[0])
        self._ask("and once more", cached=True)

    def _ask(self, when: str, *, cached: bool | None = None) -> db.SearchResult:
        started = time.perf_counter()
        result = self.store.search(_QUESTION, 5)
        elapsed_ms = (time.perf_counter() - started) * 1000
        _claim(cached is None or result.cached == cached, f"{when}: cached={cached}", f"cached={result.cached}")
        self.summary.setdefault("cache", []).append(
            {"when": when, "cached": result.cached, "ms": round(elapsed_ms, 2), "first": result[0].id}
        )
        self.cli.output.line(f"  {when}: cached={result.cached}, {elapsed_ms:.1f} ms, first is “{title(result[0])}”")
        return result

    def orphans(self) -> None:
        self._begin("Cleanup: the notes are deleted but their chunks kept; a dry run counts these orphans.")
        deleted = self.store.delete_by_source_id(_NOTES, cascade=False)
        kept = deleted.chunks_detached
        _claim(deleted.deleted == len(_notes()) and kept > 0, "notes deleted, their chunks kept", deleted)
        self.cli.output.line(f"  {deleted.deleted} documents deleted, {kept} chunks kept, detached")
        counted = self._cleanup("dry run", dry_run=True)
        _claim(counted.orphaned_chunks >= kept and not counted.cleaned, "the dry run counts them", counted)

        self._begin("Cleanup, this time a real one: they are removed, and none is left.")
        removed = self._cleanup("cleanup", dry_run=False)
        _claim(removed.orphaned_chunks == counted.orphaned_chunks, "it removes what was counted", removed)
        left = self._cleanup("dry run", dry_run=True)
        _claim(left.orphaned_chunks == 0 and left.orphaned_embeddings == 0, "none is left", left)

    def _cleanup(self, name: str, *, dry_run: bool) -> db.CleanupResult:
        with self.cli.output.progress(name) as on_progress:
            result = self.store.cleanup_orphaned(dry_run=dry_run, on_progress=on_progress)
        self.summary.setdefault("cleanup", []).append(asdict(result))
        self.cli.output.line(f"  {name}: {'; '.join(result.details)}")
        return result

    def delete_a_source(self, documents: int) -> None:
        self._begin(f"Delete: the source {PACKAGES} goes in one transaction, with all its chunks.")
        result = self.store.delete_by_source_id(PACKAGES)
        _claim(result.deleted >= documents, f"at least {documents} documents deleted", result)
        _claim(not self.store.search(_QUESTION, 5, source_id=PACKAGES), "none of it is found any more", result)
        self.cli.output.line(f"  {result.deleted} documents and {result.chunks_removed} chunks deleted")
        self.summary["delete_source"] = asdict(result)

    def statistics(self, documents: int) -> None:
        self._begin("Statistics: what is left, how fast it was, and how healthy the indexes are.")
        result = self.store.get_statistics()
        _claim(result.sources == [REFERENCE], f"only {REFERENCE} is left", result.sources)
        _claim(result.documents >= documents, f"at least {documents} documents", result.documents)
        _claim(all(index.valid for index in result.indexes), "valid indexes", result.indexes)
        print_statistics(self.cli, result)
        self.summary["statistics"] = asdict(result)

    def _begin(self, shows: str) -> None:
        self._step += 1
        self.cli.output.line(f"\n{self._step}/{_STEPS} {shows}", style="bold cyan")


def _notes() -> list[db.Item]:
    """Notes that differ from those of an earlier run, so that writing them changes something."""
    now = datetime.now(UTC).isoformat()
    return [
        db.Item(f"{_NOTES}/{subject}", f"{text} Written {now}.", {"title": f"A note on {subject}"}, _NOTES)
        for subject, text in {
            "cached searches": "The notes of this demo say about a cached search: it is served only while true.",
            "writes": "Each write tells in its own transaction what it touched, and so no crash can hide it.",
            "orphans": "A chunk whose document is gone is an orphan; cleanup removes it.",
        }.items()
    ]


def _claim(holds: bool, claim: str, found: object) -> None:
    if not holds:
        raise ClaimFailed(f"the demo claims '{claim}', but found {str(found)[:500]}")
