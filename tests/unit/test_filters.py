from types import MappingProxyType

import pytest
from psycopg import sql

from db.errors import ValidationError
from db.filters import Filter, compile_where

METADATA = sql.Identifier("metadata")
NASTY = "'; DROP TABLE embeddings; -- %s {} \" \\ $1 🦊"


def compiled(where):
    condition = compile_where(where, METADATA)
    return condition.sql.as_string(), condition.values


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (["lang"], "expected an object"),
        ("lang", "expected an object"),
        ({1: "x"}, "expected strings as keys"),
        ({None: "x"}, "expected strings as keys"),
        ({"$nor": []}, r"unknown operator '\$nor' in where"),
        ({"$eq": 1}, r"unknown operator '\$eq' in where"),
        ({"a": {"$regex": "x"}}, r"unknown operator '\$regex' for 'a'"),
        ({"a": {"$gt": 1, "plain": 2}}, "unknown operator 'plain' for 'a'"),
        ({"a": {"$gt": 1, 2: 3}}, "unknown operator 2 for 'a'"),
        ({"$and": []}, r"\$and is \[\]; expected a list of at least one filter"),
        ({"$or": {"a": 1}}, "expected a list"),
        ({"$or": "ab"}, "expected a list"),
        ({"$or": [1]}, "expected an object"),
        ({"$not": [{"a": 1}]}, "expected an object"),
        ({"a": {"$in": "abc"}}, "expected a list"),
        ({"a": {"$nin": {"b": 1}}}, "expected a list"),
        ({"a": {"$in": 3}}, "expected a list"),
        ({"a": {"$exists": 1}}, "expected true or false"),
        ({"a": {"$gt": None}}, "expected a number or a string"),
        ({"a": {"$lt": True}}, "expected a number or a string"),
        ({"a": {"$gte": [1]}}, "expected a number or a string"),
        ({"a": float("nan")}, "JSON has no such number"),
        ({"a": {"$lt": float("inf")}}, "JSON has no such number"),
        ({"a": [1, {"b": float("-inf")}]}, "JSON has no such number"),
        ({"a": 2**64}, "beyond 64 bits"),
        ({"a": {"$in": [-(2**63) - 1]}}, "beyond 64 bits"),
        ({"a": {1, 2}}, "is a set, which is not JSON"),
        ({"a": b"x"}, "is a bytes, which is not JSON"),
        ({"a": {"b": {3: 4}}}, "has the key 3; expected strings as keys"),
        ({"a\0": 1}, "NUL character"),
        ({"a": "x\0"}, "NUL character"),
        ({"a": {"$gt": "x\0"}}, "NUL character"),
        ({"a\ud800": 1}, "lone surrogate at 1"),
        ({"a": {"b": "\udfff"}}, "lone surrogate"),
        ({"a": {"$lte": "\udfff"}}, "lone surrogate"),
    ],
)
def test_what_no_filter_can_mean_is_refused_with_the_reason(where, reason):
    with pytest.raises(ValidationError, match=reason):
        Filter(where=where)


@pytest.mark.parametrize("name", ["workspace", "source_id"])
@pytest.mark.parametrize("value", ["", 3, "x" * 1025, "a\0", "\ud800"])
def test_workspace_and_source_are_checked_like_stored_ones(name, value):
    with pytest.raises(ValidationError, match=name):
        Filter(**{name: value})


def test_deep_nesting_is_refused_and_never_exhausts_the_stack():
    filters = value = {"a": 1}
    for _ in range(5000):
        filters, value = {"$not": filters}, {"a": value}
    with pytest.raises(ValidationError, match="nested"):
        Filter(where=filters)
    with pytest.raises(ValidationError, match="nested"):
        Filter(where=value)


@pytest.mark.parametrize(
    "where",
    [
        {NASTY: NASTY},
        {NASTY: {"$gt": NASTY}},
        {NASTY: {"$in": [NASTY, 1, None]}},
        {"$or": [{NASTY: {"$ne": NASTY}}, {"$not": {NASTY: {"$exists": True}}}]},
    ],
)
def test_keys_and_values_are_bound_and_never_part_of_the_statement(where):
    statement, values = compiled(where)
    assert "DROP" not in statement
    assert "🦊" not in statement
    assert statement.count("%s") == len(values)
    assert NASTY in values


def test_workspace_and_source_are_bound_too():
    condition = Filter(NASTY, NASTY, {"a": NASTY}).sql("target", METADATA)
    assert "DROP" not in condition.sql.as_string()
    assert condition.values[:2] == (NASTY, NASTY)


def test_an_empty_filter_passes_everything():
    assert Filter().sql("target", METADATA).sql.as_string() == "true"
    assert Filter(where={}).sql("target", METADATA).sql.as_string() == "true"


@pytest.mark.parametrize("operator", ["$ne", "$nin"])
def test_negations_hold_where_the_comparison_is_null(operator):
    statement, _ = compiled({"a": {operator: [1]}})
    assert "IS NOT TRUE" in statement


def test_canonical_forms_are_equal_for_equal_filters_only():
    one = Filter("w", None, {"a": 1, "b": {"$in": ["x", "y"]}})
    same = Filter("w", None, MappingProxyType({"b": {"$in": ("x", "y")}, "a": 1}))
    assert one.canonical() == same.canonical()
    others = [
        Filter("w", None, {"a": True, "b": {"$in": ["x", "y"]}}),
        Filter("w", None, {"a": "1", "b": {"$in": ["x", "y"]}}),
        Filter("w", None, {"a": 1, "b": {"$in": ["y", "x"]}}),
        Filter(None, "w", {"a": 1, "b": {"$in": ["x", "y"]}}),
        Filter("w", "w", {"a": 1, "b": {"$in": ["x", "y"]}}),
        Filter("w"),
    ]
    forms = [str(f.canonical()) for f in [one, *others]]
    assert len(set(forms)) == len(forms)


@pytest.mark.parametrize("values", [range(3), (0, 1, 2), [0, 1, 2]])
def test_any_sequence_serves_as_a_list(values):
    filters = Filter(where={"a": {"$in": values}})
    assert filters.canonical() == Filter(where={"a": {"$in": [0, 1, 2]}}).canonical()
