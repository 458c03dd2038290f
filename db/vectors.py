"""Vectors between Python and PostgreSQL, in pgvector's binary form.

pgvector's own adapters send and read text on SQLAlchemy connections and need the type's OID, which a
restore changes. Here a vector is bytes that the server casts: parameters as `%s::vector`, results
through `vector_send(column)`. Layout: uint16 dimensions, uint16 zero, then big-endian float32 each.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg import Connection
from psycopg.adapt import Dumper
from psycopg.pq import Format

from .config import Distance
from .errors import DimensionError, ValidationError
from .values import shown

MAX_DIMENSIONS = 16_000
# Beyond it the distance of two vectors, in float32 and squared, may be infinite or NaN.
MAX_LENGTH = 1e18
# The largest finite halfvec. Indexes other than cosine's hold components as they are.
MAX_HALF = 65_504.0


@dataclass(frozen=True, slots=True)
class BinaryVector:
    """A vector as the server reads it."""

    data: bytes


class _BinaryVectorDumper(Dumper):
    format = Format.BINARY
    oid = 0  # the cast in the statement tells the type

    def dump(self, obj: BinaryVector) -> bytes:
        return obj.data


def register(connection: Connection[Any]) -> None:
    """Let `connection` take BinaryVector parameters. Asks the server nothing."""
    connection.adapters.register_dumper(BinaryVector, _BinaryVectorDumper)


def encode(vector: NDArray[np.float32]) -> bytes:
    """`vector`, shape (dimensions,), in pgvector's binary form."""
    return struct.pack(">HH", len(vector), 0) + vector.astype(">f4").tobytes()


def encode_rows(rows: NDArray[np.float32]) -> list[bytes]:
    """Each of the rows, shape (n, dimensions), in pgvector's binary form."""
    dimensions = rows.shape[1]
    head = np.frombuffer(struct.pack(">HH", dimensions, 0), dtype=np.uint8)
    encoded = np.empty((len(rows), 4 + 4 * dimensions), dtype=np.uint8)
    encoded[:, :4] = head
    encoded[:, 4:] = rows.astype(">f4").view(np.uint8)
    return [row.tobytes() for row in encoded]


def decode(data: bytes) -> NDArray[np.float32]:
    """The float32 vector of `data` as `vector_send` gives it."""
    return np.frombuffer(data, dtype=">f4", offset=4).astype(np.float32)


def as_vector(value: Any) -> NDArray[np.float32]:
    """`value` as a float32 vector, shape (dimensions,). Raises ValidationError where it is not one."""
    if type(value) is np.ndarray and value.dtype == np.float32 and _is_plainly_fine(value):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise ValidationError("vector is a masked array, whose masked components have no value; give value.filled(…)")
    try:
        array = np.asarray(value)
    except Exception as exc:  # (tensors of torch and objects of anybody's raise what they like)
        raise ValidationError(f"vector is {shown(value)}; expected a flat sequence of numbers ({exc!s:.100})") from exc
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "fiu":
        raise ValidationError(f"vector has shape {array.shape} and type {array.dtype}; expected one row of numbers")
    if array.size > MAX_DIMENSIONS:
        raise DimensionError(f"vector has {array.size} dimensions; PostgreSQL's vector holds at most 16000")
    with np.errstate(over="ignore"):  # an overflow to infinity is caught below, with the right message
        vector = array.astype(np.float32)
    if not np.isfinite(vector).all():
        raise ValidationError("vector has components that are NaN, infinite or beyond float32; expected finite numbers")
    return vector


def _is_plainly_fine(array: NDArray[np.float32]) -> bool:
    """One pass for nearly every vector: a finite product with itself means finite components."""
    if array.ndim != 1 or not 0 < array.size <= MAX_DIMENSIONS:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(np.dot(array, array))


def check_fits(vector: NDArray[np.float32], distance: Distance, *, indexed: bool) -> None:
    """Raise ValidationError where a store of this distance cannot find `vector` again."""
    if distance == "cosine":
        if not vector.any():
            raise ValidationError("vector is all zeros; cosine distance needs a direction")
    elif indexed and np.abs(vector).max() > MAX_HALF:
        raise ValidationError(
            f"vector has a component beyond ±{MAX_HALF:.0f}, which its halfvec index cannot hold; scale all vectors"
        )
    elif (length := float(np.linalg.norm(vector.astype(np.float64)))) > MAX_LENGTH:
        raise ValidationError(f"vector has the length {length:.2g}; expected at most {MAX_LENGTH:g}: scale all vectors")


def fitting(rows: NDArray[np.float32], distance: Distance, *, indexed: bool) -> NDArray[np.bool_]:
    """Which of the rows, shape (n, dimensions), are finite and pass `check_fits`, shape (n,)."""
    good: NDArray[np.bool_] = np.asarray(np.isfinite(rows).all(axis=1))
    if distance == "cosine":
        good &= rows.any(axis=1)
    elif indexed:
        good &= np.abs(rows).max(axis=1) <= MAX_HALF
    else:
        good &= np.linalg.norm(rows.astype(np.float64), axis=1) <= MAX_LENGTH
    return good


def check_dimensions(vector: NDArray[np.float32], dimensions: int) -> None:
    """Raise DimensionError where `vector` is not of the store's dimensions."""
    if len(vector) != dimensions:
        raise DimensionError(
            f"vector has {len(vector)} dimensions, the store expects {dimensions}; "
            "embed with the store's model, or use another database for another model"
        )


def normalized(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """`vector` scaled to length 1, the norm taken in float64 so that tiny vectors keep their direction."""
    wide = vector.astype(np.float64)
    return (wide / np.linalg.norm(wide)).astype(np.float32)


def weighted_mean(parts: Sequence[NDArray[np.float32]], weights: Sequence[int]) -> NDArray[np.float32]:
    """The mean of vectors of shape (dimensions,), weighted, scaled to length 1.

    Parts that cancel out have no mean direction: the heaviest that has one stands for them. Where none has, it is zero.
    """
    wide = np.stack(parts).astype(np.float64)
    mean = np.average(wide, axis=0, weights=weights)
    norm = np.linalg.norm(mean)
    if norm <= 1e-12 * np.linalg.norm(wide, axis=1).max():
        directed = [n for n, part in enumerate(parts) if part.any()]
        return normalized(parts[max(directed, key=weights.__getitem__)]) if directed else parts[0]
    unit: NDArray[np.float32] = (mean / norm).astype(np.float32)
    return unit
