"""The registry of embedding models, and the vector indexes that a registered model gets.

The active model fixes the dimensions and the distance of a store. It is registered by
`vectorkeep migrate --model` or by the first write of a vector.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from psycopg import Connection
from psycopg import errors as pg

from . import vectors
from .arguments import check_count
from .config import Distance, Settings
from .documents import check_key
from .embedding_model import Model
from .engine import BACKGROUND_WAIT_S, Database, connect_directly
from .errors import DimensionError, PermissionDeniedError, SchemaError, ValidationError
from .locks import Purpose, advisory_lock, is_held
from .models import MAX_INDEXED_DIMENSIONS
from .vector_index import ensure_vector_indexes

logger = logging.getLogger("vectorkeep")

DEFAULT_MODEL_ID = "default"
_REGISTRY_WAIT_S = 60.0

_ACTIVE = "SELECT model_id, dimensions, distance, ef_search FROM embedding_models WHERE active"
_REGISTER = """
    INSERT INTO embedding_models (model_id, dimensions, distance, active)
    SELECT %s, %s, %s, true WHERE NOT EXISTS (SELECT FROM embedding_models WHERE active)
    ON CONFLICT DO NOTHING
"""
# A stored vector of other dimensions than the model to be. Where there is none all rows are read, once in the life of
# a store; the build of the index, which is next, reads the same vectors and takes many times as long.
_STRANGER = """
    (SELECT 'embeddings', id, vector_dims(embedding) FROM embeddings WHERE vector_dims(embedding) <> %(dimensions)s)
    UNION ALL
    (SELECT 'chunks', id, vector_dims(embedding) FROM chunks WHERE vector_dims(embedding) <> %(dimensions)s)
    LIMIT 1
"""


def active_model(connection: Connection[Any]) -> Model | None:
    row = connection.execute(_ACTIVE).fetchone()
    return Model(*row) if row else None


def register_model(url: str, model_id: str, dimensions: int, distance: Distance) -> None:
    """Make `model_id` the active model of the store at `url`, if it has none, and build its indexes.

    Safe to run again. Raises SchemaError where another model is active, DimensionError where a stored vector has other
    dimensions; nothing is registered then.
    """
    settings = Settings(database_url=url)
    with connect_directly(url, settings) as connection:
        model = _register(connection, Model(model_id, dimensions, distance))
        ensure_vector_indexes(connection, model)


def _register(connection: Connection[Any], model: Model) -> Model:
    """Register `model`, or accept the one that is active where it is equal. Returns the active model.

    Raises SchemaError where another one is active, DimensionError where a stored vector has other dimensions.
    """
    check_key("model_id", model.model_id)
    check_count("dimensions", model.dimensions, vectors.MAX_DIMENSIONS)
    try:
        if active_model(connection) is None:  # before the lock: it may take longer than others wait for that
            _check_stored(connection, model)
        with advisory_lock(connection, Purpose.REGISTRY, wait_s=_REGISTRY_WAIT_S):
            connection.execute(_REGISTER, (model.model_id, model.dimensions, model.distance))
            active = active_model(connection)
            if active != model:
                raise SchemaError(
                    f"the store's active model is {active}, not {model}; use that model or another database"
                )
    except pg.InsufficientPrivilege as exc:
        raise PermissionDeniedError(
            f"this role may not register the model {model.model_id!r} ({exc.diag.message_primary}); as the "
            f"owner run 'vectorkeep migrate --model {model.model_id} --dimensions {model.dimensions}'"
        ) from exc
    logger.info("model.registered", extra={"model_id": model.model_id, "dimensions": model.dimensions})
    return model


def _check_stored(connection: Connection[Any], model: Model) -> None:
    """Raise DimensionError where a vector that was stored without any model registered cannot be of `model`."""
    stranger = connection.execute(_STRANGER, {"dimensions": model.dimensions}).fetchone()
    if stranger is not None:
        table, id_, dimensions = stranger
        raise DimensionError(
            f"{table} holds a vector of {dimensions} dimensions, of {id_!r}, and {model.model_id!r} would have "
            f"{model.dimensions}; register the model that made the stored vectors, or use another database"
        )


class StoreModel:
    """The model of an open store: what it was asked to be, and what is registered."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._deferring = 0
        self._batch_told: Callable[[int], None] | None = None

    @property
    def _registered(self) -> Model | None:
        return self._database.model  # there, because every write and search compares it with what is active

    @_registered.setter
    def _registered(self, model: Model | None) -> None:
        self._database.model = model

    def load(self) -> None:
        """Read the registry and compare it with what was asked for. Raises SchemaError, DimensionError."""
        with self._database.connection() as connection:
            registered = active_model(connection)
        if registered is not None:
            self._check_wanted(registered)
        self._registered = registered

    def refresh_tuning(self) -> None:
        """Read what searches are tuned to: another process may have tuned them since."""
        with self._database.connection(BACKGROUND_WAIT_S) as connection:
            active = active_model(connection)
        with self._lock:
            if active is not None and active == self._registered:
                self._registered = active

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
                    # Who loads builds at the end of the load.
                    if not self._deferring and not is_held(connection, Purpose.BULK_LOAD):
                        ensure_vector_indexes(connection, registered)
                self._registered = registered
            return self._registered

    @contextmanager
    def indexes_deferred(self) -> Iterator[None]:
        """Inside, registering a model builds no indexes: a bulk load does, at its end."""
        with self._lock:
            self._deferring += 1
        try:
            yield
        finally:
            with self._lock:
                self._deferring -= 1

    @contextmanager
    def telling_batches(self, tell: Callable[[int], None]) -> Iterator[None]:
        """Inside, `tell(inputs)` is called after each batch that is written, by any call on the store."""
        self._batch_told = tell
        try:
            yield
        finally:
            self._batch_told = None

    def batch_written(self, inputs: int) -> None:
        """Tell whoever loads that a batch of so many inputs is written."""
        if (tell := self._batch_told) is not None:
            tell(inputs)

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
        if "distance" in wanted.model_fields_set and wanted.distance != active.distance:
            raise ValidationError(
                f"the store's distance is {active.distance}, not {wanted.distance}; "
                "it is fixed when its model is registered"
            )
