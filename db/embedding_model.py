"""A registered embedding model: what every vector of a store must fit."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import vectors
from .config import Distance
from .models import MAX_INDEXED_DIMENSIONS


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
