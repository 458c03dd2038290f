"""Vectors of any kind: float32 of the store's dimensions, finite and with a direction, or refused with the reason."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import db
from tests.fuzz.conftest import DIMENSIONS, examples
from tests.fuzz.strategies import deep_list, deep_object, json_like

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
components = st.one_of(
    finite,
    finite,
    st.floats(-1, 1),
    st.integers(-9, 9),
    st.sampled_from([0, 0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, 1e-40]),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e39, 1e300, 3.4028236e38]),
)
sizes = st.one_of(st.just(DIMENSIONS), st.just(DIMENSIONS), st.just(DIMENSIONS), st.integers(0, 2 * DIMENSIONS))
good_numbers = st.lists(finite, min_size=DIMENSIONS, max_size=DIMENSIONS)
mixed_numbers = sizes.flatmap(lambda size: st.lists(components, min_size=size, max_size=size))
numbers = st.one_of(good_numbers, good_numbers, mixed_numbers)


def array(dtype):
    def made(values):
        with np.errstate(over="ignore", invalid="ignore"):
            return np.array(values, np.float64).astype(dtype)

    return made


FORMS = {
    "list": list,
    "tuple": tuple,
    "float32": array(np.float32),
    "float64": array(np.float64),
    "float16": array(np.float16),
    "longdouble": array(np.longdouble),
    "big-endian float32": array(">f4"),
    "big-endian float64": array(">f8"),
    "every second": lambda values: np.repeat(array(np.float32)(values), 2)[::2],
    "backwards": lambda values: array(np.float32)(values[::-1])[::-1],
    "a column": lambda values: np.array([array(np.float32)(values)] * 3).T[:, 1],
    "read-only": lambda values: np.frombuffer(array(np.float32)(values).tobytes(), np.float32),
    "memory": lambda values: memoryview(array(np.float64)(values)),
}
WRONG_FORMS = {
    "one row of a table": lambda values: np.array([values], np.float64),
    "a scalar": lambda values: np.float32(values[0]) if values else 0.0,
    "strings": lambda values: [str(v) for v in values],
    "booleans": lambda values: np.array(values, np.float64) > 0,
    "complex": lambda values: np.array(values, np.complex128),
    "objects": lambda values: [*values[1:], None],
    "masked": lambda values: np.ma.masked_array(values, mask=True),
    "ragged": lambda values: [values, *values],
    "dates": lambda values: np.array([0] * len(values), "datetime64[s]"),
    "records": lambda values: np.zeros(len(values), [("x", "f4")]),
    "a set": lambda values: set(values),
    "bytes": lambda values: bytes(len(values)),
    "a mapping": lambda values: dict(enumerate(values)),
    "a huge integer": lambda values: [10**5000, *values],
    "a generator": lambda values: (v for v in values),
}


class Hostile:
    """An object that raises what no array raises."""

    def __array__(self, *_args, **_kwargs):
        raise KeyError("hostile")


def as_stored(value):
    """`value` as float32, or None where it must be refused."""
    with np.errstate(over="ignore", invalid="ignore"):
        vector = np.asarray(value).astype(np.float32)
    return vector if vector.shape == (DIMENSIONS,) and np.isfinite(vector).all() and vector.any() else None


def assert_bits(stored, expected):
    assert stored.dtype == np.float32
    assert (stored == expected).all()  # −0.0 and 0.0 are equal


@examples(80)
@given(st.lists(st.tuples(numbers, st.sampled_from(sorted(FORMS))), min_size=1, max_size=6))
def test_vectors_of_any_numeric_form_read_back_as_float32(store, report, given_vectors):
    made = {f"{n}": FORMS[form](values) for n, (values, form) in enumerate(given_vectors)}
    expected = {id_: as_stored(value) for id_, value in made.items()}
    rows = [
        {"id": id_, "text": "t", "embedding": v, "chunks": [{"text": "c", "embedding": v}]} for id_, v in made.items()
    ]
    good = [id_ for id_ in made if expected[id_] is not None]
    result = store.batch_upsert(rows)
    report.rows(result, len(good), len(made) - len(good))
    assert {id_ for id_, _ in result.errors} == made.keys() - set(good)
    for document in store.get(good):
        assert_bits(document.embedding, expected[document.id])
        assert_bits(document.chunks[0].embedding, expected[document.id])
        report.accepted()
    assert store.batch_upsert([row for row in rows if row["id"] in good]).unchanged == len(good)
    store.delete(good)


@examples(40)
@given(numbers, st.sampled_from(sorted(FORMS)))
def test_a_query_of_any_numeric_form_finds_its_row_or_is_refused(store, report, values, form):
    query = FORMS[form](values)
    expected = as_stored(query)
    if expected is not None:
        store.batch_upsert([{"id": "q", "text": "t", "embedding": expected}])
    hits = report.tried(lambda: store.search(query, 1), valid=expected is not None)
    if hits is not None:
        assert [(hit.id, hit.score) for hit in hits] == [("q", pytest.approx(1, abs=1e-5))]
        report.accepted()
    store.delete(["q"])


@examples(30)
@given(good_numbers, st.sampled_from(sorted(WRONG_FORMS)))
def test_what_is_no_row_of_numbers_is_refused(store, report, values, form):
    value = WRONG_FORMS[form](values)
    report.rows(store.batch_upsert([{"id": "w", "text": "t", "embedding": value}]), 0, 1)
    report.tried(lambda: store.search(WRONG_FORMS[form](values)), valid=False)


@examples(25)
@given(json_like.filter(lambda v: v is not None and not isinstance(v, str)))
def test_json_of_any_kind_is_no_vector(store, report, value):
    report.rows(store.batch_upsert([{"id": "w", "text": "t", "embedding": value}]), 0, 1)


@pytest.mark.parametrize(
    "value",
    [
        Hostile(),
        10**5000,
        [10**5000] * 8,
        [1.0, 10**400] * 4,
        deep_list(5000),
        deep_object(5000),
        object(),
        np.ma.masked,
    ],
    ids=itertools.count(),
)
def test_hostile_objects_are_refused(store, report, value):
    report.rows(store.batch_upsert([{"id": "w", "text": "t", "embedding": value}]), 0, 1)
    report.tried(lambda: store.search(value), valid=False)


def test_as_many_dimensions_as_there_may_be(fuzz_databases, report):
    most = 16_000
    vector = np.linspace(-1, 1, most, dtype=np.float32)
    with db.connect(fuzz_databases("wide"), False, maintenance_on_close=False) as store:
        rows = [{"id": "more", "text": "t", "embedding": np.ones(most + 1)}]
        rows += [
            {"id": form, "text": "t", "embedding": FORMS[form](vector)} for form in sorted(FORMS) if form != "float16"
        ]
        rows += [{"id": "less", "text": "t", "embedding": vector[1:]}]
        report.rows(store.batch_upsert(rows), len(rows) - 2, 2)
        report.tried(lambda: store.search(np.ones(most + 1)), valid=False)
        assert len(store.search(vector, 100)) == len(rows) - 2
        for document in store.get([row["id"] for row in rows]):
            assert_bits(document.embedding, vector)
            report.accepted()


@pytest.mark.parametrize("distance", ["l2", "inner_product"])
def test_other_distances_take_zeros_and_tell_what_no_index_holds(fuzz_databases, report, distance):
    with db.connect(fuzz_databases(distance), False, distance=distance, maintenance_on_close=False) as store:
        given_vectors = {"zeros": [0.0] * 4, "most": [65504.0] * 4, "more": [65536.0] * 4, "tiny": [1e-45] * 4}
        rows = [{"id": id_, "text": "t", "embedding": vector} for id_, vector in given_vectors.items()]
        report.rows(store.batch_upsert(rows), 3, 1)
        for document in store.get(list(given_vectors)):
            assert_bits(document.embedding, np.array(given_vectors[document.id], np.float32))
            report.accepted()
        report.tried(lambda: store.search([3.4e38, -3.4e38, 3.4e38, -3.4e38]), valid=False)
        for query in ([0.0] * 4, [4e17, -4e17, 4e17, -4e17], [1e-45] * 4):
            hits = report.tried(lambda query=query: store.search(query, 9), valid=True)
            assert len(hits) == 3
            assert not any(math.isnan(hit.score) for hit in hits), [hit.score for hit in hits]
            report.accepted()
