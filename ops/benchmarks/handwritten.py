"""The other side: what a competent engineer writes with psycopg and pgvector where there is no library.

Every row gets all the columns of the store's own table, its hashes too, as part of the work: the rows of
both sides are compared and must be equal. `hashed` False leaves the hashes out, which makes rows that no
change detection can use.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import orjson
import psycopg
from pgvector import Vector
from pgvector.psycopg import register_vector
from psycopg import Connection, Cursor, sql
from psycopg import errors as pg
from psycopg.types.json import Jsonb

import db

# As many rows a transaction as `batch_upsert` writes: what is committed is safe, on both sides after as many rows.
BATCH_SIZE = 1000

_TYPES = {
    "id": "text",
    "source_id": "text",
    "workspace": "text",
    "text": "text",
    "text_hash": "bytea",
    "content_hash": "bytea",
    "vector_hash": "bytea",
    "chunks_hash": "bytea",
    "model_id": "text",
    "embedding": "vector",
    "metadata": "jsonb",
    "created_at": "timestamptz",
    "updated_at": "timestamptz",
}
# A row that is there keeps the time of its creation.
_UPDATED = [name for name in _TYPES if name not in ("id", "created_at")]
_COLUMNS = sql.SQL(", ").join(map(sql.Identifier, _TYPES))
_COPY = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)")

_STAGE = "CREATE TEMP TABLE staged (LIKE embeddings) ON COMMIT DROP"
_MERGE = sql.SQL("INSERT INTO embeddings ({}) SELECT {} FROM staged ON CONFLICT (id) DO UPDATE SET {}").format(
    _COLUMNS,
    _COLUMNS,
    sql.SQL(", ").join(sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(name)) for name in _UPDATED),
)

_INDEX = sql.SQL(
    "CREATE INDEX embeddings_vector_idx ON embeddings USING hnsw"
    " ((l2_normalize(embedding)::halfvec({})) halfvec_ip_ops) WITH (m = 16, ef_construction = 64)"
)
_ORPHANS = (
    "DELETE FROM chunks WHERE document_id IS NULL"
    " OR NOT EXISTS (SELECT FROM embeddings WHERE embeddings.id = chunks.document_id)",
    "DELETE FROM embeddings WHERE embedding IS NULL AND NOT EXISTS"
    " (SELECT FROM chunks WHERE chunks.document_id = embeddings.id AND chunks.embedding IS NOT NULL)",
    "VACUUM (ANALYZE) chunks",
    "VACUUM (ANALYZE) embeddings",
)


@dataclass(frozen=True)
class Handwritten:
    """Hand-written SQL over one connection in autocommit, and the model that its rows are said to be of."""

    connection: Connection[Any]
    model_id: str

    def copy(self, documents: Iterable[db.Document], *, hashed: bool = True, batch_size: int = BATCH_SIZE) -> None:
        """Binary COPY straight into the table, `batch_size` rows a transaction."""
        for batch in _batches(documents, batch_size):
            with self.connection.transaction(), self.connection.cursor() as cursor:
                self._copy(cursor, "embeddings", batch, hashed=hashed)

    def upsert(self, documents: Iterable[db.Document], *, hashed: bool = True, batch_size: int = BATCH_SIZE) -> None:
        """Binary COPY into a temporary table, then one INSERT … ON CONFLICT DO UPDATE, `batch_size` rows a time."""
        for batch in _batches(documents, batch_size):
            with self.connection.transaction(), self.connection.cursor() as cursor:
                cursor.execute(_STAGE)
                self._copy(cursor, "staged", batch, hashed=hashed)
                cursor.execute(_MERGE)

    def build_index(self, dimensions: int, memory_mb: int) -> None:
        """CREATE INDEX, in parallel where the server can; in the given memory, or in the server's if that is more."""
        statement = _INDEX.format(sql.SQL(str(int(dimensions))))
        self.connection.execute(
            "SELECT set_config('maintenance_work_mem', greatest(%s, setting::bigint) || 'kB', false)"
            " FROM pg_settings WHERE name = 'maintenance_work_mem'",
            (memory_mb * 1024,),
        )
        try:
            self.connection.execute(statement)
        except pg.DiskFull:  # a container's shared memory is too small for a parallel build
            self.connection.execute("SET max_parallel_maintenance_workers = 0")
            self.connection.execute(statement)
            self.connection.execute("RESET max_parallel_maintenance_workers")
        self.connection.execute("RESET maintenance_work_mem")

    def remove_orphans(self) -> None:
        """Delete orphaned chunks and documents, a statement each, then VACUUM (ANALYZE)."""
        for statement in _ORPHANS:
            self.connection.execute(statement.encode())

    def _copy(self, cursor: Cursor[Any], table: str, documents: Iterable[db.Document], *, hashed: bool) -> None:
        rows = self._hashed_rows(documents) if hashed else self._plain_rows(documents)
        with cursor.copy(_COPY.format(sql.Identifier(table), _COLUMNS)) as copy:
            copy.set_types(list(_TYPES.values()))
            for row in rows:
                copy.write_row(row)

    def _hashed_rows(self, documents: Iterable[db.Document]) -> Iterator[tuple[Any, ...]]:
        now = datetime.now(UTC)
        model = self.model_id.encode() + b"\0"
        for d in documents:
            metadata = orjson.dumps(d.metadata, option=orjson.OPT_SORT_KEYS)
            text_hash = sha256(d.text.encode()).digest()
            content_hash = sha256(b"%b%b\0%b" % (text_hash, d.source_id.encode(), metadata)).digest()
            vector = Vector(np.asarray(d.embedding))
            vector_hash = sha256(model + vector.to_binary()).digest()
            hashes = (text_hash, content_hash, vector_hash, None)
            yield (*_beginning(d), *hashes, self.model_id, vector, Jsonb(metadata, _as_it_is), now, now)

    def _plain_rows(self, documents: Iterable[db.Document]) -> Iterator[tuple[Any, ...]]:
        now = datetime.now(UTC)
        hashes = (None, None, None, None)
        for d in documents:
            yield (*_beginning(d), *hashes, self.model_id, d.embedding, Jsonb(d.metadata, orjson.dumps), now, now)


def connect(url: str) -> Connection[Any]:
    """A connection as hand-written code has it: pgvector's own registration, nothing of the library's."""
    connection = psycopg.connect(url, autocommit=True, application_name="vectorkeep benchmark, by hand")
    register_vector(connection)
    return connection


def _batches(documents: Iterable[db.Document], size: int) -> Iterator[list[db.Document]]:
    waiting = iter(documents)
    while batch := list(islice(waiting, size)):
        yield batch


def _beginning(document: db.Document) -> tuple[Any, ...]:
    return document.id, document.source_id, document.metadata.get("workspace"), document.text


def _as_it_is(encoded: bytes) -> bytes:
    """The metadata was written as JSON once already, for its hash."""
    return encoded
