"""Filters: a small tenant gets all its rows, every filter means what plain Python means, nothing gets through."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from psycopg.sql import Identifier

import db
from db import search
from db.errors import ValidationError
from db.filters import Filter, compile_where
from tests.fuzz.plain_where import passes

D = 4
QUERY = [1.0, 0.5, 0.25, 0.125]
CROWD = 10_000
TENANT = 20


@pytest.fixture
def crowded(database_url, admin):
    """A store of 10,000 rows that are all nearer to the query than the 20 of a small tenant."""
    with db.connect(database_url, False, model_id="test-model", dimensions=D) as store:
        rng = np.random.default_rng(5)
        near = (np.array(QUERY) + 0.05 * rng.standard_normal((CROWD, D))).astype(np.float32)
        far = (-np.array(QUERY) + 0.05 * rng.standard_normal((TENANT, D))).astype(np.float32)
        rows = [row(f"big{n}", v, "big", n) for n, v in enumerate(near)]
        rows[5000:5000] = [row(f"small{n}", v, "small", n) for n, v in enumerate(far)]
        assert store.batch_upsert(rows, batch_size=5000).inserted == CROWD + TENANT
        admin.execute("ANALYZE embeddings, chunks")
        yield store


def row(id_, vector, tenant, n):
    metadata = {"workspace": tenant, "tenant": tenant, "n": n}
    return {"id": id_, "text": "t", "embedding": vector, "source_id": tenant, "metadata": metadata}


def test_a_small_tenant_gets_all_its_rows(crowded, monkeypatch):
    filters = [
        {"workspace": "small"},
        {"source_id": "small"},
        {"where": {"tenant": "small"}},
        {"where": {"$not": {"tenant": "big"}}},
        {"where": {"tenant": {"$nin": ["big"]}}},
        {"workspace": "small", "source_id": "small", "where": {"n": {"$lt": 100}}},
    ]
    assert not crowded.search(QUERY, 10, workspace="big").exact
    for estimate in ("good", "much too high"):
        if estimate == "much too high":  # the index is scanned, and brings nobody but the crowd
            crowded._parts.searcher._estimates.clear()
            monkeypatch.setattr(search, "_planned_rows", lambda *_: CROWD)
        for filtered in filters:
            result = crowded.search(QUERY, TENANT, **filtered)
            assert {hit.id for hit in result} == {f"small{n}" for n in range(TENANT)}, filtered
            assert result.complete
            assert [hit.distance for hit in result] == sorted(hit.distance for hit in result)
        assert len(crowded.search(QUERY, 15, workspace="small")) == 15
        everything = crowded.search(QUERY, TENANT + 5, workspace="small")
        assert (len(everything), everything.complete, everything.exact) == (TENANT, True, True)
        assert list(crowded.search(QUERY, 10, workspace="nobody")) == []


# -- where few rows of many pass --------------------------------------------------------------------------------

SLOW = """
    CREATE FUNCTION slow(id text) RETURNS bool LANGUAGE plpgsql AS
    'BEGIN IF id LIKE ''small%'' THEN PERFORM pg_sleep(0.1); END IF; RETURN true; END'
"""


@pytest.fixture
def slow_reader(crowded, sql, url_as, until):
    """The URL of a role that takes two seconds to look at the rows that no index scan around the query visits."""
    [(role,)] = sql("SELECT current_database() || '_slow'")
    sql(SLOW)
    sql("ALTER TABLE embeddings ENABLE ROW LEVEL SECURITY")
    sql("CREATE POLICY slowly ON embeddings USING (slow(id))")
    sql(f"CREATE ROLE {role} LOGIN PASSWORD 'slow'")
    sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    yield url_as(role, "slow")
    until(lambda: not sql("SELECT 1 FROM pg_stat_activity WHERE usename = %s", role))
    sql(f"DROP OWNED BY {role}")
    sql(f"DROP ROLE {role}")


def test_where_comparing_all_takes_too_long_the_scan_answers_and_says_that_it_is_incomplete(
    crowded, slow_reader, redis_url, caplog
):
    nearest = [hit.metadata["n"] for hit in crowded.search(QUERY, 3, workspace="big")]
    filtered = {"where": {"n": {"$in": nearest}}}
    with db.connect(slow_reader, redis_url, statement_timeout_s=1) as store:
        for _ in range(2):
            caplog.clear()
            result = store.search(QUERY, 10, **filtered)
            assert [hit.metadata["n"] for hit in result] == nearest
            assert (result.complete, result.exact, result.cached) == (False, False, False)
            assert [r.message for r in caplog.records if r.levelname == "WARNING"] == ["search.incomplete"]
        assert [store.search(QUERY, 10).cached for _ in range(2)] == [False, True], "what is complete is kept"
        with pytest.raises(db.UnavailableError, match="statement_timeout_s"):
            store.search(QUERY, 10, exact=True, **filtered)
        with pytest.raises(db.UnavailableError, match="statement_timeout_s"):
            store.search(QUERY, 10, where={"tenant": "nobody"})


MANY = """
    INSERT INTO embeddings (id, text, embedding, model_id, metadata)
    SELECT 'd' || n, 't', ARRAY[1, n, 0, 0]::vector, 'test-model',
           jsonb_build_object('lang', CASE WHEN n %% 2500 = 0 THEN 'is' ELSE 'en' END, 'year', n)
    FROM generate_series(1, 50000) AS n
