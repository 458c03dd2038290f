"""Which of a batch's documents differ from what is stored: hashes are compared, never texts or vectors."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import Connection, Cursor

from .documents import HashedItem, PreparedDocument

H = TypeVar("H", bound=HashedItem)

# LATERAL and OFFSET 0: each id is looked up in the primary key. A planner that takes a table for small would read
# and hash all of it for every batch: 17 ms instead of 1 ms at 8,000 rows.

# Of the rows of a batch, those that are new or differ in a part that was given; true for the stored ones.
_CHANGED = """
    SELECT given.id, stored.id IS NOT NULL
    FROM unnest(%(ids)b::text[], %(content)b::bytea[],
                %(vector_given)b::bool[], %(vector)b::bytea[],
                %(chunks_given)b::bool[], %(chunks)b::bytea[])
         AS given (id, content_hash, vector_given, vector_hash, chunks_given, chunks_hash)
    LEFT JOIN LATERAL (
        SELECT id, content_hash, vector_hash, chunks_hash, embedding FROM embeddings WHERE id = given.id OFFSET 0
    ) AS stored ON true
    WHERE stored.content_hash IS DISTINCT FROM given.content_hash
       OR given.vector_given AND (stored.vector_hash IS DISTINCT FROM given.vector_hash
                                  OR stored.vector_hash IS NULL AND stored.embedding IS NOT NULL)
       OR given.chunks_given AND (stored.chunks_hash IS DISTINCT FROM given.chunks_hash
                                  OR given.chunks_hash IS NULL
                                     AND EXISTS (SELECT FROM chunks WHERE chunks.document_id = given.id))
"""

# Of the items of a batch, those to write; whether they are stored, and whether with the text's own vector. Hashes,
# of 32 bytes each, come in one value: to make an array of them takes longer than to look them up.
_CHANGED_ITEMS = """
    SELECT given.id, stored.id IS NOT NULL,
           coalesce(stored.text_hash = given.text_hash AND stored.model_id = %(model_id)s
                    AND stored.vector_hash IS NOT NULL, false)
    FROM (SELECT id, substring(%(text)b::bytea FROM (32 * n - 31)::int FOR 32) AS text_hash,
                 substring(%(content)b::bytea FROM (32 * n - 31)::int FOR 32) AS content_hash
          FROM unnest(%(ids)b::text[]) WITH ORDINALITY AS each (id, n)) AS given
    LEFT JOIN LATERAL (
        SELECT id, text_hash, content_hash, vector_hash, model_id FROM embeddings WHERE id = given.id OFFSET 0
    ) AS stored ON true
    WHERE stored.content_hash IS DISTINCT FROM given.content_hash
       OR stored.model_id IS DISTINCT FROM %(model_id)s
       OR stored.vector_hash IS NULL
"""

_LOCK_STORED = """
    SELECT id, source_id, workspace, text_hash, content_hash, vector_hash, chunks_hash, model_id,
           vector_hash IS NULL AND embedding IS NOT NULL,
           chunks_hash IS NULL AND EXISTS (SELECT FROM chunks WHERE chunks.document_id = embeddings.id)
    FROM embeddings WHERE id = ANY(%s) ORDER BY id COLLATE "C" FOR NO KEY UPDATE
"""


@dataclass(frozen=True, slots=True)
class StoredRow:
    """What is stored of a document, as far as an upsert must know it.

    vector_unhashed, chunks_unhashed: it has what no hash tells of, adopted or taken back after a deletion.
    """

    source_id: str
    workspace: str | None
    text_hash: bytes | None
    content_hash: bytes | None
    vector_hash: bytes | None
    chunks_hash: bytes | None
    model_id: str | None
    vector_unhashed: bool
    chunks_unhashed: bool

    def content_differs(self, document: PreparedDocument) -> bool:
        return self.content_hash != document.content_hash

    def vector_differs(self, document: PreparedDocument) -> bool:
        return document.vector_given and (self.vector_unhashed or self.vector_hash != document.vector_hash)

    def chunks_differ(self, document: PreparedDocument) -> bool:
        return document.chunks is not None and (self.chunks_unhashed or self.chunks_hash != document.chunks_hash)

    def has_vector_of(self, document: PreparedDocument, model_id: str) -> bool:
        """Whether the stored vector is the model's own of the document's text."""
        return (self.text_hash, self.model_id) == (document.text_hash, model_id) and self.vector_hash is not None

    def differs(self, document: PreparedDocument) -> bool:
        return self.content_differs(document) or self.vector_differs(document) or self.chunks_differ(document)


def changed_ids(connection: Connection[Any], runs: Iterable[Sequence[PreparedDocument]]) -> dict[str, bool]:
    """Ids of the documents that are not stored just so, and whether they are stored at all.

    Takes no lock and writes nothing. Of an id that is in several `runs` the last counts.
    """
    return dict(_compared(connection, runs, _CHANGED, _hashes_of_documents))


def _hashes_of_documents(documents: Sequence[PreparedDocument]) -> dict[str, Any]:
    return {
        "ids": [d.id for d in documents],
        "content": [d.content_hash for d in documents],
        "vector_given": [d.vector_given for d in documents],
        "vector": [d.vector_hash for d in documents],
        "chunks_given": [d.chunks is not None for d in documents],
        "chunks": [d.chunks_hash for d in documents],
    }


@dataclass(frozen=True, slots=True)
class ItemChange:
    """An item that differs from what is stored: whether it is stored at all, and whether its vector may stay."""

    stored: bool
    vector_stays: bool


def changed_items(
    connection: Connection[Any], runs: Iterable[Sequence[HashedItem]], model_id: str
) -> dict[str, ItemChange]:
    """The items that differ from what is stored, by id; else as `changed_ids`."""

    def hashes(items: Sequence[HashedItem]) -> dict[str, Any]:
        return {
            "ids": [item.id for item in items],
            "text": b"".join([item.text_hash for item in items]),
            "content": b"".join([item.content_hash for item in items]),
            "model_id": model_id,
        }

    return {id_: ItemChange(*change) for id_, *change in _compared(connection, runs, _CHANGED_ITEMS, hashes)}


def _compared(
    connection: Connection[Any],
    runs: Iterable[Sequence[H]],
    statement: LiteralString,
    hashes: Callable[[Sequence[H]], dict[str, Any]],
) -> list[tuple[Any, ...]]:
    """The rows of `statement` for each run. It is sent, and the next run taken while the server works on it."""
    try:
        with connection.pipeline():
            compared = [(run, connection.execute(statement, hashes(run))) for run in runs]
    except Exception:
        # psycopg takes for prepared what is sent, also where the server never gets to it: a rollback makes it forget.
        with suppress(psycopg.Error), connection.transaction(force_rollback=True):
            pass
        raise
    rows: dict[str, tuple[Any, ...]] = {}
    for run, cursor in compared:
        if rows:
            for item in run:
                rows.pop(item.id, None)
        rows.update((row[0], row) for row in cursor)
    return list(rows.values())


def lock_stored(cursor: Cursor[Any], ids: Collection[str]) -> dict[str, StoredRow]:
    """Lock the rows of `ids` that exist, in order of id so that writers never deadlock, and read them."""
    if not ids:
        return {}
    cursor.execute(_LOCK_STORED, (sorted(ids),))
    return {row[0]: StoredRow(*row[1:]) for row in cursor}
