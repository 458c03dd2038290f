"""Binary COPY into temporary tables: the fast way for rows to reach the server before they are merged.

Rows are packed by hand in COPY's binary format: half the time of adapting value by value, and no type
OID is needed for vectors.
"""

import struct
from collections.abc import Iterable
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
_FIELDS = struct.Struct(">h").pack
_PG_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_JSONB_VERSION = b"\x01"
_BUFFER_BYTES = 256 * 1024

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
    cursor.execute(_CREATE)


def stage_documents(
    cursor: Cursor[Any], documents: Iterable[PreparedDocument], model_id: str | None, now: datetime
) -> None:
    """COPY `documents` into `vectorkeep_documents`, absent times set to `now` where a new row needs them."""
    rows = (_document_row(document, model_id, now) for document in documents)
    _copy(cursor, "vectorkeep_documents", rows)


def stage_chunks(cursor: Cursor[Any], documents: Iterable[PreparedDocument]) -> None:
    """COPY the chunks of `documents` into `vectorkeep_chunks`."""
    _copy(cursor, "vectorkeep_chunks", _chunk_rows(documents))


def copy_vectors(cursor: Cursor[Any], rows: Iterable[tuple[bytes, bytes]]) -> None:
    """COPY (key, vector in binary form) pairs into `vectorkeep_vectors`."""
    cursor.execute(_CREATE_VECTORS)
    _copy(cursor, "vectorkeep_vectors", (_FIELDS(2) + _bytes(key) + _bytes(vector) for key, vector in rows))


def _copy(cursor: Cursor[Any], table: str, rows: Iterable[bytes]) -> None:
    statement = sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(sql.Identifier(table))
    buffer = bytearray(_HEADER)
    with cursor.copy(statement) as copy:
        for row in rows:
            buffer += row
            if len(buffer) >= _BUFFER_BYTES:
                copy.write(bytes(buffer))
                buffer.clear()
        copy.write(bytes(buffer + _TRAILER))


def _document_row(document: PreparedDocument, model_id: str | None, now: datetime) -> bytes:
    return b"".join(
        (
            _FIELDS(13),
            _text(document.id),
            _text(document.source_id),
            _text(document.workspace),
            _text(document.text),
            _bytes(document.text_hash),
            _bytes(document.content_hash),
            _bytes(document.vector_hash),
            _bytes(document.chunks_hash),
            _text(model_id if document.vector is not None else None),
            _bytes(document.vector),
            _jsonb(document.metadata),
            _time(document.created_at),
            _time(document.updated_at or now),
        )
    )


def _chunk_rows(documents: Iterable[PreparedDocument]) -> Iterable[bytes]:
    for document in documents:
        shared = _text(document.source_id) + _text(document.workspace)
        for chunk in document.chunks or ():
            yield b"".join(
                (
                    _FIELDS(9),
                    _text(chunk.id),
                    _text(document.id),
                    _INT(4, chunk.index),
                    shared,
                    _text(chunk.text),
                    _bytes(chunk.text_hash),
                    _bytes(chunk.vector),
                    _jsonb(chunk.metadata),
                )
            )


def _text(value: str | None) -> bytes:
    return _bytes(None if value is None else value.encode())


def _bytes(value: bytes | None) -> bytes:
    return _NULL if value is None else _LENGTH(len(value)) + value


def _jsonb(value: bytes) -> bytes:
    return _bytes(_JSONB_VERSION + value)


def _time(value: datetime | None) -> bytes:
    """Microseconds since 2000-01-01 UTC, in whole numbers: floats would lose the last digits."""
    if value is None:
        return _NULL
    since = value - _PG_EPOCH
    return _TIME(8, (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds)
