"""Filling the shadow: rows copied as they are, or with the vectors of another model in the place of theirs.

Rows are copied by the server, all columns of them, also those that somebody added; batch by batch in order of id.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg import Connection
from psycopg.sql import SQL, Composed, Identifier

from . import faults, vectors
from .documents import PreparedChunk, canonical_metadata, chunks_hash, text_hash, vector_hash
from .embedding import TextEmbedder
from .errors import ValidationError
from .registry import StoreModel
from .shadow import columns_of, in_shadow

OnCopied = Callable[[str, int], None]  # (table, rows so far)

_COPIED_AT_ONCE = 5000
_EMBEDDED_AT_ONCE = 500

# Sources that are ingested again are left out, with all that hangs on their documents.
_KEPT = {
    "embeddings": "NOT (source_id = ANY (%(left_out)s))",
    "chunks": """
        NOT EXISTS (SELECT FROM embeddings AS document
                    WHERE document.id = live.document_id AND document.source_id = ANY (%(left_out)s))
        AND (live.document_id IS NOT NULL OR NOT (live.source_id = ANY (%(left_out)s)))
    """,
}
_COUNT = "SELECT count(*) FROM {} AS live WHERE {}"
_COPY = """
    WITH copied AS (
        INSERT INTO {shadow} ({columns}) OVERRIDING SYSTEM VALUE
        SELECT {columns} FROM {live} AS live
        WHERE (%(after)s::text IS NULL OR id > %(after)s) AND {kept} ORDER BY id LIMIT %(limit)s
        RETURNING id)
    SELECT count(*), max(id) FROM copied
"""
_WARM_CACHE = """
    INSERT INTO vector_cache (key, model_id, embedding)
    SELECT DISTINCT ON (key) key, %(model)s, embedding
    FROM (SELECT sha256(convert_to(chunks.text, 'UTF8') || '\\x00'::bytea || convert_to(%(model)s, 'UTF8')) AS key,
                 chunks.embedding
          FROM chunks JOIN embeddings AS document ON document.id = chunks.document_id
          WHERE document.source_id = ANY (%(sources)s) AND document.model_id = %(model)s
            AND chunks.text_hash = sha256(convert_to(chunks.text, 'UTF8'))
            AND vector_dims(chunks.embedding) = %(dimensions)s) AS stored
    ORDER BY key
    ON CONFLICT (key) DO NOTHING
"""


def count_kept(connection: Connection[Any], table: str, left_out: Sequence[str]) -> int:
    """How many live rows are not of the sources `left_out`."""
    statement = SQL(_COUNT).format(Identifier(table), SQL(_KEPT[table]))
    [(count,)] = connection.execute(statement, {"left_out": list(left_out)}).fetchall()
    return int(count)


def count_rows(connection: Connection[Any], schema: str, table: str) -> int:
    """How many rows the table `table` of `schema` has."""
    statement = SQL("SELECT count(*) FROM {}").format(Identifier(schema, table))
    [(count,)] = connection.execute(statement).fetchall()
    return int(count)


def copy_rows(connection: Connection[Any], table: str, left_out: Sequence[str], on_copied: OnCopied) -> int:
    """Copy the live rows that are not of the sources `left_out`. Returns how many."""
    columns = SQL(", ").join(map(Identifier, columns_of(connection, table)))
    statement = SQL(_COPY).format(
        shadow=in_shadow(table), live=Identifier(table), columns=columns, kept=SQL(_KEPT[table])
    )
    return _in_batches(connection, statement, table, left_out, on_copied)


def _in_batches(
    connection: Connection[Any], statement: Composed, table: str, left_out: Sequence[str], on_copied: OnCopied
) -> int:
    copied: int = 0
    after: str | None = None
    while True:
        values = {"after": after, "left_out": list(left_out), "limit": _COPIED_AT_ONCE}
        [(count, after)] = connection.execute(statement, values).fetchall()
        copied += int(count)
        on_copied(table, copied)
        faults.point(f"rebuild.copied_{table}")
        if count < _COPIED_AT_ONCE:
            return copied


def warm_vector_cache(connection: Connection[Any], sources: Sequence[str], model_id: str, dimensions: int) -> None:
    """Give the vector cache what is stored of `sources`: what it has retired would be embedded again."""
    connection.execute(_WARM_CACHE.encode(), {"sources": list(sources), "model": model_id, "dimensions": dimensions})


# -- another model -------------------------------------------------------------------------------------

_DOCUMENTS = """
    SELECT id, text, embedding IS NOT NULL, chunks_hash IS NOT NULL FROM embeddings AS live
    WHERE (%(after)s::text IS NULL OR id > %(after)s) AND {kept} ORDER BY id LIMIT %(limit)s
