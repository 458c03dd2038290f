"""Search filters as SQL: workspace, source and `where`. Keys and values are always bound, never composed.

`where` names top-level keys of the metadata, literally: {"lang": "en", "year": {"$gte": 2020}}. A
comparison holds only between values of one JSON type and never fails on another; `$ne`, `$nin` and
`$not` match rows that lack the key.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from psycopg import sql
from psycopg.types.json import Jsonb

from .documents import check_key
from .errors import ValidationError
from .values import BadJsonError, json_value, shown, utf8_size

_ORDER = {"$gt": sql.SQL(">"), "$gte": sql.SQL(">="), "$lt": sql.SQL("<"), "$lte": sql.SQL("<=")}
_OPAQUE = sql.SQL("coalesce({}, false)")
MAX_DEPTH = 50
MAX_VALUES = 5000  # a statement takes 65,535
_OPERATORS = "$eq $ne $gt $gte $lt $lte $in $nin $exists $and $or $not"


@dataclass(frozen=True, slots=True)
class Filter:
    """What a search is limited to. `where` is None or a mapping that was compiled once without error."""

    workspace: str | None = None
    source_id: str | None = None
    where: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("workspace", "source_id"):
            if getattr(self, name) is not None:
                check_key(name, getattr(self, name))
        if self.where is not None:
            values = len(compile_where(self.where, sql.Identifier("metadata")).values)
            if values > MAX_VALUES:
                raise ValidationError(
                    f"where binds {values} keys and values; expected at most {MAX_VALUES}, "
                    "and $in for many values of one key"
                )

    def columns_sql(self, table: str) -> "Condition":
        """The part that the planner has statistics for: workspace and source."""
        given = {"workspace": self.workspace, "source_id": self.source_id}
        parts = [
            Condition(sql.SQL("{} = {}").format(sql.Identifier(table, column), sql.Placeholder()), (value,))
            for column, value in given.items()
            if value is not None
        ]
        return _joined(parts, " AND ", empty="true")

    def sql(self, table: str, metadata: sql.Composable, *, opaque: bool = False) -> "Condition":
        """The whole filter over `table`; `metadata` is the expression that `where` looks into.

        opaque: hide `where` from the planner, which believes that one row in 200 passes any of them and so
        never chooses a vector index; of a condition that it cannot look into, it believes that half pass.
        """
        parts = [self.columns_sql(table)]
        if self.where:
            where = compile_where(self.where, metadata)
            parts.append(Condition(_OPAQUE.format(where.sql), where.values) if opaque else where)
        return _joined(parts, " AND ", empty="true")

    def canonical(self) -> list[Any]:
        """Equal filters give equal lists: part of a cache key."""
        where = None if self.where is None else orjson.dumps(_plain(self.where), option=orjson.OPT_SORT_KEYS).decode()
        return [self.workspace, self.source_id, where]


@dataclass(frozen=True, slots=True)
class Condition:
    """A boolean SQL expression with the values of its placeholders, in order."""

    sql: sql.Composable
    values: tuple[Any, ...]


def compile_where(where: Any, metadata: sql.Composable, depth: int = 0) -> Condition:
    """The condition of `where`. Raises ValidationError that names the key and what is wrong there."""
    if depth > MAX_DEPTH:
        raise ValidationError(f"where is nested deeper than {MAX_DEPTH} levels; nest it less")
    if not isinstance(where, Mapping):
        raise ValidationError(f"where is {shown(where)}; expected an object such as {{'lang': 'en'}}")
    parts = [_compile_entry(key, value, metadata, depth) for key, value in where.items()]
    return _joined(parts, " AND ", empty="true")


def _compile_entry(key: Any, value: Any, metadata: sql.Composable, depth: int) -> Condition:
    if not isinstance(key, str):
        raise ValidationError(f"where has the key {shown(key)}; expected strings as keys")
    if key in ("$and", "$or"):
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise ValidationError(f"{key} is {shown(value)}; expected a list of at least one filter")
        parts = [compile_where(part, metadata, depth + 1) for part in value]
        return _joined(parts, " AND " if key == "$and" else " OR ", empty="true")
    if key == "$not":
        return _negated(compile_where(value, metadata, depth + 1))
    if key.startswith("$"):
        raise ValidationError(f"unknown operator {shown(key)} in where; expected some of {_OPERATORS}")
    utf8_size("a key of where", key)
    if isinstance(value, Mapping) and any(isinstance(k, str) and k.startswith("$") for k in value):
        parts = [_compile_operator(key, name, operand, metadata) for name, operand in value.items()]
        return _joined(parts, " AND ", empty="true")
    return _equals(key, value, metadata)


def _compile_operator(key: str, name: Any, operand: Any, metadata: sql.Composable) -> Condition:
    if name in _ORDER:
        return _ordered(key, name, operand, metadata)
    compilers: dict[Any, Callable[[str, Any, sql.Composable], Condition]] = {
        "$eq": _equals,
        "$ne": lambda *arguments: _negated(_equals(*arguments)),
        "$in": _is_in,
        "$nin": lambda *arguments: _negated(_is_in(*arguments)),
        "$exists": _exists,
    }
    if name not in compilers:
        raise ValidationError(f"unknown operator {shown(name)} for {shown(key)}; expected some of {_OPERATORS}")
    return compilers[name](key, operand, metadata)


def _equals(key: str, value: Any, metadata: sql.Composable) -> Condition:
    return Condition(sql.SQL("({} -> %s::text) = %s").format(metadata), (key, _bound(key, value)))


def _is_in(key: str, values: Any, metadata: sql.Composable) -> Condition:
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise ValidationError(f"$in or $nin of {shown(key)} is {shown(values)}; expected a list")
    bound = [_bound(key, value) for value in values]
    return Condition(sql.SQL("({} -> %s::text) = ANY (%s::jsonb[])").format(metadata), (key, bound))


def _exists(key: str, value: Any, metadata: sql.Composable) -> Condition:
    if not isinstance(value, bool):
        raise ValidationError(f"$exists of {shown(key)} is {shown(value)}; expected true or false")
    return Condition(sql.SQL("({} ? %s::text) = %s::bool").format(metadata), (key, value))


def _ordered(key: str, name: str, value: Any, metadata: sql.Composable) -> Condition:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValidationError(f"{name} of {shown(key)} is {shown(value)}; expected a number or a string")
    # jsonb orders values of different types too: the guard keeps the comparison within one type.
    if isinstance(value, str):
        utf8_size(f"the value of {shown(key)} in where", value)
        # By code point, as Python does: jsonb's own order of strings is that of the database's locale.
        text = sql.SQL("""(jsonb_typeof({0} -> %s::text) = 'string' AND ({0} ->> %s::text) COLLATE "C" {1} %s::text)""")
        return Condition(text.format(metadata, _ORDER[name]), (key, key, value))
    number = sql.SQL("(jsonb_typeof({0} -> %s::text) = 'number' AND ({0} -> %s::text) {1} %s)")
    return Condition(number.format(metadata, _ORDER[name]), (key, key, _bound(key, value)))


def _negated(condition: Condition) -> Condition:
    """True also where `condition` is NULL, as it is on rows that lack the key."""
    return Condition(sql.SQL("({}) IS NOT TRUE").format(condition.sql), condition.values)


def _joined(parts: Sequence[Condition], operator: str, *, empty: str) -> Condition:
    if not parts:
        return Condition(sql.SQL(empty), ())
    if len(parts) == 1:
        return parts[0]
    joined = sql.SQL(operator).join(part.sql for part in parts)
    return Condition(sql.SQL("({})").format(joined), tuple(v for part in parts for v in part.values))


def _bound(key: str, value: Any) -> Jsonb:
    """`value` as a parameter, written as metadata is. Raises ValidationError where it is not JSON."""
    try:
        return Jsonb(json_value(value), dumps=orjson.dumps)
    except BadJsonError as exc:
        raise ValidationError(f"{shown(key)}{exc.where} in where {exc.reason}") from None


def _plain(where: Any) -> Any:
    """A `where` that was compiled, in the types that orjson writes."""
    if isinstance(where, Mapping):
        return {str.__str__(key): _plain(value) for key, value in where.items()}
    if isinstance(where, Sequence) and not isinstance(where, str):
        return [_plain(value) for value in where]
    return json_value(where)
