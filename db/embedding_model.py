"""A registered embedding model: what every vector of a store must fit."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import vectors
from .config import Distance, Settings
from .errors import SchemaError
from .models import MAX_INDEXED_DIMENSIONS


@dataclass(frozen=True, slots=True)
class Model:
    """A registered embedding model. `ef_search` is what searches were tuned to; it makes no other model."""

    model_id: str
    dimensions: int
    distance: Distance
    ef_search: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.model_id!r} ({self.dimensions} dimensions, {self.distance})"

    def require_active(self, active: "Model | None") -> None:
        """Raise SchemaError where the store's model is not this one any more: a rebuild has moved it."""
        if active != self:
            raise SchemaError(
                f"the store's model was {self} when it was opened, and is {active or 'none'} now; "
                "vectors of two models cannot be compared: open the store again"
            )

    def ef_search_of(self, settings: Settings) -> int:
        """What a search uses that asks for nothing: the setting where one was given, else the tuned value."""
        if "ef_search" in settings.model_fields_set or self.ef_search is None:
            return settings.ef_search
        return self.ef_search

    @property
    def indexed(self) -> bool:
        """Whether vectors of this many dimensions can be indexed at all."""
        return self.dimensions <= MAX_INDEXED_DIMENSIONS

    def check(self, vector: NDArray[np.float32]) -> None:
        """Raise DimensionError or ValidationError where `vector` does not fit this model."""
        vectors.check_dimensions(vector, self.dimensions)
        vectors.check_fits(vector, self.distance, indexed=self.indexed)

    def fitting(self, rows: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which of the rows, shape (n, dimensions), are finite and pass `check`, shape (n,)."""
        return vectors.fitting(rows, self.distance, indexed=self.indexed)

    def check_query(self, vector: NDArray[np.float32]) -> None:
        """Raise DimensionError or ValidationError where nothing can be near `vector` under this model."""
        vectors.check_dimensions(vector, self.dimensions)
        vectors.check_fits(vector, self.distance, indexed=False)