"""


@pytest.mark.every_server
def test_an_index_on_the_key_serves_the_comparison_of_all_that_pass(database_url, sql):
    """The spelling is that of docs/operations.md."""
    guide = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    [statement] = re.findall(r"CREATE INDEX CONCURRENTLY \S+ ON embeddings .*;", guide)
    with db.connect(database_url, False, model_id="test-model", dimensions=D) as store:
        store.batch_upsert([row("first", QUERY, "first", 0)])  # registers the model
        sql("DROP INDEX embeddings_vector_idx")  # not what this is about, and slow to fill
        sql(MANY.replace("%%", "%"))
        sql(statement)
        sql(statement.replace("lang", "year"))
        sql("ANALYZE embeddings")
        planned = {}
        for where in ({"lang": "is"}, {"lang": {"$in": ["is", "fo"]}}, {"year": {"$lt": 30}}, {"lang": {"$gt": "f"}}):
            query = search.Query(np.float32(QUERY), 10, "documents", Filter(where=where), 100, True)
            with store.pool.connection() as connection:
                planned[str(where)] = bool(
                    {"embeddings_lang_idx", "embeddings_year_idx"}
                    & store._parts.searcher.indexes_planned(connection, query, store.model)
                )
        assert list(planned.values()) == [True, True, True, False], planned
        assert len(store.search(QUERY, 50, where={"lang": "is"})) == 20


# -- where, against plain Python -------------------------------------------------------------------------------

KEYS = ["a", "b", "a.b", "", " ", "A", "ä", "'", '"', "%s", "{}", "\\", "a'b\"c", "$.a", "🦊", "null", "0"]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**53, -(2**63), 2**63 - 1, 1.5, -0.0, 0.1, 1e300, 3.0]),
    st.sampled_from(["", "a", "A", "b", "é", "z", "🦊", "1", "true", "null", "'", "%s", "\\", "a\nb"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS[:6]), inner, max_size=2),
    max_leaves=3,
)
metadatas = st.dictionaries(st.sampled_from(KEYS), values, max_size=4)
plain = values.filter(lambda v: not (isinstance(v, dict) and any(k.startswith("$") for k in v)))
ordered = st.one_of(scalars.filter(lambda v: isinstance(v, int | float | str) and not isinstance(v, bool)))
comparisons = st.one_of(
    plain,
    st.fixed_dictionaries({}, optional={"$gt": ordered, "$gte": ordered, "$lt": ordered, "$lte": ordered}),
    st.fixed_dictionaries({}, optional={"$eq": values, "$ne": values, "$exists": st.booleans()}),
    st.fixed_dictionaries({}, optional={"$in": st.lists(values, max_size=3), "$nin": st.lists(values, max_size=3)}),
)
wheres = st.recursive(
    st.dictionaries(st.sampled_from([k for k in KEYS if not k.startswith("$")]), comparisons, max_size=2),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"$and": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"$or": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"$not": inner}),
    ),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(metadatas, min_size=1, max_size=12), filters=st.lists(wheres, min_size=1, max_size=10))
def test_where_means_what_plain_python_means(store, rows, filters):
    vector = [1.0] * 8
    store.delete_by_source_id("property")
    documents = [
        {
            "id": f"p{n}",
            "text": "t",
            "source_id": "property",
            "embedding": vector,
            "metadata": metadata,
            "chunks": [{"text": "c", "embedding": vector}],
        }
        for n, metadata in enumerate(rows)
    ]
    result = store.batch_upsert(documents)
    assert result.failed == 0, result.errors
    for where in filters:
        expected = {f"p{n}" for n, metadata in enumerate(rows) if passes(metadata, where)}
        for level in ("documents", "chunks"):
            found = store.search(vector, 50, where=where, source_id="property", level=level)
            assert {hit.document_id for hit in found} == expected, (where, level)


def test_strings_are_ordered_by_code_point_on_every_server(store, sql):
    words = ["B", "Z", "_", "a", "b", "e\u0301", "z", "é", "ß", "🦊"]
    store.batch_upsert(
        [{"id": w, "text": "t", "embedding": [1.0] * 8, "metadata": {"w": w}} for w in [*words, "\uffee"]]
    )
    for bound in words:
        found = store.search([1.0] * 8, 50, where={"w": {"$lte": bound}})
        assert {hit.id for hit in found} == {w for w in [*words, "\uffee"] if w <= bound}
    assert 'COLLATE "C"' in compile_where({"w": {"$lt": "a"}}, Identifier("m")).sql.as_string()


# -- what must not get through -----------------------------------------------------------------------------------

NASTY = [
    "'; DROP TABLE embeddings; --", "' OR '1'='1", "\" OR 1=1", "') OR true --", "a' -> 'b", "{a,b}", "$1", "%s",
    "%(name)s", "%", "%%", "{}", "{0}", "?", "\\", "\\'", "\\x00", "::text", "/*", "*/", "--", ";", "$$", "$tag$",
    "\n", "\r\n", "\t", "\x01", "\x7f", "\u2028", "\ufeff", "ʼ", "＇", "🦊", "é", "e\u0301", "\U0010ffff", " ", "",
    "null", "true", "NaN", "pg_sleep(10)", "'||pg_sleep(10)||'", "COPY x TO PROGRAM 'true'", "a" * 100_000,
    "$.a ? (@ == 1)", "->>", "#>>", "@>", "[", "]", "(", ")", '"', "''", "E'\\''", "U&'\\0027'", "\u0000x", "\ud800",
]  # fmt: skip


def test_no_key_or_value_gets_into_the_statement(store, sql):
    """Each is data: it finds what equals it, or is refused with a reason; never an error of the server's."""
    store.batch_upsert([{"id": "plain", "text": "t", "embedding": [1.0] * 8, "metadata": {"a": 1}}])
    refused = 0
    for nasty in NASTY:
        storable = {"id": "nasty", "text": "t", "embedding": [1.0] * 8, "metadata": {f"k{nasty}": nasty}}
        stored = store.batch_upsert([storable]).failed == 0
        for where in ({f"k{nasty}": nasty}, {f"k{nasty}": {"$in": [nasty]}}, {f"k{nasty}": {"$gte": nasty}}):
            try:
                found = {hit.id for hit in store.search([1.0] * 8, 5, where=where)}
            except ValidationError:
                refused += 1
                assert not stored
            else:
                assert found == {"nasty"}, where
        for filtered in ({"workspace": nasty}, {"source_id": nasty}):
            try:
                assert list(store.search([1.0] * 8, 5, **filtered)) == []
            except ValidationError:
                assert nasty in ("", "a" * 100_000, "\u0000x", "\ud800")
    assert refused == 6
    assert sql("SELECT count(*) FROM embeddings WHERE id = 'plain'") == [(1,)]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(key=st.text(max_size=30), value=st.text(max_size=30) | st.integers() | st.floats(), operator=st.text(max_size=4))
def test_any_text_finds_its_row_or_is_refused(store, key, value, operator):
    assume(operator not in ("$ne", "$nin"))
    metadata = {key: value}
    result = store.batch_upsert([{"id": "x", "text": "t", "embedding": [1.0] * 8, "metadata": metadata}])
    for where in (metadata, {key: {operator: value}}, {operator: value}):
        try:
            found = store.search([1.0] * 8, 5, where=where)
        except ValidationError:
            continue
        if where is metadata and not result.failed:
            assert [hit.id for hit in found] == ["x"]
