"""From texts to vectors: each item is chunked, each distinct chunk looked up or embedded once."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import vector_cache, vectors
from .chunking import Chunker, TextChunk
from .documents import HashedItem, PreparedDocument, VectorCodec, prepare_item, text_hash
from .embedder import checked
from .engine import Database
from .transactions import retried
from .types import DocumentChunk, Embedder

_TEXTS_AT_ONCE = 1024

# What the vector cache has retired is often still in the documents that are written again.
_STORED_CHUNKS = """
    SELECT chunks.text_hash, vector_send(chunks.embedding)
    FROM chunks JOIN embeddings AS document ON document.id = chunks.document_id
    WHERE chunks.document_id = ANY(%s) AND chunks.text_hash = ANY(%s)
      AND document.model_id = %s AND vector_dims(chunks.embedding) = %s
"""


@dataclass(frozen=True, slots=True)
class EmbeddedItem:
    """An item's chunks and their vectors, in order."""

    chunks: list[TextChunk]
    vectors: list[NDArray[np.float32]]


@dataclass
class TextEmbedder:
    """An embedder behind the store's vector cache. Counts what it was asked, and the texts that it was spared."""

    database: Database
    embedder: Embedder
    chunker: Chunker
    cache_hits: int = 0
    embedded: int = 0
    model_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.model_id = self.embedder.model_id

    def embed_items(self, items: Sequence[HashedItem], stored: Collection[str] = ()) -> dict[str, EmbeddedItem]:
        """The chunks and vectors of `items`, by id. Of the documents `stored`, chunks that stay keep their vectors."""
        chunked = {item.id: self.chunker.split(item.text) for item in items}
        known = self.embed_texts(list({c.text for chunks in chunked.values() for c in chunks}), stored)
        return {id_: EmbeddedItem(chunks, [known[chunk.text] for chunk in chunks]) for id_, chunks in chunked.items()}

    def embed_texts(self, texts: Sequence[str], stored: Collection[str] = ()) -> dict[str, NDArray[np.float32]]:
        """The vectors of distinct `texts`, by text: from the cache, from chunks of the documents `stored`, else fresh.

        No transaction is open while the embedder runs.
        """
        found: dict[str, NDArray[np.float32]] = {}
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[start : start + _TEXTS_AT_ONCE]
            spared = retried(lambda part=part: self._look_up(part, stored))  # type: ignore[misc]
            missing = [text for text in part if text not in spared]
            fresh = dict(zip(missing, checked(self.embedder, missing), strict=True)) if missing else {}
            if fresh:
                retried(lambda fresh=fresh: self._fill(fresh))  # type: ignore[misc]
            self.cache_hits += len(spared)
            self.embedded += len(fresh)
            found |= spared | fresh
        return found

    def _look_up(self, texts: Sequence[str], stored: Collection[str]) -> dict[str, NDArray[np.float32]]:
        with self.database.connection() as connection:
            cached = vector_cache.look_up(connection, texts, self.model_id, self.embedder.dimensions)
            missing = {text_hash(text): text for text in texts if text not in cached} if stored else {}
            if not missing:
                return cached
            parameters = (list(stored), list(missing), self.model_id, self.embedder.dimensions)
            rows = connection.execute(_STORED_CHUNKS, parameters)
            return cached | {missing[digest]: vectors.decode(data) for digest, data in rows}

    def _fill(self, fresh: dict[str, NDArray[np.float32]]) -> None:
        with self.database.connection() as connection:
            vector_cache.fill(connection, fresh, self.model_id)


def document_of(item: HashedItem, embedded: EmbeddedItem | None, model: VectorCodec) -> PreparedDocument:
    """The document to store for `item`; without vectors, one whose stored vectors and chunks stay.

    Its own vector is the mean of its chunks' vectors, weighted by their length, scaled to length 1.
    Raises ValidationError where a vector does not fit the store.
    """
    if embedded is None:
        return prepare_item(item, None, None, model)
    parts = zip(embedded.chunks, embedded.vectors, strict=True)
    chunks = [DocumentChunk(c.text, v, {"start": c.start, "end": c.end}) for c, v in parts]
    if len(chunks) == 1:
        return prepare_item(item, embedded.vectors[0], chunks, model)
    mean = vectors.weighted_mean(embedded.vectors, [len(c.text) for c in embedded.chunks])
    return prepare_item(item, mean, chunks, model)
