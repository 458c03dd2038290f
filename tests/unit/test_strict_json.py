import orjson
import pytest

from ops.strict_json import _EXPONENT, LossyJsonError, strict_json


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 1}', "the key 'a' is there twice"),
        (b'{"a" : 1, "\\u0061" : ":"}', "twice"),
        (b'{"a": [{"b": {}, "b": "\\u003a"}]}', "'b' is there twice"),
        (b"[18446744073709551616]", "the integer 18446744073709551616 is beyond 64 bits"),
        (b"[-9223372036854775809]", "beyond 64 bits"),
        (b"9" * 300, "beyond 64 bits"),
        (b"[" * 300 + b"]" * 300, "nested too deep"),
    ],
)
def test_what_would_be_lost_is_refused(data, reason):
    with pytest.raises(LossyJsonError, match=reason):
        strict_json(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a:b": ":", "c": "\\u003A"}',
        b"[18446744073709551615, -9223372036854775808, 1e300, 1E+20]",
        b'"e+"',
        b'[{"a": 1}, {"a": 2}]',
    ],
)
def test_what_is_whole_is_read_as_orjson_reads_it(data):
    assert strict_json(data) == orjson.loads(data)


def test_what_is_no_json_is_told_as_such():
    with pytest.raises(orjson.JSONDecodeError):
        strict_json(b"{")


@pytest.mark.parametrize("written", [b'{"n":1.8446744073709552e19}', b'{"n":1.8446744073709552e+19}', b"[1e20]"])
def test_a_rounded_integer_is_recognized_however_orjson_writes_it(written):
    assert _EXPONENT.search(written)
