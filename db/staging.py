"""Binary COPY: of new rows straight into the tables, of others into temporary ones before they are merged.

Rows are packed by hand in COPY's binary format: half the time of adapting value by value, and no type
OID is needed for vectors.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from psycopg import Cursor, sql

from .documents import PreparedDocument

_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = struct.pack(">h", -1)
_NULL = struct.pack(">i", -1)
_LENGTH = struct.Struct(">i").pack
_INT = struct.Struct(">ii").pack
_TIME = struct.Struct(">iq").pack
_DIGEST = _LENGTH(32)  # of a sha256
_FIELDS = struct.Struct(">h").pack
_PG_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_JSONB_VERSION = b"\x01"
_BUFFER_BYTES = 64 * 1024

_DOCUMENT_COLUMNS = (
    "id", "source_id", "workspace", "text", "text_hash", "content_hash", "vector_hash", "chunks_hash",
    "model_id", "embedding", "metadata", "created_at", "updated_at",
)  # fmt: skip
_CHUNK_COLUMNS = (
    "id", "document_id", "chunk_index", "source_id", "workspace", "text", "text_hash", "embedding", "metadata",
)  # fmt: skip

# `ON COMMIT DELETE ROWS`: made once a connection, empty at the start of every transaction.
_CREATE = """
    CREATE TEMP TABLE IF NOT EXISTS vectorkeep_documents (
        id text, source_id text, workspace text, text text, text_hash bytea, content_hash bytea,
        vector_hash bytea, chunks_hash bytea, model_id text, embedding vector, metadata jsonb,
        created_at timestamptz, updated_at timestamptz
    ) ON COMMIT DELETE ROWS;
    CREATE TEMP TABLE IF NOT EXISTS vectorkeep_chunks (
        id text, document_id text, chunk_index int, source_id text, workspace text, text text,
        text_hash bytea, embedding vector, metadata jsonb
    ) ON COMMIT DELETE ROWS
"""
_CREATE_VECTORS = """
    CREATE TEMP TABLE IF NOT EXISTS vectorkeep_vectors (key bytea, embedding vector) ON COMMIT DELETE ROWS
"""


def create_staging(cursor: Cursor[Any]) -> None:
    cursor.execute(_CREATE, prepare=False)  # several at once cannot be prepared


def stage_documents(cursor: Cursor[Any], documents: Iterable[PreparedDocument], model_id: str, now: datetime) -> None:
    """COPY `documents` into `vectorkeep_documents`; an absent `created_at` is NULL there."""
    _copy(cursor, "vectorkeep_documents", _DOCUMENT_COLUMNS, _document_rows(documents, model_id, None, now))


def stage_chunks(cursor: Cursor[Any], documents: Iterable[PreparedDocument]) -> None:
    """COPY the chunks of `documents` into `vectorkeep_chunks`."""
    _copy(cursor, "vectorkeep_chunks", _CHUNK_COLUMNS, _chunk_rows(documents))


def copy_documents(cursor: Cursor[Any], documents: Iterable[PreparedDocument], model_id: str, now: datetime) -> None:
    """COPY new `documents` straight into `embeddings`. Raises UniqueViolation where one is there already."""
    _copy(cursor, "embeddings", _DOCUMENT_COLUMNS, _document_rows(documents, model_id, now, now))


def copy_chunks(cursor: Cursor[Any], documents: Iterable[PreparedDocument]) -> None:
    """COPY the chunks of new `documents` straight into `chunks`."""
    if any(document.chunks for document in documents):
        _copy(cursor, "chunks", _CHUNK_COLUMNS, _chunk_rows(documents))


def copy_vectors(cursor: Cursor[Any], rows: Iterable[tuple[bytes, bytes]]) -> None:
    """COPY (key, vector in binary form) pairs into `vectorkeep_vectors`."""
    cursor.execute(_CREATE_VECTORS)
    _copy(
        cursor,
        "vectorkeep_vectors",
        ("key", "embedding"),
        (_FIELDS(2) + _bytes(key) + _bytes(vector) for key, vector in rows),
    )


def copy_ids(cursor: Cursor[Any], table: str, ids: Iterable[str]) -> None:
    """COPY `ids` into the column `id` of `table`."""
    _copy(cursor, table, ("id",), (_FIELDS(1) + _text(id_) for id_ in ids))


def _copy(cursor: Cursor[Any], table: str, columns: Sequence[str], rows: Iterable[bytes]) -> None:
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    waiting, size = [_HEADER], 0
    with cursor.copy(statement) as copy:
        for row in rows:
            waiting.append(row)
            size += len(row)
            if size >= _BUFFER_BYTES:
                copy.write(b"".join(waiting))
                waiting, size = [], 0
        copy.write(b"".join([*waiting, _TRAILER]))


def _document_rows(
    documents: Iterable[PreparedDocument], model_id: str, created_at: datetime | None, updated_at: datetime
) -> Iterator[bytes]:
    """`created_at` and `updated_at` are for documents that do not say when."""
    head, model, created, updated = _FIELDS(13), _text(model_id), _time(created_at), _time(updated_at)
    for d in documents:
        id_, text, vector = d.id.encode(), d.text.encode(), d.vector
        yield b"".join(  # lengths beside what is long: to join both first would copy it once more
            (
                head,
                _LENGTH(len(id_)),
                id_,
                _text(d.source_id),
                _NULL if d.workspace is None else _text(d.workspace),
                _LENGTH(len(text)),
                text,
                _DIGEST,
                d.text_hash,
                _DIGEST,
                d.content_hash,
                _bytes(d.vector_hash),
                _bytes(d.chunks_hash),
                _NULL if vector is None or d.vector_of_other_text else model,
                _NULL if vector is None else _LENGTH(len(vector)),
                vector or b"",
                _LENGTH(len(d.metadata) + 1),
                _JSONB_VERSION,
                d.metadata,
                created if d.created_at is None else _time(d.created_at),
                updated if d.updated_at is None else _time(d.updated_at),
            )
        )


def _chunk_rows(documents: Iterable[PreparedDocument]) -> Iterator[bytes]:
    head = _FIELDS(9)
    for document in documents:
        id_, source_id = _text(document.id), _text(document.source_id)
        workspace = _NULL if document.workspace is None else _text(document.workspace)
        for chunk in document.chunks or ():
            yield b"".join(
                (
                    head,
                    _text(chunk.id),
                    id_,
                    _INT(4, chunk.index),
                    source_id,
                    workspace,
                    _text(chunk.text),
                    _DIGEST,
                    chunk.text_hash,
                    _bytes(chunk.vector),
                    _jsonb(chunk.metadata),
                )
            )


def _text(value: str) -> bytes:
    data = value.encode()
    return _LENGTH(len(data)) + data


def _bytes(value: bytes | None) -> bytes:
    return _NULL if value is None else _LENGTH(len(value)) + value


def _jsonb(value: bytes) -> bytes:
    return _LENGTH(len(value) + 1) + _JSONB_VERSION + value


def _time(value: datetime | None) -> bytes:
    """Microseconds since 2000-01-01 UTC, in whole numbers: floats would lose the last digits."""
    if value is None:
        return _NULL
    since = value - _PG_EPOCH
    return _TIME(8, (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds)
