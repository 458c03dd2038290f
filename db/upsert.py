"""One batch of documents written in one transaction, a document always with all its chunks."""

import itertools
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Event
from typing import Any, Final, Literal, LiteralString

from psycopg import Cursor, sql
from psycopg import errors as pg

from . import faults
from .change_detection import StoredRow, lock_stored
from .documents import PreparedDocument
from .staging import copy_chunks, copy_documents, create_staging, stage_chunks, stage_documents
from .transactions import WriteTransaction

Outcome = Literal["inserted", "updated", "unchanged"]

_INSERT_NEW = sql.SQL("""
    INSERT INTO embeddings (id, source_id, workspace, text, text_hash, content_hash, vector_hash, chunks_hash,
                            model_id, embedding, metadata, created_at, updated_at)
    SELECT id, source_id, workspace, text, text_hash, content_hash, vector_hash, chunks_hash,
           model_id, embedding, metadata, coalesce(created_at, %(now)s), updated_at
    FROM vectorkeep_documents WHERE id = ANY(%(ids)s) ORDER BY id COLLATE "C"
    {on_conflict}
    RETURNING id
""")
_PASS_OVER: Final = sql.SQL("ON CONFLICT (id) DO NOTHING")
# A document that can neither be inserted nor seen was made and deleted by others at once. Not so often: then it is one
# that row-level security hides, and the insertion is to fail.
_PASS_OVER_AT_MOST = 5

# The vector is mentioned only where it changed: an update that leaves it alone stays HOT and never
# touches the HNSW index. Assigning an equal vector would not do: a toasted value is compared by address.
_UPDATE = sql.SQL("""
    UPDATE embeddings AS stored
    SET source_id = given.source_id, workspace = given.workspace, text = given.text,
        text_hash = given.text_hash, content_hash = given.content_hash, metadata = given.metadata,
        created_at = coalesce(given.created_at, stored.created_at), updated_at = given.updated_at
        {vector} {chunks}
    FROM vectorkeep_documents AS given
    WHERE stored.id = given.id AND given.id = ANY(%s)
""")
_NEW_VECTOR: Final = ", embedding = given.embedding, vector_hash = given.vector_hash, model_id = given.model_id"
_EQUAL_VECTOR: Final = ", model_id = given.model_id"
# A vector that stays while the text changes is no longer that model's vector of the text: `embed_batch` must not
# take it for one.
_KEPT_VECTOR: Final = ", model_id = CASE WHEN stored.text_hash = given.text_hash THEN stored.model_id END"
_NEW_CHUNKS: Final = ", chunks_hash = given.chunks_hash"
_KEPT_CHUNKS: Final = ""

_MOVE_CHUNKS = """
    UPDATE chunks SET source_id = document.source_id, workspace = document.workspace
    FROM embeddings AS document
    WHERE chunks.document_id = document.id AND document.id = ANY(%s)
      AND (chunks.source_id, chunks.workspace) IS DISTINCT FROM (document.source_id, document.workspace)
"""

_ANY_DETACHED = "SELECT EXISTS (SELECT FROM chunks WHERE document_id IS NULL)"
# Chunks whose document is gone are none of anybody's only where the key was never validated.
_ANY_LEFT = """
    SELECT EXISTS (SELECT FROM chunks WHERE document_id IS NULL),
           EXISTS (SELECT FROM pg_constraint
                   WHERE conrelid = 'chunks'::regclass AND contype = 'f' AND NOT convalidated)
"""
_DETACH_LEFT = "UPDATE chunks SET document_id = NULL, origin_id = document_id WHERE document_id = ANY(%s)"

# Detached chunks stand in the source and workspace that their document had: those are changed, too.
_TAKE_BACK_DETACHED = """
    WITH detached AS (
        SELECT id, source_id, workspace FROM chunks
        WHERE document_id IS NULL AND origin_id = ANY(%s) ORDER BY id FOR UPDATE)
    UPDATE chunks SET document_id = origin_id, source_id = document.source_id, workspace = document.workspace
    FROM detached, embeddings AS document
    WHERE chunks.id = detached.id AND chunks.origin_id = document.id
    RETURNING detached.source_id, detached.workspace
"""

# A chunk that stands at another place than its id says goes, too: no update has to change a place.
_DELETE_GONE_CHUNKS = """
    DELETE FROM chunks
    WHERE document_id = ANY(%(ids)s)
      AND NOT EXISTS (SELECT FROM vectorkeep_chunks AS given
                      WHERE given.id = chunks.id AND given.document_id = chunks.document_id
                        AND given.chunk_index = chunks.chunk_index)
"""

_DELETE_DETACHED = """
    DELETE FROM chunks WHERE document_id IS NULL AND origin_id = ANY(%s) RETURNING source_id, workspace
"""

