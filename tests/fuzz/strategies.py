"""What callers may give, good and bad, and what a plain reading of it in Python is."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from hypothesis import strategies as st


def huge():
    """An integer that Python does not write out."""
    return 10**5000


NASTY = [
    "'", '"', "''", '"; --', "%", "%s", "%(id)s", "%%", "\\", "\\'", "\\\\", "\\x00", "\\u0000",
    "\0", "a\0b", "\ud800", "x\udfffy", "\ud83d\ude00", "😀", "👩‍👩‍👧‍👦", "é", "e\u0301", "\u202e",
    "\ufeff", "\ufffe", "\uffff", "\U0010ffff", "\x7f", "\x01", "\n", "\r\n", "\t", " ", "{}",
    "{0}", "$1", "$$", "$eq", "$", "?", "??", "*", "[a-z]", "a:b", ":", "NULL", "null", "true", "1",
    "-0", "NaN", "\\N", "\\.", "{a,b}", '{"a": 1}', "x" * 1024, "x" * 1025, "é" * 512, "é" * 513,
    "😀" * 256,
]  # fmt: skip
anything = st.characters()
texts = st.one_of(
    st.sampled_from(NASTY),
    st.text(anything, max_size=12),
    st.text(st.sampled_from("'\"%\\\0\ud800😀{}$:*?[]\n\r\t a"), max_size=12),
    st.text("abc", min_size=1, max_size=3),
    st.text("abc", min_size=1, max_size=3),
)
no_texts = st.one_of(
    st.none(), st.integers(), st.builds(huge), st.binary(max_size=3), st.floats(), st.lists(st.none(), max_size=1),
    st.just(math.nan), st.builds(lambda: deep_list(5000)),
)  # fmt: skip
mostly_texts = st.one_of(texts, texts, texts, texts, no_texts)

numbers = st.one_of(
    st.integers(),
    st.integers(-(2**64), 2**65),
    st.floats(),
    st.floats(1e15, 1e20),
    st.sampled_from([2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1]),
    st.sampled_from([1e16, 1e23, 2.0**63, 1e308, 5e-324, -0.0]),
    st.builds(huge),
    st.floats(allow_nan=False).map(np.float64),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts, st.sampled_from([b"x", {1}, object, 1j, np.float32(1)]))
json_like = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(texts, inner, max_size=3),
        st.dictionaries(texts, inner, max_size=2).map(MappingProxyType),
        st.dictionaries(st.one_of(texts, texts, st.integers()), inner, max_size=2),
    ),
    max_leaves=6,
)
metadata = st.one_of(
    st.dictionaries(texts, json_like, max_size=3),
    st.dictionaries(texts, json_like, max_size=3),
    st.dictionaries(st.text("abc", max_size=3), st.text("abc") | st.integers(-9, 9) | st.floats(-9, 9), max_size=3),
    st.integers(90, 110).map(lambda depth: deep_object(depth)),
    json_like,
)


def deep_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def deep_object(depth):
    """Objects in objects, `depth` of them inside the outermost."""
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def is_text(value):
    """Whether PostgreSQL can hold `value` as text."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    return not any(0xD800 <= ord(c) <= 0xDFFF for c in value)


def is_key(value):
    return is_text(value) and len(value.encode()) <= 1024


class NotJson(Exception):
    pass


def as_json(value, depth=0):
    """`value` as it should read back. Raises NotJson where it cannot."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return checked(value, value == "" or is_text(value))
    if isinstance(value, int):
        return checked(value, -(2**63) <= value < 2**64)
    if isinstance(value, float):
        return checked(float(value), math.isfinite(value))
    checked(value, depth <= 100 and isinstance(value, Mapping | list | tuple))
    if isinstance(value, list | tuple):
        return [as_json(item, depth + 1) for item in value]
    checked(value, all(isinstance(key, str) for key in value))
    return {as_json(key): as_json(item, depth + 1) for key, item in value.items()}


def checked(value, good):
    if not good:
        raise NotJson(repr(type(value)))
    return value


def is_metadata(value):
    if not isinstance(value, Mapping):
        return False
    try:
        as_json(value)
    except NotJson:
        return False
    return "workspace" not in value or is_key(value["workspace"])


def same(one, other):
    """Equality of JSON: 1, 1.0 and True are three values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
