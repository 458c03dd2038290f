"""Ingestion: documents and items in batches, from the caller's iterable to committed rows.

Each batch is checked, compared with what is stored, and only what differs is embedded and written. The
embedder runs outside any transaction, and while one batch is written the next is made ready.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import psycopg
from psycopg import errors as pg

from . import faults
from .batch_codec import BatchCodec, vectors_of
from .batch_writer import BatchWriter
from .change_detection import ItemChange, changed_ids, changed_items
from .checked_batch import CheckedBatch, id_of
from .documents import HashedItem, PreparedDocument, as_item, hash_item, prepare
from .embedding import TextEmbedder, document_of
from .engine import Database
from .errors import ValidationError, words_of
from .registry import StoreModel
from .tally import Tally, batches
from .transactions import LoggedWrite, retried, run_write
from .types import Document, Item
from .upsert import Outcome, UpsertBatch

logger = logging.getLogger("vectorkeep")

H = TypeVar("H", bound=HashedItem)

# SQLSTATE classes with which the server refuses data: another try fails just so, but without the culprit
# the rest goes through. 57014 is a statement that took too long.
_REFUSALS = ("0A", "22", "23", "44", "54", "P0")

# All that a write needs. Tenants have rights to some columns only of the tables beside those of the documents.
_MAY_WRITE = """
    SELECT bool_and(has_table_privilege(name, 'SELECT') AND has_table_privilege(name, 'INSERT')
                    AND has_table_privilege(name, 'UPDATE') AND has_table_privilege(name, 'DELETE'))
           AND has_any_column_privilege('write_log', 'INSERT') AND has_any_column_privilege('write_log', 'SELECT')
           AND has_any_column_privilege('ingestion_pause', 'SELECT')
           AND has_any_column_privilege('embedding_models', 'SELECT')
           AND has_database_privilege(current_database(), 'TEMPORARY')
    FROM unnest(ARRAY['embeddings', 'chunks']) AS name
