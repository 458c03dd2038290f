"""Deletion by id or by source, each in one transaction, with the chunks removed or kept detached."""

from collections.abc import Sequence
from typing import Any

from psycopg import Cursor

from . import faults
from .transactions import WriteTransaction
from .types import DeleteResult

_CREATE_DOOMED = """
    CREATE TEMP TABLE IF NOT EXISTS vectorkeep_doomed (id text PRIMARY KEY, source_id text, workspace text)
    ON COMMIT DELETE ROWS
"""
# The rows are locked first, in order of id as upserts do, and then read again by what follows: nothing
# that a writer committed meanwhile is missed, nothing that came in later is taken along.
_DOOM_IDS = """
    INSERT INTO vectorkeep_doomed
    SELECT id, source_id, workspace FROM embeddings WHERE id = ANY(%s) ORDER BY id COLLATE "C" FOR UPDATE
"""
_DOOM_SOURCE = """
    INSERT INTO vectorkeep_doomed
    SELECT id, source_id, workspace FROM embeddings WHERE source_id = %s ORDER BY id COLLATE "C" FOR UPDATE
"""
_DELETE_CHUNKS = "DELETE FROM chunks USING vectorkeep_doomed AS doomed WHERE chunks.document_id = doomed.id"
_DELETE_DETACHED_OF_SOURCE = """
    DELETE FROM chunks WHERE document_id IS NULL AND source_id = %s RETURNING workspace
"""
_DETACH_CHUNKS = """
    UPDATE chunks SET document_id = NULL, origin_id = chunks.document_id
    FROM vectorkeep_doomed AS doomed WHERE chunks.document_id = doomed.id
"""
_DELETE_DOCUMENTS = "DELETE FROM embeddings USING vectorkeep_doomed AS doomed WHERE embeddings.id = doomed.id"
_TOUCHED = "SELECT DISTINCT source_id, workspace FROM vectorkeep_doomed"


def delete_ids(transaction: WriteTransaction, ids: Sequence[str]) -> DeleteResult:
    """Delete the documents of `ids` that exist, with their chunks."""
    cursor = transaction.cursor
    cursor.execute(_CREATE_DOOMED)
    cursor.execute(_DOOM_IDS, (sorted(set(ids)),))
    removed = _count(cursor, _DELETE_CHUNKS)
    return DeleteResult(deleted=_delete_doomed(transaction), chunks_removed=removed, chunks_detached=0)


def delete_source(transaction: WriteTransaction, source_id: str, *, cascade: bool) -> DeleteResult:
    """Delete the documents of a source; `cascade` False keeps their chunks, detached."""
    cursor = transaction.cursor
    cursor.execute(_CREATE_DOOMED)
    cursor.execute(_DOOM_SOURCE, (source_id,))
    if not cascade:
        detached = _count(cursor, _DETACH_CHUNKS)
        return DeleteResult(deleted=_delete_doomed(transaction), chunks_removed=0, chunks_detached=detached)
    removed = _count(cursor, _DELETE_CHUNKS)
    for (workspace,) in cursor.execute(_DELETE_DETACHED_OF_SOURCE, (source_id,)).fetchall():
        removed += 1
        transaction.touch(source_id, workspace)
    return DeleteResult(deleted=_delete_doomed(transaction), chunks_removed=removed, chunks_detached=0)


def _delete_doomed(transaction: WriteTransaction) -> int:
    faults.point("delete.chunks")
    for source_id, workspace in transaction.cursor.execute(_TOUCHED).fetchall():
        transaction.touch(source_id, workspace)
    deleted = _count(transaction.cursor, _DELETE_DOCUMENTS)
    faults.point("delete.documents")
    return deleted


def _count(cursor: Cursor[Any], statement: str) -> int:
    return cursor.execute(statement.encode()).rowcount
