"""JSON of others, read so that none of it is lost without a word: orjson keeps the last of two equal keys, and rounds
integers beyond 64 bits.
"""

import json
import re
from typing import Any, NoReturn

import orjson

# Of an integer that was rounded orjson writes 1e20 or 1e+20, as its version goes.
_EXPONENT = re.compile(rb"[0-9]e\+?[0-9]")


class LossyJsonError(ValueError):
    """JSON that would not be stored as it was written. The message says what to write instead."""


def strict_json(data: bytes) -> Any:
    """`data` as orjson reads it. Raises LossyJsonError, and orjson's own error where it is no JSON."""
    value = orjson.loads(data)
    if _may_lose(data, value):
        _look_closely(data)
    return value


def _may_lose(data: bytes, value: Any) -> bool:
    """Whether it is worth its time to look closely: a key that was dropped took its colon along."""
    try:
        written = orjson.dumps(value)
    except orjson.JSONEncodeError as exc:
        raise LossyJsonError("nested too deep; nest it less than 100 levels") from exc
    escaped = b"\\u003a" in data or b"\\u003A" in data  # a colon that is not counted
    return escaped or data.count(b":") != written.count(b":") or _EXPONENT.search(written) is not None


def _look_closely(data: bytes) -> None:
    try:
        json.loads(data, object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)
    except RecursionError as exc:
        raise LossyJsonError("nested too deep; nest it less than 100 levels") from exc


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise LossyJsonError(f"the key {twice[:60]!r} is there twice in one object; only one of its values can be kept")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise LossyJsonError(f"the integer {digits[:30]} is beyond 64 bits; write it as a string")
    return int(digits)


def _constant(name: str) -> NoReturn:
    raise LossyJsonError(f"{name} is no JSON")