"""
_IS_EMPTY = "SELECT NOT EXISTS (SELECT FROM embeddings)"


@dataclass(frozen=True, slots=True)
class Ingestion:
    """What ingestion works with: connections, the store's model, and whom to tell of each commit."""

    database: Database
    model: StoreModel
    after_commit: Callable[[LoggedWrite], None]

    def upsert(self, documents: Iterable[Document | Mapping[str, Any]], batch_size: int, tally: Tally) -> None:
        """Write `documents` batch by batch; one that is not valid or is refused never stops the others.

        One batch is made ready while the one before is written. A load into an empty store compares nothing, as long
        as all it brings turns out to be new.
        """
        all_new = self._is_empty()
        with BatchWriter[Mapping[str, Any]]() as writer:
            for batch in batches(iter(documents), batch_size):
                # Who registers one builds its index, and waits for open transactions: none may be ours.
                without_model = self.model.registered is None
                if without_model:
                    all_new &= _all_inserted(writer.finish())
                codec = BatchCodec(self.model, vectors_of(batch))
                checked = CheckedBatch(writer.beside(batch), partial(prepare, model=codec), tally)
                if all_new or without_model or self._must_finish(writer, batch):
                    checked.items()
                    all_new &= _all_inserted(writer.finish())
                if all_new:
                    upsert = self._batch(checked.items(), frozenset())
                else:
                    upsert = self._changed_documents(checked, tally)
                writer.finish()
                write = partial(self._write, upsert, tally, writer)
                writer.start(upsert.ids, write, partial(self._done, tally, len(batch)), full=len(batch) == batch_size)

    def embed(
        self, items: Iterable[Item | Mapping[str, Any]], embedder: TextEmbedder, batch_size: int, tally: Tally
    ) -> None:
        """Embed and write those of `items` whose text, metadata, source or model changed.

        One batch is embedded while the one before is written.
        """
        with BatchWriter[list[HashedItem]]() as writer:
            for batch in batches(iter(items), batch_size):
                checked = CheckedBatch(writer.beside(batch), _hashed, tally)
                if self._must_finish(writer, batch):
                    checked.items()
                    writer.finish()
                upsert = self._embed_changed(checked, embedder, tally)
                writer.finish()
                write = partial(self._write_found, upsert, checked.items(), tally, writer)
                done = partial(self._found_done, embedder, tally, len(batch))
                writer.start(upsert.ids, write, done, full=len(batch) == batch_size)

    def _must_finish(self, writer: BatchWriter[Any], batch: Iterable[Any]) -> bool:
        """Whether `batch` can be compared with what is stored only after the write under way.

        It has some of the same ids, too; or there is one connection for both.
        """
        return self.database.settings.pool_max == 1 or writer.overlaps(map(id_of, batch))

    def _done(self, tally: Tally, inputs: int, _returned: object = None) -> None:
        """A batch is written, and nothing of the next one yet."""
        self.model.batch_written(inputs)
        tally.progress(inputs)

    def _found_done(self, embedder: TextEmbedder, tally: Tally, inputs: int, gone: list[HashedItem]) -> None:
        """The same; items whose document was deleted, after its vector was found to stay, are embedded."""
        self._done(tally, inputs)
        while gone:
            again = CheckedBatch(gone, lambda item: item, tally)
            gone = self._write_found(self._embed_changed(again, embedder, tally), gone, tally)

    def _write_found(
        self, upsert: UpsertBatch, items: Sequence[HashedItem], tally: Tally, writer: BatchWriter[Any] | None = None
    ) -> list[HashedItem]:
        """Write the `upsert` made of `items`. Returns those of which nothing is stored any more to be updated."""
        written = self._write(upsert, tally, writer)
        return [item for item in items if item.id in upsert.update_only and item.id not in written]

    def compare(self, items: Iterable[Item | Mapping[str, Any]], model_id: str, batch_size: int, tally: Tally) -> None:
        """Count what `embed` would do with `items`; nothing is embedded or written."""
        for batch in batches(iter(items), batch_size):
            tally.add(self._outcomes_ahead(CheckedBatch(batch, _hashed, tally), model_id))
            tally.progress(len(batch))

    def _outcomes_ahead(self, checked: CheckedBatch[HashedItem], model_id: str) -> dict[str, Outcome]:
        changed = self._changed_items(checked, model_id)
        outcomes: dict[str, Outcome] = {item.id: "unchanged" for item in checked.items()}
        for id_, change in changed.items():
            outcomes[id_] = "updated" if change.stored else "inserted"
        return outcomes

    def _changed_items(self, checked: CheckedBatch[HashedItem], model_id: str) -> dict[str, ItemChange]:
        def look() -> dict[str, ItemChange]:
            with self.database.connection() as connection:
                return changed_items(connection, checked.runs(), model_id)

        return retried(look)

    def _embed_changed(self, checked: CheckedBatch[HashedItem], embedder: TextEmbedder, tally: Tally) -> UpsertBatch:
        """Those of `checked` that changed, as documents; the text is embedded only where it did itself."""
        changed = self._changed_items(checked, embedder.model_id)
        items = checked.items()
        tally.add({item.id: "unchanged" for item in items if item.id not in changed})
        to_embed = [item for item in items if item.id in changed and not changed[item.id].vector_stays]
        stored = {id_ for id_, change in changed.items() if change.stored}
        embedded = embedder.embed_items(to_embed, stored)
        faults.point("embed.embedded")
        codec = BatchCodec(self.model, (vector for item in embedded.values() for vector in item.vectors))
        documents = []
        for item in items:
            if item.id not in changed:
                continue
            try:
                documents.append(document_of(item, embedded.get(item.id), codec))
            except ValidationError as exc:
                tally.fail(item.id, str(exc))
        return replace(self._batch(documents, stored), update_only={d.id for d in documents if d.id not in embedded})

    def _changed_documents(self, checked: CheckedBatch[PreparedDocument], tally: Tally) -> UpsertBatch:
        """Those of `checked` that differ from what is stored."""

        def look() -> dict[str, bool]:
            with self.database.connection() as connection:
                return changed_ids(connection, checked.runs())

        changed = retried(look)
        documents = checked.items()
        tally.add({d.id: "unchanged" for d in documents if d.id not in changed})
        stored = {id_ for id_, is_stored in changed.items() if is_stored}
        return self._batch([d for d in documents if d.id in changed], stored)

    def _batch(self, documents: Sequence[PreparedDocument], stored: Set[str]) -> UpsertBatch:
        return UpsertBatch(documents, stored, self.model.model_id)

    def _is_empty(self) -> bool:
        def look() -> bool:
            with self.database.connection() as connection:
                [(empty,)] = connection.execute(_IS_EMPTY).fetchall()
                return bool(empty)

        return retried(look)

    def _is_refusal(self, exc: psycopg.Error) -> bool:
        """Whether it may be one document alone that the server does not take."""
        if isinstance(exc, pg.InsufficientPrivilege):  # a policy refuses single rows, a missing right all of them
            return retried(self._may_write)
        return (exc.sqlstate or "").startswith(_REFUSALS) or exc.sqlstate == "57014"

    def _may_write(self) -> bool:
        with self.database.connection() as connection:
            [(may,)] = connection.execute(_MAY_WRITE).fetchall()
        return bool(may)

    def _write(
        self, batch: UpsertBatch, tally: Tally, writer: BatchWriter[Any] | None = None
    ) -> dict[str, Outcome | Literal["failed"]]:
        """Write `batch`, in the thread of `writer` or the caller's; one that is refused is halved until it is alone."""
        if not batch.documents:
            return {}
        try:
            outcomes: Mapping[str, Outcome] = run_write(
                self.database,
                partial(batch.write, sent=writer.sent if writer else None),
                after_commit=self.after_commit,
                stopped=writer.stopped if writer else None,
            )
        except psycopg.Error as exc:
            first, *others = batch.documents
            if not self._is_refusal(exc) or (not others and isinstance(exc, pg.QueryCanceled)):
                raise  # one row that takes too long says nothing of the row: the server is slow, or was told to stop
            if not others:
                tally.fail(first.id, f"refused by the server: {_reason(exc)}")
                return {first.id: "failed"}
            middle = len(batch.documents) // 2
            halves = batch.documents[:middle], batch.documents[middle:]
            written = (self._write(replace(batch, documents=half), tally, writer) for half in halves)
            return {id_: outcome for part in written for id_, outcome in part.items()}
        tally.add(outcomes)
        return dict(outcomes)


def _all_inserted(written: Mapping[str, Any] | None) -> bool:
    """Whether a write made new rows only; None is a write that there was not."""
    return all(outcome == "inserted" for outcome in (written or {}).values())


def _hashed(given: Item | Mapping[str, Any]) -> HashedItem:
    return hash_item(as_item(given))


def _reason(exc: psycopg.Error) -> str:
    if isinstance(exc, pg.UniqueViolation) and exc.diag.constraint_name == "embeddings_pkey":
        return "its id is taken by a document that this role may not see"
    return words_of(exc)
