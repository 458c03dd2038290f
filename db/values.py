"""What callers give: text that PostgreSQL can hold, JSON that comes back as it was given, and how a bad one is told."""

import math
from collections.abc import Mapping
from typing import Any

import orjson

from .errors import ValidationError

MAX_JSON_DEPTH = 100
_SHOWN = 60
_SHOWN_KEYS = 5
# From here on orjson writes a float as 1e16: the shortest number that rounds to it, and not the number that it is.
_EXPONENT = 1e16


def shown(value: Any) -> str:
    """`value` in a message: at most 60 characters, whatever it is."""
    if isinstance(value, str | bytes):
        value = value[:_SHOWN]  # no copy of a long one is made to show its beginning
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  (a number of 5000 digits, lists in 5000 lists, an object of anybody's)
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def utf8_size(name: str, value: str) -> int:
    """The bytes of `value` in UTF-8. Raises ValidationError where PostgreSQL cannot store it."""
    if "\0" in value:
        raise ValidationError(f"{name} has a NUL character, which PostgreSQL cannot store; remove it")
    if value.isascii():
        return len(value)
    try:
        return len(value.encode())
    except UnicodeEncodeError as exc:
        raise ValidationError(f"{name} has a lone surrogate at {exc.start}; it is not valid text") from exc


class BadJsonError(Exception):
    """A value that JSON or PostgreSQL cannot hold, and the keys that lead to it, innermost first."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path: list[str | int] = []

    @property
    def where(self) -> str:
        """The path as in Python, ['a'][1], its beginning where it is long."""
        begin = "".join(f"[{shown(key)}]" for key in self.path[: -_SHOWN_KEYS - 1 : -1])
        return begin if len(self.path) <= _SHOWN_KEYS else f"{begin}[…]"


def json_value(value: Any, depth: int = 0) -> Any:
    """`value` in the types that orjson writes, so that jsonb gives it back equal.

    orjson alone would let much through changed: NaN becomes null, a date a string, and of a float beyond 1e16 jsonb
    keeps the rounded digits, as if it were that integer. Raises BadJsonError.
    """
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return _float(value)
    if depth > MAX_JSON_DEPTH:
        raise BadJsonError(f"is nested deeper than {MAX_JSON_DEPTH} levels; nest it less, or write it as a string")
    if isinstance(value, Mapping):
        return {_key(key): _inner(key, item, depth) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_inner(index, item, depth) for index, item in enumerate(value)]
    raise BadJsonError(f"is a {type(value).__name__}, which is not JSON-serializable; expected what JSON has")


def _inner(key: str | int, item: Any, depth: int) -> Any:
    try:
        return json_value(item, depth + 1)
    except BadJsonError as exc:
        exc.path.append(key)
        raise


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise BadJsonError(f"has the key {shown(key)}; expected strings as keys")
    return _text(key)


def _text(value: str) -> str:
    try:
        utf8_size("has text that", value)
    except ValidationError as exc:
        raise BadJsonError(str(exc)) from None
    return str.__str__(value)  # orjson takes no subclass of it as a key


def _integer(value: int) -> int:
    if not -(2**63) <= value < 2**64:
        raise BadJsonError("is an integer beyond 64 bits; write it as a string")
    return int(value)


def _float(value: float) -> Any:
    if not math.isfinite(value):
        raise BadJsonError(f"is {float(value)}; JSON has no such number, leave it out or write null")
    value = float(value)  # NumPy's is one, but not to orjson
    return value if abs(value) < _EXPONENT else orjson.Fragment(f"{int(value)}.0")