_UPDATE_CHUNK_VECTORS = """
    UPDATE chunks
    SET text = given.text, text_hash = given.text_hash, embedding = given.embedding
    FROM vectorkeep_chunks AS given
    WHERE chunks.id = given.id AND chunks.document_id = given.document_id
      AND (chunks.text_hash, chunks.embedding) IS DISTINCT FROM (given.text_hash, given.embedding)
"""

_UPDATE_CHUNKS = """
    UPDATE chunks
    SET source_id = given.source_id, workspace = given.workspace, metadata = given.metadata
    FROM vectorkeep_chunks AS given
    WHERE chunks.id = given.id AND chunks.document_id = given.document_id
      AND (chunks.source_id, chunks.workspace, chunks.metadata)
          IS DISTINCT FROM (given.source_id, given.workspace, given.metadata)
"""

# A chunk id that some other document holds breaks the primary key: the document is refused, none is robbed.
_INSERT_CHUNKS = """
    INSERT INTO chunks (id, document_id, chunk_index, source_id, workspace, text, text_hash, embedding,
                        metadata)
    SELECT id, document_id, chunk_index, source_id, workspace, text, text_hash, embedding, metadata
    FROM vectorkeep_chunks AS given
    WHERE NOT EXISTS (SELECT FROM chunks
                      WHERE chunks.id = given.id AND chunks.document_id = given.document_id)
    ORDER BY id
"""


@dataclass(frozen=True, slots=True)
class UpsertBatch:
    """Documents with distinct ids, all checked, and the model of their vectors.

    stored: ids that were found stored a moment ago. Only those are locked; the others are taken for new, and
    the table's own key tells where that is no longer true.
    update_only: ids of documents whose stored vector was found to stay. One that is gone, or has another text or
    vector by now, is left as it is and has no outcome.
    """

    documents: Sequence[PreparedDocument]
    stored: Set[str]
    model_id: str
    update_only: Set[str] = frozenset()

    @property
    def ids(self) -> Set[str]:
        return {document.id for document in self.documents}

    def write(self, transaction: WriteTransaction, sent: Event | None = None) -> dict[str, Outcome]:
        """Write what differs from the stored rows. Returns the outcome of every document by id.

        sent: set once documents are on their way to the server.
        """
        cursor, now = transaction.cursor, datetime.now(UTC)
        stored = lock_stored(cursor, self.stored & self.ids)
        faults.point("upsert.locked")
        documents = [d for d in self.documents if d.id not in self.update_only or self._vector_stays(d, stored)]
        new = sorted((d for d in documents if d.id not in stored), key=lambda d: d.id)
        if new:
            if not _copy_new(transaction, new, self.model_id, now, sent):
                new = _insert_new(transaction, new, stored, self.model_id, now)
            faults.point("upsert.inserted")
        inserted = {d.id for d in new}
        updated = [d for d in documents if d.id not in inserted and stored[d.id].differs(d)]
        if updated:
            _update_stored(cursor, updated, stored, self.model_id, now, sent)
            faults.point("upsert.updated")
            _chunks_of_updated(transaction, updated, stored)
            faults.point("upsert.updated_chunks")
        touched = {(document.source_id, document.workspace) for document in (*new, *updated)}
        touched |= {(stored[document.id].source_id, stored[document.id].workspace) for document in updated}
        for source_id, workspace in touched:
            transaction.touch(source_id, workspace)
        outcomes: dict[str, Outcome] = {d.id: "unchanged" for d in documents}
        outcomes |= dict.fromkeys(inserted, "inserted")
        outcomes |= dict.fromkeys((d.id for d in updated), "updated")
        return outcomes

    def _vector_stays(self, document: PreparedDocument, stored: dict[str, StoredRow]) -> bool:
        row = stored.get(document.id)
        return row is not None and row.has_vector_of(document, self.model_id)


def _settle_older_chunks(transaction: WriteTransaction, new: Sequence[PreparedDocument]) -> None:
    """Chunks that stood under the ids of the `new` documents before: those that come with chunks replace them.

    The others take them back. The documents are inserted, their own chunks are not yet: whoever else has the ids has
    finished, and what there is was left by earlier documents. Nearly always there is none, and no id is asked about.
    """
    cursor, ids = transaction.cursor, [d.id for d in new]
    [(detached, unvalidated)] = cursor.execute(_ANY_LEFT).fetchall()
    if unvalidated and cursor.execute(_DETACH_LEFT, (ids,)).rowcount:
        detached = True
    if not detached:
        return
    with_chunks = {d.id for d in new if d.chunks is not None}
    _remove_detached(transaction, with_chunks)
    settled = cursor.execute(_TAKE_BACK_DETACHED, ([id_ for id_ in ids if id_ not in with_chunks],))
    for source_id, workspace in settled.fetchall():
        transaction.touch(source_id, workspace)


