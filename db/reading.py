"""Reading: a search through the cache, documents by id, stored hashes as a stream."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import sqlalchemy
from psycopg import sql
from sqlalchemy import LargeBinary, func, select

from . import faults, vectors
from .config import Consistency
from .embedding_model import Model
from .engine import LIFE, Database, StoreConnection
from .errors import SchemaError, translated
from .models import Chunk, Embedding
from .query_cache import CacheKey, QueryCache
from .search import Answer, Query, Searcher
from .tally import LOG_EVERY
from .transactions import source_tag, workspace_tag
from .types import Document, DocumentChunk, SearchResult, StoredHash

logger = logging.getLogger("vectorkeep")

_MODEL_IN_LIFE = sql.SQL("""
    SELECT {}, model_id, dimensions, distance FROM (SELECT) AS one LEFT JOIN embedding_models ON active
""").format(LIFE)
_HASHES = """
    SELECT id, source_id, text_hash,
           ARRAY(SELECT chunks.text_hash FROM chunks
                 WHERE chunks.document_id = embeddings.id ORDER BY chunk_index)
    FROM embeddings
    WHERE (%(source_id)s::text IS NULL OR source_id = %(source_id)s)
    ORDER BY id
"""


def search(
    database: Database,
    searcher: Searcher,
    cache: QueryCache | None,
    query: Query,
    model: Model,
    consistency: Consistency,
) -> SearchResult:
    """The answer to `query`, from the cache where one is still true."""
    key = cache_key(query, model)
    if cache is not None and consistency == "bounded":
        cached, slot = cache.look_up_bounded(key)
        if cached is not None:
            return cached
    with database.connection() as connection:
        if cache is None:
            return _answer(database, connection, searcher, query, model).result
        if consistency == "strict":
            cached, slot = cache.look_up_strict(key, connection)
            if cached is not None:
                return cached
        answer = _answer(database, connection, searcher, query, model)
        if answer.life != connection.identity.life:  # restarted behind a pooler, restored, or another role was set
            database.identify(connection)
    if slot is not None and slot.life == answer.life:
        faults.point("cache.computed")
        cache.store(slot, answer.result, answer.snapshot)
        faults.point("cache.stored")
    return answer.result


def _answer(database: Database, connection: StoreConnection, searcher: Searcher, query: Query, model: Model) -> Answer:
    """The answer from the tables. Raises SchemaError where their vectors are of another model or length than `model`.

    A rebuild that moves the store makes new tables, and with them a new life: the model is asked for in that alone.
    """
    while True:
        try:
            answer = searcher.search(connection, query, model, incomplete_will_do=True)
        except psycopg.DataError as exc:
            _require_model(connection, model)
            raise SchemaError(
                f"{exc}: vectors are stored whose length is not the {model.dimensions} of the store's model "
                f"{model.model_id}; 'vectorkeep doctor' tells where, ingest their sources again"
            ) from exc
        if answer.life == database.model_life:
            return answer
        database.model_life = life = _require_model(connection, model)
        if life in (answer.life, None):
            return answer


def _require_model(connection: StoreConnection, model: Model) -> str | None:
    """The life of the store in which `model` is the active one. Raises SchemaError where it is another.

    None in the middle of a restore, where no model is registered: asked again by the next search.
    """
    [(life, *active)] = connection.execute(_MODEL_IN_LIFE).fetchall()
    if active[0] is None:
        return None
    model.require_active(Model(*active))
    return str(life)


def cache_key(query: Query, model: Model) -> CacheKey:
    """Everything that the answer depends on, and the narrowest tag that all of it carries."""
    filters = query.filter
    question = [
        model.model_id,
        model.dimensions,
        model.distance,
        vectors.encode(query.vector).hex(),
        query.k,
        query.level,
        query.ef_search,
        query.exact,
        *filters.canonical(),
    ]
    if filters.source_id is not None:
        return CacheKey(question, source_tag(filters.source_id))
    if filters.workspace is not None:
        return CacheKey(question, workspace_tag(filters.workspace))
    return CacheKey(question, "store")


def get_documents(engine: sqlalchemy.Engine, ids: Sequence[str]) -> list[Document]:
    """The documents of `ids` that exist, in that order, with their chunks."""
    with engine.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ")
        rows = {row.id: row for row in connection.execute(_documents_of(ids))}
        chunks: dict[str, list[DocumentChunk]] = {}
        for row in connection.execute(_chunks_of(list(rows))):
            chunk = DocumentChunk(row.text, _vector(row.vector), row.metadata, row.id, row.chunk_index)
            chunks.setdefault(row.document_id, []).append(chunk)
    return [_document(rows[id_], tuple(chunks.get(id_, ()))) for id_ in ids if id_ in rows]


def _documents_of(ids: Sequence[str]) -> sqlalchemy.Select[Any]:
    table = Embedding.__table__.c
    vector = func.vector_send(table.embedding, type_=LargeBinary).label("vector")
    return select(
        table.id, table.source_id, table.text, table.metadata, table.created_at, table.updated_at, vector
    ).where(table.id == func.any(list(ids)))


def _chunks_of(ids: Sequence[str]) -> sqlalchemy.Select[Any]:
    table = Chunk.__table__.c
    vector = func.vector_send(table.embedding, type_=LargeBinary).label("vector")
    return (
        select(table.id, table.document_id, table.chunk_index, table.text, table.metadata, vector)
        .where(table.document_id == func.any(list(ids)))
        .order_by(table.document_id, table.chunk_index)
    )


def _document(row: Any, chunks: tuple[DocumentChunk, ...]) -> Document:
    return Document(
        id=row.id,
        text=row.text,
        embedding=_vector(row.vector),
        metadata=row.metadata,
        source_id=row.source_id,
        chunks=chunks,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _vector(data: bytes | None) -> Any:
    return None if data is None else vectors.decode(data)


def iter_hashes(database: Database, source_id: str | None, batch_size: int) -> Iterator[StoredHash]:
    """Stored hashes in order of id, through a server-side cursor that holds one batch at a time.

    Its transaction, and so its snapshot, ends with the iteration, or when the iterator is closed.
    """
    with translated(), database.connection() as connection, connection.transaction():
        # The caller may take its time with each batch.
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        with connection.cursor(name="vectorkeep_hashes") as cursor:
            cursor.itersize = batch_size
            cursor.execute(_HASHES, {"source_id": source_id})
            for number, (id_, source, digest, chunk_digests) in enumerate(cursor, 1):
                if number % LOG_EVERY == 0:
                    logger.info("iter_hashes.progress", extra={"rows": number, "source_id": source_id})
                yield StoredHash(id_, source, digest or b"", tuple(chunk_digests))
