"""Vectors to pgvector's binary form and back, and which vectors a store refuses."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.errors import DimensionError, ValidationError
from db.vectors import (
    MAX_HALF,
    as_vector,
    check_dimensions,
    check_fits,
    decode,
    encode,
    fitting,
    normalized,
    weighted_mean,
)

float32s = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)


@given(float32s)
def test_what_is_encoded_is_decoded_bit_for_bit(values):
    vector = np.array(values, np.float32)
    assert decode(encode(vector)).tobytes() == vector.tobytes()


def test_the_binary_form_is_pgvectors():
    assert encode(as_vector([1, -2.5])) == struct.pack(">HHff", 2, 0, 1.0, -2.5)


BASE = [1.5, -2.0, 3.25]


@pytest.mark.parametrize(
    "value",
    [
        BASE,
        tuple(BASE),
        np.array(BASE, np.float64),
        np.array(BASE, np.float32),
        np.array(BASE, ">f4"),
        np.array(BASE, ">f8"),
        np.array([0, *BASE], np.float32)[1:],
        np.array([BASE, BASE], np.float32).T[:, 0],
        np.repeat(np.array(BASE, np.float32), 2)[::2],
        np.array(BASE[::-1], np.float32)[::-1],
        np.array(BASE, np.float16),
    ],
    ids=["list", "tuple", "float64", "float32", "big-endian", "big-endian float64", "offset", "column", "strided",
         "reversed", "float16"],
)  # fmt: skip
def test_every_layout_of_the_same_numbers_gives_the_same_bytes(value):
    assert encode(as_vector(value)) == struct.pack(">HHfff", 3, 0, *BASE)


def test_integers_are_numbers():
    assert as_vector([1, 2]).tolist() == as_vector(np.array([1, 2], np.uint8)).tolist() == [1.0, 2.0]


def test_the_callers_array_is_left_as_it_was():
    given_array = np.array(BASE, np.float64)
    as_vector(given_array)[0] = 99
    assert given_array.tolist() == BASE


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], r"shape \(0,\)"),
        (1.0, r"shape \(\)"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([[1], [2, 3]], "expected a flat sequence of numbers"),
        ("abc", "expected one row of numbers"),
        (b"abc", "expected one row of numbers"),
        (["1", "2"], "expected one row of numbers"),
        ([True, False], "type bool; expected one row of numbers"),
        ([1 + 2j], "type complex128; expected one row of numbers"),
        ([1, None], "type object; expected one row of numbers"),
        ([10**400, 1.0], "type object; expected one row of numbers"),
        ({"a": 1}, "expected one row of numbers"),
        ([1, float("nan")], "NaN, infinite or beyond float32"),
        ([float("inf"), 1], "NaN, infinite or beyond float32"),
        ([1e39, 1], "NaN, infinite or beyond float32"),
    ],
)
def test_what_is_no_finite_vector_is_refused(value, reason):
    with pytest.raises(ValidationError, match=reason):
        as_vector(value)


def test_an_array_that_cannot_be_read_is_refused_and_not_a_crash():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("on another device")

    with pytest.raises(ValidationError, match="on another device"):
        as_vector(Broken())


def test_more_dimensions_than_postgresql_holds_are_refused():
    assert len(as_vector(np.ones(16_000))) == 16_000
    with pytest.raises(DimensionError, match="16001 dimensions; PostgreSQL's vector holds at most 16000"):
        as_vector(np.ones(16_001))


def test_wrong_dimensions_are_told_with_both_numbers():
    check_dimensions(as_vector([1, 2]), 2)
    with pytest.raises(DimensionError, match="vector has 2 dimensions, the store expects 3"):
        check_dimensions(as_vector([1, 2]), 3)


def test_a_zero_vector_has_a_place_everywhere_but_under_cosine():
    zero = as_vector([0, 0])
    check_fits(zero, "l2", indexed=True)
    check_fits(zero, "inner_product", indexed=True)
    with pytest.raises(ValidationError, match="all zeros"):
        check_fits(zero, "cosine", indexed=True)


def test_tiny_vectors_keep_their_direction_under_cosine():
    tiny = as_vector([3e-38, 4e-38])
    check_fits(tiny, "cosine", indexed=True)
    assert normalized(tiny) == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("distance", ["l2", "inner_product"])
def test_components_beyond_halfvec_are_refused_where_they_are_indexed_as_they_are(distance):
    check_fits(as_vector([MAX_HALF, -MAX_HALF]), distance, indexed=True)
    check_fits(as_vector([1e6]), distance, indexed=False)
    check_fits(as_vector([1e6]), "cosine", indexed=True)
    for value in (65_505, -65_505):
        with pytest.raises(ValidationError, match="beyond ±65504"):
            check_fits(as_vector([1, value]), distance, indexed=True)


@given(float32s.filter(any))
def test_a_normalized_vector_has_length_one(values):
    vector = np.array(values, np.float32)
    if vector.any():
        assert np.linalg.norm(normalized(vector).astype(np.float64)) == pytest.approx(1, abs=1e-5)


def test_a_mean_leans_to_the_heavier_part():
    mean = weighted_mean([as_vector([1, 0]), as_vector([0, 1])], [3, 1])
    assert mean == pytest.approx(np.array([3, 1]) / np.sqrt(10))


def test_parts_that_cancel_out_are_stood_for_by_the_heaviest_that_has_a_direction():
    assert weighted_mean([as_vector([1, 0]), as_vector([-1, 0])], [1, 1]).tolist() == [1, 0]
    assert weighted_mean([as_vector([1, 0]), as_vector([-1, 0]), as_vector([0, 0])], [1, 1, 9]).tolist() == [1, 0]
    assert weighted_mean([as_vector([0, 0]), as_vector([0, 0])], [1, 2]).tolist() == [0, 0]


def test_small_parts_have_a_mean_as_large_ones_do():
    assert weighted_mean([as_vector([1e-20, 0]), as_vector([0, 1e-20])], [1, 1]) == pytest.approx(np.sqrt([0.5, 0.5]))


class Hostile:
    def __array__(self, *_args, **_kwargs):
        raise KeyError("hostile")


@pytest.mark.parametrize("value", [Hostile(), np.ma.masked_array([1.0, 2.0], [0, 1], dtype=np.float32)])
def test_what_only_looks_like_an_array_is_refused(value):
    with pytest.raises(ValidationError, match=r"Hostile|masked"):
        as_vector(value)


def test_vectors_whose_distances_would_overflow_are_refused():
    long = np.array([3e38, -3e38], np.float32)
    with pytest.raises(ValidationError, match=r"length 4\.2e\+38; expected at most 1e\+18"):
        check_fits(long, "inner_product", indexed=False)
    check_fits(long, "cosine", indexed=False)
    assert fitting(np.stack([long, long / 1e30]), "l2", indexed=False).tolist() == [False, True]
