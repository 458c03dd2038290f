"""What a rebuild or a rollback would do, found out without a lock and without a write."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Connection

from . import vector_cache
from .config import Settings
from .documents import as_item, text_hash
from .embedding_model import Model
from .errors import translated
from .opening import OpenParts
from .rebuild_plan import RebuildPlan, target_model
from .rebuild_runs import require_previous
from .rollback import Changes, changes_since_swap
from .shadow import TABLES, home_of, size_of
from .shadow_fill import count_kept
from .types import Embedder

_TEXTS_AT_ONCE = 1000

_STORED = """
    SELECT chunks.text_hash FROM chunks JOIN embeddings AS document ON document.id = chunks.document_id
    WHERE chunks.text_hash = ANY (%s) AND document.model_id = %s AND vector_dims(chunks.embedding) = %s
"""
# A document whose chunks all have vectors gets its own from theirs; of others the whole text is counted as one.
_TEXTS_OF_ALL = """
    SELECT count(*) FROM (
        SELECT text FROM chunks WHERE embedding IS NOT NULL
        UNION
        SELECT text FROM embeddings AS document
        WHERE embedding IS NOT NULL
          AND (SELECT bool_and(embedding IS NOT NULL) FROM chunks WHERE document_id = document.id) IS NOT TRUE
    ) AS needed
    WHERE NOT EXISTS (
        SELECT FROM vector_cache
        WHERE key = sha256(convert_to(text, 'UTF8') || '\\x00'::bytea || convert_to(%(model)s, 'UTF8'))
          AND vector_dims(embedding) = %(dimensions)s)
"""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a rebuild would do. texts_to_embed: those that neither the store nor the vector cache has a vector of."""

    documents_copied: int
    chunks_copied: int
    documents_read: int
    texts_to_embed: int
    model_id: str | None
    dimensions: int | None
    bytes_needed: int
    bytes_free: int | None  # None where the server's disk cannot be looked at
    details: list[str]


@dataclass(frozen=True, slots=True)
class RollbackForecast:
    """What a rollback would bring back, and what it would lose."""

    swapped_at: datetime | None
    previous_bytes: int
    model_id: str | None
    lost: Changes
    details: list[str]


def forecast(settings: Settings, plan: RebuildPlan, embedder: Embedder | None) -> Forecast:
    """What `rebuild` would do with these; all items of the sources are read. Raises what it would before it begins."""
    parts = OpenParts(settings.model_copy(update={"model_id": None, "dimensions": None}))
    try:
        with translated(), parts.database.maintenance() as connection:
            home_of(connection)
            model = target_model(parts.model.registered, plan, embedder, settings)
            left_out = sorted(plan.sources)
            copied = {table: count_kept(connection, table, left_out) for table in TABLES}
            read, to_embed = _of_sources(connection, parts, plan, model)
            if plan.new_model and model is not None:
                names = {"model": model.model_id, "dimensions": model.dimensions}
                [(texts,)] = connection.execute(_TEXTS_OF_ALL, names).fetchall()
                to_embed += texts
            embedded = settings.postgres_url() is None
            return Forecast(
                copied["embeddings"],
                copied["chunks"],
                read,
                to_embed,
                model.model_id if model else None,
                model.dimensions if model else None,
                size_of(connection),
                shutil.disk_usage(settings.home).free if embedded else None,
                ["Dry run - no changes made"],
            )
    finally:
        parts.close()


def _of_sources(
    connection: Connection[Any], parts: OpenParts, plan: RebuildPlan, model: Model | None
) -> tuple[int, int]:
    """How many items the sources have, and how many texts of theirs have no vector yet."""
    read = to_embed = 0
    texts: set[str] = set()
    for items in plan.sources.values():
        for given in items():
            read += 1
            texts |= {chunk.text for chunk in parts.chunker.split(as_item(given).text)}
            if len(texts) >= _TEXTS_AT_ONCE:
                to_embed += _without_vector(connection, texts, model, new=plan.new_model)
                texts.clear()
    return read, to_embed + _without_vector(connection, texts, model, new=plan.new_model)


def _without_vector(connection: Connection[Any], texts: Iterable[str], model: Model | None, *, new: bool) -> int:
    if model is None:
        return 0
    missing = set(texts) - set(vector_cache.look_up(connection, texts, model.model_id, model.dimensions))
    if new or not missing:
        return len(missing)
    hashes = {text_hash(text) for text in missing}
    rows = connection.execute(_STORED, (list(hashes), model.model_id, model.dimensions))
    return len(hashes - {bytes(digest) for (digest,) in rows})


def forecast_rollback(settings: Settings) -> RollbackForecast:
    """What `roll_back` would do. Raises BusyError where there is nothing to bring back."""
    parts = OpenParts(settings.model_copy(update={"model_id": None, "dimensions": None}))
    try:
        with translated(), parts.database.maintenance() as connection:
            previous = require_previous(connection)
            return RollbackForecast(
                previous.swapped_at,
                previous.bytes,
                previous.model.model_id if previous.model else None,
                changes_since_swap(connection, previous),
                ["Dry run - no changes made"],
            )
    finally:
        parts.close()
