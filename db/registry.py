"""The registry of embedding models, and the vector indexes that a registered model gets.

The active model fixes the dimensions and the distance of a store. It is registered by
`vectorkeep migrate --model` or by the first write of a vector.
"""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import Connection, sql
from psycopg import errors as pg
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex

from . import vectors
from .config import Distance, Settings
from .engine import Database, connect_directly
from .errors import DimensionError, PermissionDeniedError, SchemaError, ValidationError
from .locks import Purpose, advisory_lock
from .models import MAX_INDEXED_DIMENSIONS, Chunk, Embedding, vector_index, vector_index_name

logger = logging.getLogger("vectorkeep")

DEFAULT_MODEL_ID = "default"
INDEXED_TABLES: tuple[Table, ...] = (Embedding.metadata.tables["embeddings"], Chunk.metadata.tables["chunks"])

# A registration that comes with a first write must not wait long behind a stranger's open transaction.
_INDEX_LOCK_TIMEOUT_MS = 5000
_REGISTRY_WAIT_S = 60.0

_ACTIVE = "SELECT model_id, dimensions, distance FROM embedding_models WHERE active"
_REGISTER = """
    INSERT INTO embedding_models (model_id, dimensions, distance, active)
    SELECT %s, %s, %s, true WHERE NOT EXISTS (SELECT FROM embedding_models WHERE active)
    ON CONFLICT DO NOTHING
"""
_RECORD_BUILD = """
    INSERT INTO index_builds (index_name, table_name, rows, size_bytes, duration_ms)
    SELECT %(index)s, %(table)s, greatest(reltuples, 0), pg_relation_size(oid), %(duration_ms)s
    FROM pg_class WHERE oid = to_regclass(%(index)s)
"""
_IS_VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)"


@dataclass(frozen=True, slots=True)
class Model:
    """A registered embedding model."""

    model_id: str
    dimensions: int
    distance: Distance

    @property
    def indexed(self) -> bool:
        """Whether vectors of this many dimensions can be indexed at all."""
        return self.dimensions <= MAX_INDEXED_DIMENSIONS

    def check(self, vector: NDArray[np.float32]) -> None:
        """Raise DimensionError or ValidationError where `vector` does not fit this model."""
        vectors.check_dimensions(vector, self.dimensions)
        vectors.check_fits(vector, self.distance, indexed=self.indexed)

    def check_query(self, vector: NDArray[np.float32]) -> None:
        """Raise DimensionError or ValidationError where nothing can be near `vector` under this model."""
        vectors.check_dimensions(vector, self.dimensions)
        vectors.check_fits(vector, self.distance, indexed=False)


def active_model(connection: Connection[Any]) -> Model | None:
    row = connection.execute(_ACTIVE).fetchone()
    return Model(*row) if row else None


def register_model(url: str, model_id: str, dimensions: int, distance: Distance) -> None:
    """Make `model_id` the active model of the store at `url`, if it has none, and build its indexes.

    Safe to run again. Raises SchemaError where another model is active.
    """
    settings = Settings(database_url=url)
    with connect_directly(url, settings) as connection:
        _register(connection, Model(model_id, dimensions, distance))


def _register(connection: Connection[Any], model: Model) -> Model:
    """Register `model`, or accept the one that is active where it is equal. Returns the active model."""
    try:
        with advisory_lock(connection, Purpose.REGISTRY, wait_s=_REGISTRY_WAIT_S):
            connection.execute(_REGISTER, (model.model_id, model.dimensions, model.distance))
            active = active_model(connection)
            if active != model:
                raise SchemaError(
                    f"the store's active model is {active}, not {model}; use that model or another database"
                )
            for table in INDEXED_TABLES if model.indexed else ():
                ensure_vector_index(connection, table, model)
    except pg.InsufficientPrivilege as exc:
        raise PermissionDeniedError(
            f"this role may not register the model {model.model_id!r} ({exc.diag.message_primary}); as the "
            f"owner run 'vectorkeep migrate --model {model.model_id} --dimensions {model.dimensions}'"
        ) from exc
    logger.info("model.registered", extra={"model_id": model.model_id, "dimensions": model.dimensions})
    return model


