"""The bounded cache: no question to the database, and no answer older than the bound."""

import time

import pytest

import db
from db import metrics, query_cache

QUERY = [1.0, 0, 0, 0, 0, 0, 0, 0]


def doc(version, source="a", id_="x"):
    return {"id": id_, "text": "t", "source_id": source, "metadata": {"version": version}, "embedding": QUERY}


def search(store, source="a", **more):
    return store.search(QUERY, 3, source_id=source, consistency="bounded", **more)


def version(result):
    return result[0].metadata["version"]


@pytest.fixture
def soon(monkeypatch):
    """What a writer could not deliver another process does at once, not after some seconds."""
    monkeypatch.setattr(query_cache, "_LEFT_AFTER_S", 0.0)
    monkeypatch.setattr(metrics, "_FLUSH_EVERY_S", 0.1)


@pytest.fixture
def opened(database_url, redis_url):
    """Open stores on this test's servers; all are closed in the end."""
    stores = []

    def connect(redis=redis_url, **settings):
        stores.append(db.connect(database_url, redis, model_id="test-model", dimensions=8, **settings))
        return stores[-1]

    yield connect
    for store in stores:
        store.close()


def test_a_hit_needs_no_database(opened, sql):
    store = opened(consistency="bounded")
    store.batch_upsert([doc(1)])
    store.search(QUERY, 3)
    checkouts = store.pool.get_stats()["requests_num"]
    assert store.search(QUERY, 3).cached
    assert store.pool.get_stats()["requests_num"] == checkouts


def test_a_write_ends_what_depends_on_it_at_once_in_every_store(opened):
    writer, reader = opened(), opened()
    writer.batch_upsert([doc(1), doc(1, "b", "y")])
    search(reader), search(reader, "b")
    assert search(reader).cached
    writer.batch_upsert([doc(2)])
    assert not search(reader).cached
    assert version(search(reader)) == 2
    assert search(reader, "b").cached


def test_an_answer_is_never_older_than_the_bound(opened, monkeypatch):
    """The writer tells nobody, and nobody delivers for it: age alone ends the answer."""
    monkeypatch.setattr(query_cache.QueryCache, "deliver_undelivered", lambda cache: 0)
    writer, reader = opened(False), opened(bounded_ttl_s=2)
    writer.batch_upsert([doc(1)])
    search(reader)
    filled = time.monotonic()
    writer.batch_upsert([doc(2)])
    served = search(reader)
    assert (served.cached, version(served)) == (True, 1)
    while version(served) == 1:
        asked = time.monotonic()
        served = search(reader)
        assert version(served) == 2 or asked - filled < 2.2
    assert not served.cached


def test_the_age_counts_from_before_the_answer_was_computed(opened, monkeypatch):
    store = opened(bounded_ttl_s=2)
    store.batch_upsert([doc(1)])
    write = query_cache.QueryCache.store

    def late(cache, *given):
        time.sleep(2.1)
        write(cache, *given)

    with monkeypatch.context() as patched:
        patched.setattr(query_cache.QueryCache, "store", late)
        assert not search(store).cached
    assert not search(store).cached
    assert search(store).cached


def test_the_age_does_not_go_by_the_expiry(opened, monkeypatch):
    """An answer that is renewed where another has just been stored takes over the time which that one has left."""
    monkeypatch.setattr(query_cache.QueryCache, "deliver_undelivered", lambda cache: 0)
    writer, reader = opened(False), opened(bounded_ttl_s=1)
    writer.batch_upsert([doc(1)])
    search(reader)
    writer.batch_upsert([doc(2)])
    [name] = reader.cache_client.keys("vectorkeep:*:q:*")
    time.sleep(1.1)
    reader.cache_client.expire(name, 3600)
    assert version(search(reader)) == 2


def test_what_a_writer_could_not_deliver_another_process_does(opened, until, sql, soon):
    writer, reader = opened(False), opened(bounded_ttl_s=3000)
    writer.batch_upsert([doc(1)])
    search(reader)
    until(lambda: sql("SELECT count(*) FROM write_log WHERE delivered_at IS NULL") == [(0,)])
    search(reader)
    assert search(reader).cached
    writer.batch_upsert([doc(2)])
    until(lambda: version(search(reader)) == 2)
    until(lambda: sql("SELECT count(*) FROM write_log WHERE delivered_at IS NULL") == [(0,)])


def test_delivered_writes_are_marked_and_not_delivered_again(opened, until, sql):
    store = opened()
    store.batch_upsert([doc(1)])
    until(lambda: sql("SELECT count(*) FROM write_log WHERE delivered_at IS NULL") == [(0,)])
    generations = {key: store.cache_client.get(key) for key in store.cache_client.scan_iter("vectorkeep:*:g:*")}
    store._parts.cache.deliver_undelivered()
    assert generations == {key: store.cache_client.get(key) for key in generations}


def test_an_answer_computed_before_a_write_and_stored_after_it_is_not_served(opened, monkeypatch):
    reader, writer = opened(), opened()
    writer.batch_upsert([doc(1)])
    write = query_cache.QueryCache.store

    def late(cache, slot, result, snapshot):
        writer.batch_upsert([doc(2)])
        write(cache, slot, result, snapshot)

    monkeypatch.setattr(query_cache.QueryCache, "store", late)
    assert version(search(reader)) == 1
    monkeypatch.undo()
    after = search(reader)
    assert (after.cached, version(after)) == (False, 2)


def test_each_call_may_ask_for_either_kind(opened):
    store, silent = opened(), opened(False)
    store.batch_upsert([doc(1)])
    search(store)
    silent.batch_upsert([doc(2)])
    assert version(store.search(QUERY, 3, source_id="a", consistency="bounded")) == 1
    assert version(store.search(QUERY, 3, source_id="a", consistency="strict")) == 2
    with pytest.raises(db.ValidationError, match="expected 'strict' or 'bounded'"):
        store.search(QUERY, 3, consistency="eventual")
