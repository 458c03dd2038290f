"""No string reaches a statement, a pattern or a protocol as anything but a value."""

import pytest

import db
from tests.fuzz.conftest import DIMENSIONS, TIMES
from tests.fuzz.injection import STRINGS
from tests.fuzz.plain_where import passes

VECTOR = [1.0] * DIMENSIONS
_TABLES = "SELECT oid::regclass::text, relkind FROM pg_class WHERE relnamespace = 'public'::regnamespace"
# Other roles come and go: they are the whole server's, and other tests'.
_ROLES = "SELECT rolname, rolsuper, rolcreaterole FROM pg_roles WHERE rolname IN (session_user, 'postgres')"
_SETTINGS = "SELECT name, setting FROM pg_settings WHERE source IN ('session', 'database', 'user')"


def rows():
    return [
        {
            "id": value,
            "text": value,
            "source_id": value,
            "metadata": {value: value, "s": value, "workspace": value},
            "embedding": VECTOR,
            "chunks": [{"text": value, "embedding": VECTOR, "metadata": {value: value}}],
        }
        for value in STRINGS
    ]


def contents(beside):
    """All that there is in the database but what a search itself writes."""
    stored = {
        table: beside.execute(f"SELECT md5(string_agg(t::text, '|' ORDER BY id)) FROM {table} AS t").fetchall()
        for table in ("embeddings", "chunks", "(SELECT id, tags FROM write_log)")
    }
    return stored | {query: sorted(beside.execute(query).fetchall()) for query in (_TABLES, _ROLES, _SETTINGS)}


@pytest.fixture
def filled(session_store, beside, report, request):
    """The store with a document of each string; made anew where a test before left something else."""
    if sorted(row.id for row in session_store.iter_hashes()) != sorted(STRINGS):
        store = request.getfixturevalue("store")
        report.rows(store.batch_upsert(rows()), len(STRINGS), 0)
        report.accepted(len(STRINGS))
    read = session_store.get(STRINGS)
    assert [d.id for d in read] == [d.text for d in read] == [d.source_id for d in read] == STRINGS
    assert [d.metadata for d in read] == [row["metadata"] for row in rows()]
    assert [d.chunks[0].metadata for d in read] == [{value: value} for value in STRINGS]
    return session_store


@pytest.fixture
def unchanged(filled, beside):
    """What follows is reading: afterwards all is as it was."""
    before = contents(beside)
    yield filled
    assert contents(beside) == before


def test_workspaces_and_sources_are_values(unchanged, report):
    for value in STRINGS:
        for given in ({"source_id": value}, {"workspace": value}):
            hits = report.tried(lambda given=given: unchanged.search(VECTOR, 10, **given), valid=True)
            assert [hit.id for hit in hits] == [value]
            report.accepted()
    for value in STRINGS[:: max(1, 10 // TIMES)]:
        assert unchanged.get_statistics(workspace=value).documents == 1
        assert [row.id for row in unchanged.iter_hashes(value)] == [value]


@pytest.mark.parametrize("level", ["documents", "chunks"])
def test_keys_and_values_of_where_are_values(unchanged, report, level):
    everything = [(row["id"], row["metadata"]) for row in rows()]
    for n, value in enumerate(STRINGS):
        wheres = [{"s": value}, {value: value}] if level == "documents" else []
        if value.startswith("$"):
            wheres = wheres[:1]
        else:
            kinds = {"$eq": value, "$in": [value, 1], "$exists": True, "$gte": value, "$lte": value}
            wheres += [{value: kinds}, {value: {"$ne": value, "$nin": [value], "$gt": value}}]
        if n % max(1, 40 // TIMES) == 0:  # these pass many rows
            wheres += [{"s": {"$ne": value}}, {"s": {"$gt": value}}, {"$not": {"s": {"$lte": value}}}]
        for where in wheres:
            hits = report.tried(lambda w=where: unchanged.search(VECTOR, 1000, where=w, level=level), valid=True)
            found = sorted(hit.document_id for hit in hits)
            assert found == sorted(id_ for id_, metadata in everything if passes(metadata, where)), where
            report.accepted()


def test_names_that_begin_like_operators_are_refused_as_keys(unchanged, report):
    for value in STRINGS:
        if value.startswith("$"):
            report.tried(lambda v=value: unchanged.search(VECTOR, where={v: 1}), valid=False)
        report.tried(lambda v=value: unchanged.search(VECTOR, where={"s": {"$eq": 1, v + "x": 1}}), valid=False)


def test_what_is_no_text_takes_none(unchanged, report):
    for value in set(STRINGS) - {"documents", "chunks"}:
        for call in (
            lambda v: unchanged.search(VECTOR, level=v),
            lambda v: unchanged.search(VECTOR, v),
            lambda v: unchanged.search(VECTOR, consistency=v),
            lambda v: unchanged.search(VECTOR, ef_search=v),
            lambda v: unchanged.search([v] * DIMENSIONS),
            lambda v: unchanged.cleanup_orphaned(dry_run=True, min_age=v),
            lambda v: unchanged.cleanup_orphaned(batch_size=v),
            lambda v: unchanged.measure_recall(level=v),
            lambda v: unchanged.measure_recall(sample=v),
            lambda v: unchanged.maintain(retention_days=v),
        ):
            report.tried(lambda call=call, value=value: call(value), valid=False)


def test_measure_recall_takes_values(unchanged, report):
    for value in STRINGS[:: max(1, 24 // TIMES)]:
        for filters in ({"workspace": value}, {"where": {"s": value}}, {"where": {"s": value + "!"}}):
            # One row is no question that has an answer beside itself; none at all is said.
            report.counts["tried"] += 1
            try:
                unchanged.measure_recall(sample=2, k=2, **filters)
            except db.ValidationError as exc:
                report.refused(f"{exc}; ")
            else:
                report.accepted()


def test_a_search_for_text_takes_any(unchanged, report):
    for value in STRINGS[::8]:
        assert len(report.tried(lambda v=value: unchanged.search(v, 1), valid=True)) == 1
        report.accepted()


def test_a_deletion_deletes_its_source_alone(filled, beside, report):
    left = set(STRINGS)
    for value in STRINGS[::2]:
        deleted = report.tried(lambda v=value: filled.delete_by_source_id(v, cascade=len(v) % 2 == 0), valid=True)
        assert deleted.deleted == 1
        left.remove(value)
        report.accepted()
    for value in STRINGS[1::4]:
        assert report.tried(lambda v=value: filled.delete([v]), valid=True).deleted == 1
        left.remove(value)
        report.accepted()
    assert {id_ for (id_,) in beside.execute("SELECT id FROM embeddings")} == left
    assert len(left) == len(STRINGS[3::4])