"""
_CHUNKS_OF = """
    SELECT document_id, id, chunk_index, text, embedding IS NOT NULL, metadata FROM chunks
    WHERE document_id = ANY (%s) ORDER BY document_id, chunk_index
"""
# Detached ones, and those whose document is gone.
_LOOSE_CHUNKS = """
    SELECT id, text, embedding IS NOT NULL FROM chunks AS live
    WHERE NOT EXISTS (SELECT FROM embeddings AS document WHERE document.id = live.document_id)
      AND (%(after)s::text IS NULL OR id > %(after)s) AND {kept} ORDER BY id LIMIT %(limit)s
"""
_CREATE_STAGING = """
    CREATE TEMP TABLE IF NOT EXISTS vectorkeep_revectored (
        id text PRIMARY KEY, vector vector, model_id text, vector_hash bytea, chunks_hash bytea)
"""
_STAGE = "INSERT INTO vectorkeep_revectored VALUES (%s, %s::vector, %s, %s, %s)"
_NEW_VALUES = {
    "embedding": "staged.vector", "model_id": "staged.model_id", "vector_hash": "staged.vector_hash",
    "chunks_hash": "staged.chunks_hash",
}  # fmt: skip
_INSERT = """
    INSERT INTO {shadow} ({columns}) OVERRIDING SYSTEM VALUE
    SELECT {values} FROM {live} AS live JOIN vectorkeep_revectored AS staged USING (id) ORDER BY id