def ensure_vector_index(connection: Connection[Any], table: Table, model: Model) -> bool:
    """Build the vector index of `table` where there is no valid one. False, with a warning, where it may not.

    Online on a table with rows. Without the index searches are exact, and slower.
    """
    name = vector_index_name(table.name)
    row = connection.execute(_IS_VALID, (name,)).fetchone()
    if row and row[0]:
        return True
    started = time.perf_counter()
    try:
        connection.execute(f"SET lock_timeout = {_INDEX_LOCK_TIMEOUT_MS}")
        if row:  # left invalid by an interrupted build
            connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(name)))
        connection.execute(_create_index(connection, table, model).encode())
    except (pg.InsufficientPrivilege, pg.LockNotAvailable) as exc:
        _drop_invalid(connection, name)
        logger.warning("vector_index.not_built", extra={"index": name, "reason": str(exc).strip()})
        return False
    finally:
        connection.execute("RESET lock_timeout")
    duration_ms = (time.perf_counter() - started) * 1000
    connection.execute(_RECORD_BUILD, {"index": name, "table": table.name, "duration_ms": duration_ms})
    return True


def _create_index(connection: Connection[Any], table: Table, model: Model) -> str:
    """CREATE INDEX of the vector index: CONCURRENTLY, but for an empty table, where it is instant."""
    index = vector_index(table, model.dimensions, model.distance)
    query = sql.SQL("SELECT EXISTS (SELECT FROM {})").format(sql.Identifier(table.name))
    row = connection.execute(query).fetchone()
    if row and not row[0]:
        index.dialect_options["postgresql"]["concurrently"] = False
    return str(CreateIndex(index).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]


def _drop_invalid(connection: Connection[Any], name: str) -> None:
    row = connection.execute(_IS_VALID, (name,)).fetchone()
    if row and not row[0]:
        try:
            connection.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(name)))
        except psycopg.Error as exc:
            logger.warning("vector_index.leftover", extra={"index": name, "reason": str(exc).strip()})


class StoreModel:
    """The model of an open store: what it was asked to be, and what is registered."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._registered: Model | None = None

    def load(self) -> None:
        """Read the registry and compare it with what was asked for. Raises SchemaError, DimensionError."""
        with self._database.connection() as connection:
            registered = active_model(connection)
        if registered is not None:
            self._check_wanted(registered)
        self._registered = registered

    @property
    def registered(self) -> Model | None:
        """The active model, or None while no vector was ever stored."""
        return self._registered

    @property
    def model_id(self) -> str:
        if self._registered is not None:
            return self._registered.model_id
        return self._database.settings.model_id or DEFAULT_MODEL_ID

    def register(self, dimensions: int, model_id: str | None = None) -> Model:
        """The active model; where there is none yet, one of `dimensions` is registered first."""
        with self._lock:
            if self._registered is None:
                settings = self._database.settings
                model = Model(model_id or self.model_id, settings.dimensions or dimensions, settings.distance)
                with self._database.maintenance() as connection:
                    registered = active_model(connection) or _register(connection, model)
                self._check_wanted(registered)
                self._registered = registered
            return self._registered

    def encode(self, value: Any) -> bytes:
        """`value` checked against the model, in binary form; the first vector ever registers the model.

        Raises ValidationError.
        """
        vector = vectors.as_vector(value)
        if self._registered is None:
            settings = self._database.settings
            vectors.check_dimensions(vector, settings.dimensions or len(vector))
            vectors.check_fits(vector, settings.distance, indexed=len(vector) <= MAX_INDEXED_DIMENSIONS)
        model = self._registered or self.register(len(vector))
        model.check(vector)
        return vectors.encode(vector)

    def _check_wanted(self, active: Model) -> None:
        wanted = self._database.settings
        if wanted.model_id is not None and wanted.model_id != active.model_id:
            raise SchemaError(
                f"the store's model is {active.model_id!r}, not {wanted.model_id!r}; "
                "vectors of two models cannot be compared: use the store's model, or another database"
            )
        if wanted.dimensions is not None and wanted.dimensions != active.dimensions:
            raise DimensionError(
                f"the store's model {active.model_id!r} has {active.dimensions} dimensions, not {wanted.dimensions}"
            )
        # "cosine" is also the default: alone it does not tell that the caller asked for it.
        if wanted.distance not in ("cosine", active.distance):
            raise ValidationError(
                f"the store's distance is {active.distance}, not {wanted.distance}; "
                "it is fixed when its model is registered"
            )
