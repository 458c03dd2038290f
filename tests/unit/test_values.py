from types import MappingProxyType

import numpy as np
import orjson
import pytest

from db.values import BadJsonError, json_value, shown


class Mute:
    def __repr__(self):
        raise OSError("no")


@pytest.mark.parametrize("value", [10**5000, "x" * 10**6, b"x" * 10**6, Mute(), list(range(1000))], ids=type)
def test_any_value_is_shown_on_little_room(value):
    assert len(shown(value)) <= 60


def test_lists_within_lists_are_shown_without_the_stack():
    value = []
    for _ in range(5000):
        value = [value]
    assert shown(value) == "a list that cannot be shown"


@pytest.mark.parametrize(
    ("value", "text"), [(1e15, "1000000000000000.0"), (1e16, "10000000000000000.0"), (-0.0, "-0.0")]
)
def test_floats_are_written_as_the_numbers_that_they_are(value, text):
    assert orjson.dumps(json_value(value)).decode() == text


def test_a_float_beyond_16_digits_is_written_exactly():
    assert (
        orjson.dumps(json_value({"n": [1e23, 2.0**63]})) == b'{"n":[99999999999999991611392.0,9223372036854775808.0]}'
    )


def test_subclasses_of_plain_types_are_plain():
    value = MappingProxyType({np.str_("a"): (np.float64(1.5), np.str_("b"))})
    assert orjson.dumps(json_value(value)) == b'{"a":[1.5,"b"]}'


def test_the_path_to_a_bad_value_is_told():
    with pytest.raises(BadJsonError) as refused:
        json_value({"a": [0, {"b": {1}}]})
    assert refused.value.where == "['a'][1]['b']"
