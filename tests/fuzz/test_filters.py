"""Any `where` is refused with a reason, or passes the rows that a plain reading of it in Python passes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import db
from tests.fuzz.conftest import DIMENSIONS, examples
from tests.fuzz.plain_where import passes
from tests.fuzz.strategies import deep_list, json_like, metadata, texts

VECTOR = [1.0] * DIMENSIONS
KEYS = ["a", "b", "'", "%s", "\\", "😀", "$", "a.b", "{a}", "", "workspace"]
VALUES = [
    None, True, False, 0, 1, 1.0, -1, 2, 0.5, 2**53, 2**53 + 1, float(2**53), 2**63, 2.0**63, 2**64 - 1,
    1e23, -0.0, 5e-324, "", "a", "b", "A", "ä", "😀", "\uffff", "'", "%s", "\\", '"', "1", "true", "null",
    [], [1], [1.0], [True], ["a", None], [[1]], {}, {"a": 1}, {"a": {"b": None}}, {"b": 1.0, "a": [2.0]},
]  # fmt: skip
POPULATION = [{KEYS[n % 10]: VALUES[n % len(VALUES)], KEYS[n % 7 + 3]: VALUES[n * 5 % len(VALUES)]} for n in range(120)]

keys = st.sampled_from(KEYS)
values = st.sampled_from(VALUES)
lists = st.lists(values, max_size=4)
plain_values = values.filter(lambda v: not isinstance(v, dict))
orderable = st.sampled_from([v for v in VALUES if isinstance(v, int | float | str) and not isinstance(v, bool)])
operators = st.fixed_dictionaries(
    {},
    optional={
        "$eq": values, "$ne": values, "$in": lists, "$nin": lists, "$exists": st.booleans(),
        "$gt": orderable, "$gte": orderable, "$lt": orderable, "$lte": orderable,
    },
).filter(bool)  # fmt: skip
entries = st.dictionaries(keys.filter(lambda key: key != "$"), st.one_of(values, operators), max_size=2)
wheres = st.recursive(
    entries,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"$not": inner}),
        st.fixed_dictionaries({"$and": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"$or": st.lists(inner, min_size=1, max_size=3)}),
    ),
    max_leaves=4,
)
operator_names = st.sampled_from(
    ["$eq", "$ne", "$in", "$nin", "$exists", "$gt", "$lte", "$and", "$or", "$not", "$", "$x"]
)
any_where = st.one_of(
    metadata,
    st.dictionaries(st.one_of(texts, operator_names), json_like, max_size=2),
    st.dictionaries(texts, st.dictionaries(operator_names, json_like, max_size=2), max_size=2),
)


def stored(level, number, found):
    metadata = {**found, "n": number}
    row = {"id": f"{number}", "text": "t", "metadata": metadata, "embedding": VECTOR}
    if level == "chunks":  # half of it is the document's
        key = next(iter(found))
        own = {**found, "n": number}
        row["metadata"] = {key: own.pop(key)}
        row["chunks"] = [{"text": "c", "embedding": VECTOR, "metadata": own}]
    return row


@pytest.fixture(params=["documents", "chunks"])
def level(request):
    return request.param


@pytest.fixture
def populated(store, level):
    population = [{k: v for k, v in found.items() if k != "workspace"} for found in POPULATION]
    result = store.batch_upsert([stored(level, n, found) for n, found in enumerate(population)])
    assert result.errors == []
    return store, population


def numbers(hits):
    return sorted(hit.metadata["n"] for hit in hits)


@examples(60)
@given(wheres)
def test_rows_pass_as_they_do_in_python(populated, level, report, where):
    store, population = populated
    expected = [n for n, found in enumerate(population) if passes({**found, "n": n}, where)]
    hits = report.tried(lambda: store.search(VECTOR, 200, where=where, level=level), valid=True)
    assert numbers(hits) == expected
    report.accepted()


@examples(60)
@given(any_where)
def test_any_other_where_is_refused_or_answered(populated, level, report, where):
    store, population = populated
    report.counts["tried"] += 1
    try:
        hits = store.search(VECTOR, 200, where=where, level=level)
    except db.ValidationError as exc:
        report.refused(str(exc))
        return
    assert numbers(hits) == [n for n, found in enumerate(population) if passes({**found, "n": n}, dict(where or {}))]
    report.accepted()


@pytest.mark.parametrize(
    "where",
    [
        {"a": 10**5000},
        {"a": {"$gt": 10**5000}},
        {"a": deep_list(5000)},
        {"a": {"$in": deep_list(60)[0]}, "b" * 2**20: {"$x": 1}},
        {f"key {n}": n for n in range(6000)},
        {"$or": [{"a": {"$gt": n}} for n in range(6000)]},
        {10**5000: 1},
        {("a",): 1},
        {"$and": deep_list(5000)},
        {"a": {10**5000: 1, "$eq": 1}},
        deep_list(5000),
        10**5000,
        "a = 1",
        b"a",
        {"a": {"$in": 10**5000}},
        {"a": {"$exists": deep_list(5000)}},
    ],
    ids=itertools.count(),
)
def test_what_is_too_much_is_refused(store, report, where):
    report.tried(lambda: store.search(VECTOR, where=where), valid=where is None)


def test_many_values_of_one_key_are_accepted(populated, level, report):
    store, _ = populated
    where = {"n": {"$in": list(range(-2000, 2000))}}
    assert len(report.tried(lambda: store.search(VECTOR, 500, where=where, level=level), valid=True)) == len(POPULATION)
    report.accepted()
