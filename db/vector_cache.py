"""Vectors that an embedder once returned, kept so that no text is embedded twice by one model."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg import Connection
from psycopg import errors as pg

from . import vectors
from .staging import copy_vectors

# `last_used` is kept to the day: reading a vector writes at most once a day.
_LOOK_UP = """
    SELECT key, vector_send(embedding), last_used < now() - interval '1 day'
    FROM vector_cache
    WHERE key = ANY(%s) AND model_id = %s AND vector_dims(embedding) = %s
"""
_TOUCH = """
    UPDATE vector_cache SET last_used = now()
    WHERE key IN (SELECT key FROM vector_cache WHERE key = ANY(%s) ORDER BY key FOR UPDATE SKIP LOCKED)
"""
_FILL = """
    INSERT INTO vector_cache (key, model_id, embedding)
    SELECT key, %s, embedding FROM vectorkeep_vectors ORDER BY key
    ON CONFLICT (key) DO UPDATE
    SET model_id = EXCLUDED.model_id, embedding = EXCLUDED.embedding, last_used = EXCLUDED.last_used
"""
# Least recently used first. The size is that of the rows; the table's own shrinks with the next VACUUM.
_RETIRE = """
    WITH ranked AS (
        SELECT key, sum(bytes) OVER (ORDER BY last_used DESC, key) AS bytes
        FROM (SELECT key, last_used, pg_column_size(embedding) + 100 AS bytes FROM vector_cache OFFSET 0) AS sizes)
    DELETE FROM vector_cache USING ranked
    WHERE vector_cache.key = ranked.key AND ranked.bytes > %s
"""
# A reader's search of a text, or one on a standby, does without keeping the vector.
_MAY_NOT_WRITE = (pg.InsufficientPrivilege, pg.ReadOnlySqlTransaction)


def cache_key(text: str, model_id: str) -> bytes:
    """sha256(text ‖ model_id). A NUL, which no text has, keeps the two apart."""
    return sha256(text.encode() + b"\0" + model_id.encode()).digest()


def look_up(
    connection: Connection[Any], texts: Iterable[str], model_id: str, dimensions: int
) -> dict[str, NDArray[np.float32]]:
    """The vectors known for `texts`; none where the role may not see them.

    One of another model or of wrong dimensions is never returned.
    """
    keys = {cache_key(text, model_id): text for text in texts}
    try:
        rows = connection.execute(_LOOK_UP, (list(keys), model_id, dimensions)).fetchall()
    except pg.InsufficientPrivilege:  # a tenant: what others have embedded is not for it to know
        return {}
    if old := [key for key, _, is_old in rows if is_old]:
        with suppress(*_MAY_NOT_WRITE):
            connection.execute(_TOUCH, (old,))
    return {keys[key]: vectors.decode(data) for key, data, _ in rows}


def fill(connection: Connection[Any], found: Mapping[str, NDArray[np.float32]], model_id: str) -> None:
    """Keep the vectors of `found`, by text, in a transaction of its own; not where the role only reads."""
    rows = [(cache_key(text, model_id), vectors.encode(vector)) for text, vector in found.items()]
    with suppress(*_MAY_NOT_WRITE), connection.transaction(), connection.cursor() as cursor:
        copy_vectors(cursor, rows)
        cursor.execute(_FILL, (model_id,))


def retire(connection: Connection[Any], limit_mb: float) -> int:
    """Remove the least recently used entries beyond `limit_mb`. Returns how many."""
    return connection.execute(_RETIRE, (int(limit_mb * 1024**2),)).rowcount