"""


@dataclass(slots=True)
class _Revectored:
    """One row's new values."""

    id: str
    vector: bytes | None
    model_id: str | None = None
    vector_hash: bytes | None = None
    chunks_hash: bytes | None = None

    def values(self) -> tuple[Any, ...]:
        vector = None if self.vector is None else vectors.BinaryVector(self.vector)
        return self.id, vector, self.model_id, self.vector_hash, self.chunks_hash


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A live chunk of a document."""

    id: str
    index: int
    text: str
    has_vector: bool
    metadata: Any


@dataclass
class Revectoring:
    """Live rows into the shadow, their texts embedded by `embedder`; a row without a vector stays without."""

    connection: Connection[Any]
    embedder: TextEmbedder
    model: StoreModel
    left_out: Sequence[str]
    on_copied: OnCopied

    def run(self) -> dict[str, int]:
        """Fill both tables. Returns the rows of each. The embedder's own exceptions pass through."""
        self.connection.execute(_CREATE_STAGING)
        self.copied = {"embeddings": 0, "chunks": 0}
        after: str | None = None
        while documents := self._page(_DOCUMENTS, "embeddings", after):
            after = documents[-1][0]
            self._copy_documents(documents)
        after = None
        while chunks := self._page(_LOOSE_CHUNKS, "chunks", after):
            after = chunks[-1][0]
            known = self._embed([text for _, text, has_vector in chunks if has_vector])
            self._insert("chunks", [_Revectored(i, self._encode(known[t]) if v else None) for i, t, v in chunks])
        return self.copied

    def _page(self, statement: str, table: str, after: str | None) -> list[tuple[Any, ...]]:
        values = {"after": after, "left_out": list(self.left_out), "limit": _EMBEDDED_AT_ONCE}
        return self.connection.execute(SQL(statement).format(kept=SQL(_KEPT[table])), values).fetchall()

    def _copy_documents(self, documents: Sequence[tuple[Any, ...]]) -> None:
        """Copy a page of documents with their chunks; what they need is embedded at once."""
        chunks: dict[str, list[_Chunk]] = {row[0]: [] for row in documents}
        for document_id, *chunk in self.connection.execute(_CHUNKS_OF, (list(chunks),)):
            chunks[document_id].append(_Chunk(*chunk))
        parts = {id_: self._parts(text, chunks[id_]) for id_, text, has_vector, _ in documents if has_vector}
        texts = [text for of_one in parts.values() for text in of_one]
        texts += [chunk.text for of_one in chunks.values() for chunk in of_one if chunk.has_vector]
        known = self._embed(texts)
        rows = []
        for id_, _, _, has_hash in documents:
            row = _Revectored(id_, self._encode(_vector_of(parts[id_], known)) if id_ in parts else None)
            if row.vector is not None:
                row.model_id, row.vector_hash = self.model.model_id, vector_hash(self.model.model_id, row.vector)
            row.chunks_hash = self._chunks_hash(chunks[id_], known) if has_hash else None
            rows.append(row)
        self._insert("embeddings", rows)
        self._insert("chunks", [self._chunk_row(chunk, known) for of_one in chunks.values() for chunk in of_one])

    def _parts(self, text: str, chunks: Sequence[_Chunk]) -> list[str]:
        """The texts whose vectors make up a document's: its chunks where all have one, else its own text, cut."""
        if chunks and all(chunk.has_vector for chunk in chunks):
            return [chunk.text for chunk in chunks]
        return [piece.text for piece in self.embedder.chunker.split(text)]

    def _embed(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        if not all(text.strip() for text in texts):
            raise ValidationError(
                "a row has a vector and an empty text, which the new model cannot embed; give it a text, or remove it"
            )
        return self.embedder.embed_texts(list(dict.fromkeys(texts)))

    def _chunks_hash(self, chunks: Sequence[_Chunk], known: dict[str, NDArray[np.float32]]) -> bytes:
        prepared = []
        for chunk in chunks:
            vector, metadata = self._chunk_row(chunk, known).vector, canonical_metadata(chunk.metadata)
            prepared.append(PreparedChunk(chunk.id, chunk.index, chunk.text, text_hash(chunk.text), vector, metadata))
        return chunks_hash(prepared)

    def _chunk_row(self, chunk: _Chunk, known: dict[str, NDArray[np.float32]]) -> _Revectored:
        return _Revectored(chunk.id, self._encode(known[chunk.text]) if chunk.has_vector else None)

    def _encode(self, vector: NDArray[np.float32]) -> bytes:
        return self.model.encode(vector)

    def _insert(self, table: str, rows: Sequence[_Revectored]) -> None:
        columns = columns_of(self.connection, table)
        values = [SQL(_NEW_VALUES[c]) if c in _NEW_VALUES else Identifier("live", c) for c in columns]
        with self.connection.transaction(), self.connection.cursor() as cursor:
            cursor.execute("TRUNCATE vectorkeep_revectored")
            cursor.executemany(_STAGE, [row.values() for row in rows])
            cursor.execute(
                SQL(_INSERT).format(
                    shadow=in_shadow(table),
                    live=Identifier(table),
                    columns=SQL(", ").join(map(Identifier, columns)),
                    values=SQL(", ").join(values),
                )
            )
        self.copied[table] += len(rows)
        self.on_copied(table, self.copied[table])


def _vector_of(texts: Sequence[str], known: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """A document's vector, as `embed_batch` makes it of those of its chunks."""
    if len(texts) == 1:
        return known[texts[0]]
    return vectors.weighted_mean([known[text] for text in texts], [len(text) for text in texts])


# -- what sources do not tell --------------------------------------------------------------------------

_OWN_COLUMNS = {
    "id", "source_id", "workspace", "text", "text_hash", "content_hash", "vector_hash", "chunks_hash", "model_id",
    "embedding", "metadata", "created_at", "updated_at",
}  # fmt: skip
_CARRY_OVER = """
    UPDATE {shadow} AS renewed SET created_at = live.created_at,
        updated_at = CASE WHEN live.content_hash = renewed.content_hash THEN live.updated_at ELSE renewed.updated_at END
        {others}
    FROM embeddings AS live WHERE live.id = renewed.id AND renewed.source_id = ANY (%s)
"""
_ALWAYS_COUNTED = "SELECT attname FROM pg_attribute WHERE attrelid = 'embeddings'::regclass AND attidentity = 'a'"


def carry_over(connection: Connection[Any], sources: Sequence[str]) -> None:
    """Give documents that came from their sources again the times, and the columns that somebody added, of before."""
    counted = {name for (name,) in connection.execute(_ALWAYS_COUNTED)}
    added = [name for name in columns_of(connection, "embeddings") if name not in _OWN_COLUMNS | counted]
    others = [SQL(", {} = {}").format(Identifier(name), Identifier("live", name)) for name in added]
    statement = SQL(_CARRY_OVER).format(shadow=in_shadow("embeddings"), others=SQL("").join(others))
    connection.execute(statement, (list(sources),))
