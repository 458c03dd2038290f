"""Ingestion: documents and items in batches, from the caller's iterable to committed rows.

Each batch is checked, compared with what is stored, and only what differs is embedded and written. The
embedder runs outside any transaction, and while one batch is written the next is embedded.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg

from .change_detection import changed_ids, changed_items, stored_ids
from .documents import HashedItem, PreparedDocument, as_item, hash_item, prepare
from .embedding import TextEmbedder, document_of
from .engine import Database
from .errors import ValidationError
from .registry import StoreModel
from .tally import Tally, batches
from .transactions import LoggedWrite, retried, run_write
from .types import Document, Item
from .upsert import Outcome, UpsertBatch

logger = logging.getLogger("vectorkeep")

T = TypeVar("T")

# SQLSTATE classes with which the server refuses data: another try fails just so, but without the culprit
# the rest goes through. 57014 is a statement that took too long.
_REFUSALS = ("0A", "22", "23", "44", "54", "P0")


@dataclass(frozen=True, slots=True)
class Ingestion:
    """What ingestion works with: connections, the store's model, and whom to tell of each commit."""

    database: Database
    model: StoreModel
    after_commit: Callable[[LoggedWrite], None]

    def upsert(self, documents: Iterable[Document | Mapping[str, Any]], batch_size: int, tally: Tally) -> None:
        """Write `documents` batch by batch; one that is not valid or is refused never stops the others."""
        for batch in batches(iter(documents), batch_size):
            prepared = self._checked(batch, lambda document: prepare(document, self.model), tally)
            self._write_changed(prepared, tally)
            tally.progress(len(batch))

    def embed(
        self, items: Iterable[Item | Mapping[str, Any]], embedder: TextEmbedder, batch_size: int, tally: Tally
    ) -> None:
        """Embed and write those of `items` whose text, metadata, source or model changed."""
        with ThreadPoolExecutor(1, thread_name_prefix="vectorkeep-writer") as writer:
            pending = _PendingWrite()
            try:
                for batch in batches(iter(items), batch_size):
                    hashed = self._checked(batch, lambda item: hash_item(as_item(item)), tally)
                    if pending.overlaps(hashed):
                        pending.finish()  # an id comes again: it is compared with what that write leaves
                    documents = self._embed_changed(hashed, embedder, tally)
                    pending.finish()
                    pending = _PendingWrite(
                        {d.id for d in documents},
                        writer.submit(self._write_batch, documents, len(batch), tally),
                    )
            finally:
                pending.finish()

    def compare(self, items: Iterable[Item | Mapping[str, Any]], model_id: str, batch_size: int, tally: Tally) -> None:
        """Count what `embed` would do with `items`; nothing is embedded or written."""
        for batch in batches(iter(items), batch_size):
            hashed = self._checked(batch, lambda item: hash_item(as_item(item)), tally)
            tally.add(self._outcomes_ahead(hashed, model_id))
            tally.progress(len(batch))

    def _outcomes_ahead(self, items: Sequence[HashedItem], model_id: str) -> dict[str, Outcome]:
        def look() -> dict[str, Outcome]:
            with self.database.connection() as connection:
                changed = changed_items(connection, items, model_id)
                stored = stored_ids(connection, list(changed))
            return {
                item.id: "unchanged" if item.id not in changed else "updated" if item.id in stored else "inserted"
                for item in items
            }

        return retried(look)

    def _checked(self, batch: Sequence[Any], check: Callable[[Any], T], tally: Tally) -> list[T]:
        """The valid ones of `batch`, the last of each id. The others are counted."""
        valid: dict[str, T] = {}
        for given in batch:
            try:
                checked: Any = check(given)
            except ValidationError as exc:
                tally.fail(_id_of(given), str(exc))
                continue
            if valid.pop(checked.id, None) is not None:
                tally.supersede()
            valid[checked.id] = checked
        return list(valid.values())

    def _embed_changed(
        self, items: Sequence[HashedItem], embedder: TextEmbedder, tally: Tally
    ) -> list[PreparedDocument]:
        """Documents for those of `items` that changed; the text is embedded only where it did itself."""

        def look() -> dict[str, bool]:
            with self.database.connection() as connection:
                return changed_items(connection, items, embedder.model_id)

        changed = retried(look)
        tally.add({item.id: "unchanged" for item in items if item.id not in changed})
        to_embed = [item for item in items if changed.get(item.id) is False]
        embedded = embedder.embed_items(to_embed)
        documents = []
        for item in items:
            if item.id not in changed:
                continue
            try:
                documents.append(document_of(item, embedded.get(item.id), self.model))
            except ValidationError as exc:
                tally.fail(item.id, str(exc))
        return documents

    def _write_changed(self, documents: Sequence[PreparedDocument], tally: Tally) -> None:
        """Write those of `documents` that differ from what is stored."""

        def look() -> set[str]:
            with self.database.connection() as connection:
                return changed_ids(connection, documents)

        changed = retried(look) if documents else set()
        tally.add({d.id: "unchanged" for d in documents if d.id not in changed})
        self._write(self._batch([d for d in documents if d.id in changed]), tally)

    def _write_batch(self, documents: Sequence[PreparedDocument], inputs: int, tally: Tally) -> None:
        self._write(self._batch(documents), tally)
        tally.progress(inputs)

    def _batch(self, documents: Sequence[PreparedDocument]) -> UpsertBatch:
        return UpsertBatch(documents, self.model.model_id)

    def _write(self, batch: UpsertBatch, tally: Tally) -> None:
        """Write `batch`; one that the server refuses is halved until the culprit is alone."""
        if not batch.documents:
            return
        try:
            outcomes: Mapping[str, Outcome] = run_write(self.database, batch.write, after_commit=self.after_commit)
        except psycopg.Error as exc:
            if not _is_refusal(exc):
                raise
            if len(batch.documents) == 1:
                tally.fail(batch.documents[0].id, f"refused by the server: {_reason(exc)}")
                return
            middle = len(batch.documents) // 2
            self._write(self._batch(batch.documents[:middle]), tally)
            self._write(self._batch(batch.documents[middle:]), tally)
        else:
            tally.add(outcomes)


@dataclass(slots=True)
class _PendingWrite:
    """A write under way, and the ids in it."""

    ids: set[str] | frozenset[str] = frozenset()
    future: "Future[None] | None" = None

    def overlaps(self, items: Iterable[HashedItem]) -> bool:
        return any(item.id in self.ids for item in items)

    def finish(self) -> None:
        """Wait for it; its error is raised here, once."""
        future, self.future = self.future, None
        if future is not None:
            future.result()


def _is_refusal(exc: psycopg.Error) -> bool:
    return (exc.sqlstate or "").startswith(_REFUSALS) or exc.sqlstate == "57014"


def _reason(exc: psycopg.Error) -> str:
    primary = exc.diag.message_primary or str(exc).strip()
    return f"{primary} ({exc.diag.message_detail})" if exc.diag.message_detail else primary


def _id_of(given: Any) -> str:
    """The id of an input that may be anything, for the list of errors."""
    id_ = given.get("id") if isinstance(given, Mapping) else getattr(given, "id", None)
    return id_ if isinstance(id_, str) else repr(id_)
