"""Vectors of a batch encoded at once: byte for byte what one by one gives, and the same refusals."""

import numpy as np
import pytest

from db import vectors
from db.batch_codec import BatchCodec, vectors_of
from db.embedding_model import Model
from db.errors import DimensionError, ValidationError
from db.types import Document, DocumentChunk

DIMENSIONS = 3


class StoreModel:
    """What a codec asks of a store's model, and how often it was asked for a vector by itself."""

    def __init__(self, distance="cosine", *, registered=True):
        self.registered = Model("m", DIMENSIONS, distance) if registered else None
        self.model_id = "m"
        self.asked = 0

    def encode(self, value):
        self.asked += 1
        vector = vectors.as_vector(value)
        if self.registered is not None:
            self.registered.check(vector)
        return vectors.encode(vector)


def rows(count):
    return list(np.random.default_rng(7).standard_normal((count, DIMENSIONS)).astype(np.float32))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_each_vector_is_encoded_as_by_itself(count):
    model, given = StoreModel(), rows(count)
    codec = BatchCodec(model, given)
    assert [codec.encode(value) for value in given] == [vectors.encode(value) for value in given]
    assert model.asked == 0


@pytest.mark.parametrize(
    ("distance", "value", "error"),
    [
        ("cosine", np.zeros(3, np.float32), ValidationError),
        ("cosine", np.array([1, np.nan, 1], np.float32), ValidationError),
        ("l2", np.array([1, np.inf, 1], np.float32), ValidationError),
        ("l2", np.array([1, -70_000, 1], np.float32), ValidationError),
        ("inner_product", np.array([1, 70_000, 1], np.float32), ValidationError),
        ("cosine", np.ones(4, np.float32), DimensionError),
        ("cosine", np.ones((3, 1), np.float32), ValidationError),
        ("cosine", "abc", ValidationError),
    ],
)
def test_one_that_does_not_fit_is_refused_and_its_neighbours_are_not(distance, value, error):
    given = [*rows(2), value, *rows(2)]
    codec = BatchCodec(StoreModel(distance), given)
    with pytest.raises(error):
        codec.encode(value)
    assert [codec.encode(v) for v in given if v is not value] == [vectors.encode(v) for v in given if v is not value]


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_large_and_tiny_components_are_taken_where_one_by_one_they_are(distance):
    given = [np.array([1e-30, 0, 0], np.float32), np.array([60_000, 1, -60_000], np.float32)]
    codec = BatchCodec(model := StoreModel(distance), given)
    assert [codec.encode(value) for value in given] == [vectors.encode(value) for value in given]
    assert model.asked == 0


def test_other_kinds_of_numbers_are_left_to_the_model():
    given = [[1, 2, 3], np.array([1, 2, 3], np.float64), np.array([1, 2, 3], ">f4"), np.arange(3)]
    codec = BatchCodec(model := StoreModel(), given)
    assert len({codec.encode(value) for value in given[:3]}) == 1
    assert model.asked == 3


def test_strided_rows_are_read_where_they_are():
    matrix = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    given = list(matrix.T)
    codec = BatchCodec(StoreModel(), given)
    assert [vectors.decode(codec.encode(value)).tolist() for value in given] == matrix.T.tolist()


def test_before_a_model_is_registered_each_vector_goes_to_it():
    codec = BatchCodec(model := StoreModel(registered=False), given := rows(2))
    assert [codec.encode(value) for value in given] == [vectors.encode(value) for value in given]
    assert model.asked == 2


def test_a_vector_that_was_not_announced_never_gets_anothers_bytes():
    """Objects that are gone must not lend their identity to new ones."""
    codec = BatchCodec(StoreModel(), (row.copy() for row in rows(50)))
    for value in rows(50):
        assert codec.encode(fresh := value + 1) == vectors.encode(fresh)


def test_the_vectors_of_documents_and_chunks_in_whatever_form():
    a, b, c, d = rows(4)
    batch = [
        Document("1", "t", embedding=a, chunks=[DocumentChunk("x", b), {"text": "y", "embedding": c}]),
        {"id": "2", "text": "t", "embedding": d, "chunks": None},
        {"id": "3"},
        None,
        "nothing",
        {"chunks": [None, 3]},
        {"chunks": 3},
    ]
    found = [value for value in vectors_of(batch) if value is not None]
    assert [id(value) for value in found] == [id(value) for value in (a, b, c, d)]