def _remove_detached(transaction: WriteTransaction, ids: Iterable[str]) -> None:
    """Delete the detached chunks of the documents of `ids`."""
    for source_id, workspace in transaction.cursor.execute(_DELETE_DETACHED, (list(ids),)).fetchall():
        transaction.touch(source_id, workspace)


def _copy_new(
    transaction: WriteTransaction,
    new: Sequence[PreparedDocument],
    model_id: str,
    now: datetime,
    sent: Event | None,
) -> bool:
    """COPY the `new` documents and their chunks straight into the tables: the fast way.

    False, with nothing done, where another writer made one of them meanwhile, or where the tables take no
    COPY (row-level security).
    """
    cursor = transaction.cursor
    try:
        with cursor.connection.transaction():
            copy_documents(cursor, _telling(sent, new), model_id, now)
            faults.point("upsert.copied_documents")
            _settle_older_chunks(transaction, new)
            copy_chunks(cursor, new)
    except (pg.UniqueViolation, pg.FeatureNotSupported):
        return False
    return True


def _telling(sent: Event | None, documents: Iterable[PreparedDocument]) -> Iterator[PreparedDocument]:
    """The `documents`; once all were taken, `sent` is set."""
    yield from documents
    if sent is not None:
        sent.set()


def _insert_new(
    transaction: WriteTransaction,
    new: Sequence[PreparedDocument],
    stored: dict[str, StoredRow],
    model_id: str,
    now: datetime,
) -> list[PreparedDocument]:
    """Insert the `new` documents with their chunks; returns those. One made meanwhile joins `stored`, locked."""
    cursor = transaction.cursor
    create_staging(cursor)
    stage_documents(cursor, new, model_id, now)
    inserted: set[str] = set()
    waiting = list(new)
    for attempt in itertools.count():
        on_conflict = _PASS_OVER if attempt < _PASS_OVER_AT_MOST else sql.SQL("")
        cursor.execute(_INSERT_NEW.format(on_conflict=on_conflict), {"ids": [d.id for d in waiting], "now": now})
        inserted.update(row[0] for row in cursor)
        late = [d for d in waiting if d.id not in inserted]
        stored.update(lock_stored(cursor, [d.id for d in late]))
        waiting = [d for d in late if d.id not in stored]  # made and deleted again by others: once more
        if not waiting:
            break
    new = [d for d in new if d.id in inserted]
    _settle_older_chunks(transaction, new)
    stage_chunks(cursor, new)
    cursor.execute(_INSERT_CHUNKS)
    cursor.execute("TRUNCATE vectorkeep_documents, vectorkeep_chunks")  # for those to be updated
    return new


def _update_stored(
    cursor: Cursor[Any],
    documents: Sequence[PreparedDocument],
    stored: dict[str, StoredRow],
    model_id: str,
    now: datetime,
    sent: Event | None,
) -> None:
    create_staging(cursor)
    stage_documents(cursor, _telling(sent, documents), model_id, now)
    shapes: dict[tuple[LiteralString, LiteralString], list[str]] = {}
    for document in documents:
        shape = _vector_part(document, stored[document.id]), _KEPT_CHUNKS if document.chunks is None else _NEW_CHUNKS
        shapes.setdefault(shape, []).append(document.id)
    for (vector, chunks), ids in shapes.items():
        statement = _UPDATE.format(vector=sql.SQL(vector), chunks=sql.SQL(chunks))
        cursor.execute(statement, (ids,))


def _vector_part(document: PreparedDocument, stored: StoredRow) -> LiteralString:
    """What the update of a stored row says about its vector."""
    if not document.vector_given:
        return _KEPT_VECTOR
    return _NEW_VECTOR if stored.vector_differs(document) else _EQUAL_VECTOR


def _chunks_of_updated(
    transaction: WriteTransaction, documents: Sequence[PreparedDocument], stored: dict[str, StoredRow]
) -> None:
    """Bring the chunks of `documents` to what was given; where none were, keep and move the stored ones."""
    cursor = transaction.cursor
    if moved := [d.id for d in documents if d.chunks is None and _moves(d, stored[d.id])]:
        cursor.execute(_MOVE_CHUNKS, (moved,))
    replaced = [d for d in documents if d.chunks is not None]
    if not replaced:
        return
    [(any_detached,)] = cursor.execute(_ANY_DETACHED).fetchall()
    if any_detached:
        _remove_detached(transaction, (d.id for d in replaced))
    stage_chunks(cursor, replaced)
    cursor.execute(_DELETE_GONE_CHUNKS, {"ids": [d.id for d in replaced]})
    cursor.execute(_UPDATE_CHUNK_VECTORS)
    cursor.execute(_UPDATE_CHUNKS)
    cursor.execute(_INSERT_CHUNKS)


def _moves(document: PreparedDocument, stored: StoredRow) -> bool:
    return (document.source_id, document.workspace) != (stored.source_id, stored.workspace)
