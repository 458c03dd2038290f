"""A few real queries are kept: off the caller's path, bounded, and none where the setting or the role says so."""

import pytest

import db
from db import metrics as metrics_module
from db import query_samples as samples_module
from db.query_samples import QuerySampler
from db.vectors import as_vector

VECTOR = [1.0, *[0.0] * 7]
ROW = {"id": "a", "text": "t", "embedding": VECTOR, "chunks": [{"text": "c", "embedding": VECTOR}]}


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(metrics_module, "_FLUSH_EVERY_S", 0.05)
    monkeypatch.setattr(samples_module, "_FLUSH_EVERY_S", 0.1)


def kept(sql):
    return sql("SELECT model_id, level, embedding::text FROM query_samples ORDER BY id")


def search(store, n=0, **options):
    return store.search([float(n), 1.0, *[0.0] * 6], **options)


@pytest.fixture
def filled(store):
    store.batch_upsert([ROW])
    return store


def test_what_is_searched_for_is_kept_from_the_cache_or_not(filled, sql, until):
    search(filled, 3)
    search(filled, 4, level="chunks")
    until(lambda: len(kept(sql)) == 2)
    assert kept(sql) == [
        ("test-model", "documents", "[3,1,0,0,0,0,0,0]"),
        ("test-model", "chunks", "[4,1,0,0,0,0,0,0]"),
    ]
    assert search(filled, 3).cached
    until(lambda: len(kept(sql)) == 3)


def test_the_newest_of_each_level_are_kept(database_url, sql, until):
    with db.connect(database_url, False, model_id="test-model", dimensions=8, query_samples=5) as store:
        store.batch_upsert([ROW])
        for n in range(12):
            search(store, n)
            until(lambda n=n: f"[{n},1,0,0,0,0,0,0]" in [row[2] for row in kept(sql)])
        search(store, 50, level="chunks")
        until(lambda: [row[1] for row in kept(sql)] == ["documents"] * 5 + ["chunks"])
    assert [row[2][1:3].strip(",") for row in kept(sql)[:5]] == ["7", "8", "9", "10", "11"]


def test_at_most_a_few_are_written_at_once_and_any_may_be_among_them(store, sql):
    seen = set()
    for _ in range(30):
        sampler = QuerySampler(store._parts.database)
        for n in range(200):
            sampler.offer("m", "documents", as_vector([float(n), *VECTOR[1:]]))
        sampler.flush()
        rows = [int(row[2].partition(",")[0][1:]) for row in kept(sql)]
        assert len(rows) == samples_module._PER_FLUSH
        seen |= set(rows)
        sql("DELETE FROM query_samples")
    assert min(seen) < 50
    assert max(seen) > 150


def test_they_are_written_no_more_often_than_they_should(store, sql):
    now = [0.0]
    sampler = QuerySampler(store._parts.database, clock=lambda: now[0])
    for written in (1, 1, 3):
        sampler.offer("m", "documents", as_vector(VECTOR))
        sampler.flush()
        assert len(kept(sql)) == written
        now[0] += 0.06


def test_with_the_setting_at_0_none_is_kept(database_url, sql):
    with db.connect(database_url, False, model_id="test-model", dimensions=8, query_samples=0) as store:
        store.batch_upsert([ROW])
        search(store)
    assert kept(sql) == []


def test_a_short_process_leaves_its_query_when_it_closes(database_url, sql, monkeypatch):
    monkeypatch.setattr(metrics_module, "_FLUSH_EVERY_S", 3600)
    monkeypatch.setattr(samples_module, "_FLUSH_EVERY_S", 3600)
    with db.connect(database_url, False, model_id="test-model", dimensions=8) as store:
        store.batch_upsert([ROW])
        search(store)
        assert kept(sql) == []
    assert len(kept(sql)) == 1


def test_a_locked_table_slows_no_search(filled, sql, admin, until):
    with admin.transaction():
        admin.execute("LOCK query_samples")
        for n in range(20):
            search(filled, n)
        until(lambda: not filled._parts.query_sampler._waiting)
    search(filled, 77)
    until(lambda: "[77,1,0,0,0,0,0,0]" in [row[2] for row in kept(sql)])


def test_a_role_that_may_not_write_leaves_none_and_is_not_told(filled, sql, url_as, until, caplog):
    [(role,)] = sql("SELECT current_database() || '_reader'")
    sql(f"CREATE ROLE {role} LOGIN PASSWORD 'reader'")
    sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    sql(f"GRANT INSERT ON performance_metrics TO {role}")
    try:
        with db.connect(url_as(role, "reader"), False) as reader:
            assert search(reader)[0].id == "a"
            until(lambda: not reader._parts.query_sampler._kept_per_level)
            assert search(reader)[0].id == "a"
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []
        assert kept(sql) == []
    finally:
        until(lambda: not sql("SELECT 1 FROM pg_stat_activity WHERE usename = %s", role))
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")


def test_cached_answers_of_one_ef_search_are_not_those_of_another(filled, sql, until):
    assert not search(filled).cached
    assert search(filled).cached
    sql("UPDATE embedding_models SET ef_search = 55")
    filled._parts.model.refresh_tuning()
    assert not search(filled).cached
    assert search(filled, ef_search=100).cached
