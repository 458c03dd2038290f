"""The strict cache: an answer is served again until a write it depends on is committed, and never after."""

import itertools
import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import redis
from sqlalchemy import text

import db
from db import query_cache
from db.errors import ValidationError

QUERY = [1.0, 0, 0, 0, 0, 0, 0, 0]
# What may be asked, by the tag that the answer depends on.
ASKED = {
    "store": {},
    "source a": {"source_id": "a"},
    "source b": {"source_id": "b"},
    "source c": {"source_id": "c"},
    "workspace w": {"workspace": "w"},
    "workspace v": {"workspace": "v"},
    "chunks of a": {"source_id": "a", "level": "chunks"},
}


def doc(id_, source, workspace=None, value=1.0, **parts):
    metadata = {"workspace": workspace} if workspace else {}
    embedding = [value, 1.0, 0, 0, 0, 0, 0, 0]
    return {
        "id": id_,
        "text": f"text of {id_}",
        "source_id": source,
        "metadata": metadata,
        "embedding": embedding,
    } | parts


def search(store, **asked):
    return store.search(QUERY, 5, **asked)


def fill(store):
    chunk = {"text": "piece", "embedding": QUERY}
    rows = [doc("a1", "a", "w", chunks=[chunk]), doc("a2", "a", value=2), doc("b1", "b", "v"), doc("c1", "c")]
    assert store.batch_upsert(rows).inserted == 4
    warm(store)


def warm(store):
    for asked in ASKED.values():
        search(store, **asked)
    for name, asked in ASKED.items():
        assert search(store, **asked).cached, name


def still_cached(store):
    return {name for name, asked in ASKED.items() if search(store, **asked).cached}


@pytest.fixture
def other(database_url):
    """A second store on the same database that never tells Redis of its writes."""
    with db.connect(database_url, False) as opened:
        yield opened


def test_a_hit_equals_the_answer_that_was_computed(store):
    fill(store)
    store.batch_upsert([doc("x", "a", "w", metadata={"workspace": "w", "ä": [1, {"b": None}], "f": 0.1})])
    own_write(store, everything=True)
    for asked in ASKED.values():
        computed, cached = search(store, **asked), search(store, **asked)
        assert (computed.cached, cached.cached) == (False, True)
        assert computed.hits == cached.hits
        assert (computed.complete, computed.exact) == (cached.complete, cached.exact)


def stored_snapshot(store):
    """The snapshot of the one answer that is cached."""
    [name] = store.cache_client.scan_iter("vectorkeep:*:q:*")
    return json.loads(store.cache_client.get(name)[32:])["snapshot"]


@pytest.fixture
def renewing(monkeypatch):
    """Answers are stored again as of now already when they are two transactions old."""
    monkeypatch.setattr(query_cache, "_RENEWED_BEHIND", 1)


@pytest.mark.usefixtures("renewing")
def test_an_old_hit_is_kept_as_of_now_for_as_long_as_it_was_to_live(store, until):
    store.batch_upsert([doc("a1", "a"), doc("b1", "b")])
    search(store, source_id="b")
    [name] = store.cache_client.scan_iter("vectorkeep:*:q:*")
    store.cache_client.expire(name, 1000)
    before = stored_snapshot(store)
    for n in range(5):
        store.batch_upsert([doc("a1", "a", value=n + 3.0)])
    # Snapshots begin at the oldest transaction of the whole server: some other test's may hold this one back.
    until(lambda: search(store, source_id="b").cached and stored_snapshot(store) != before)
    assert int(stored_snapshot(store).split(":")[0]) > int(before.split(":")[0])
    assert 900 < store.cache_client.ttl(name) <= 1000
    store.batch_upsert([doc("b1", "b", value=9)])
    assert not search(store, source_id="b").cached


@pytest.mark.usefixtures("renewing")
def test_a_write_under_way_while_an_answer_is_renewed_ends_it(store, other, until):
    """Its snapshot must not count for seen what had not committed when it was taken."""
    store.batch_upsert([doc("a1", "a"), doc("b1", "b")])
    search(store, source_id="b")
    before = stored_snapshot(store)
    for n in range(3):
        store.batch_upsert([doc("a1", "a", value=n + 3.0)])
    with other.transaction() as connection:
        connection.execute(text("UPDATE embeddings SET text = 'changed' WHERE id = 'b1'"))
        other.record_write(connection, sources=["b"])

        def renewed():
            with ThreadPoolExecutor(1) as thread:  # in this one a transaction is open: it would do without the cache
                assert thread.submit(lambda: search(store, source_id="b").cached).result()
            return stored_snapshot(store) != before

        until(renewed)
    found = search(store, source_id="b")
    assert (found.cached, found[0].text) == (False, "changed")


STORE_ONLY = {"source b", "source c", "workspace v"}
WRITES = {
    "upsert into a": (
        lambda s: s.batch_upsert([doc("a3", "a")]),
        {"source b", "source c", "workspace w", "workspace v"},
    ),
    "upsert into a and w": (lambda s: s.batch_upsert([doc("a3", "a", "w")]), STORE_ONLY),
    "update of metadata": (
        lambda s: s.batch_upsert([{"id": "c1", "text": "text of c1", "source_id": "c", "metadata": {"n": 1}}]),
        set(ASKED) - {"store", "source c"},
    ),
    "move to another source": (
        lambda s: s.batch_upsert([doc("a2", "b", value=2)]),
        {"source c", "workspace w", "workspace v"},
    ),
    "move to another workspace": (
        lambda s: s.batch_upsert([doc("a1", "a", "v")]),
        {"source b", "source c"},
    ),
    "new chunks": (lambda s: s.batch_upsert([doc("a1", "a", "w", chunks=[])]), STORE_ONLY),
    "delete": (lambda s: s.delete(["b1"]), {"source a", "source c", "workspace w", "chunks of a"}),
    "delete of a source": (lambda s: s.delete_by_source_id("a"), STORE_ONLY),
    "delete that keeps chunks": (lambda s: s.delete_by_source_id("a", cascade=False), STORE_ONLY),
    "a write of the caller's own": (
        lambda s: own_write(s, sources=["c"], workspaces=["v"]),
        {"source a", "source b", "workspace w", "chunks of a"},
    ),
    "everything": (lambda s: own_write(s, everything=True), set()),
}
NOTHING = {
    "upsert of what is stored": lambda s: s.batch_upsert([doc("a2", "a", value=2)]),
    "delete of what is not there": lambda s: s.delete(["no such id"]),
    "cleanup without orphans": lambda s: s.cleanup_orphaned(),
    "a dry run": lambda s: s.cleanup_orphaned(dry_run=True),
    "maintenance": lambda s: s.maintain(skip_compaction=True),
}


def own_write(store, **named):
    with store.transaction() as connection:
        connection.execute(text("UPDATE embeddings SET text = text || '!' WHERE source_id = 'c'"))
        store.record_write(connection, **named)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_ends_what_depends_on_it_and_nothing_else(store, write):
    fill(store)
    run, untouched = WRITES[write]
    run(store)
    assert still_cached(store) == untouched


@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_redis_never_heard_of_is_found_in_the_log(store, other, write):
    fill(store)
    run, untouched = WRITES[write]
    run(other)
    assert still_cached(store) == untouched


@pytest.mark.parametrize("write", NOTHING)
def test_what_changes_nothing_ends_nothing(store, write):
    fill(store)
    NOTHING[write](store)
    assert still_cached(store) == set(ASKED)


def test_cleanup_ends_what_it_removes_from(store):
    fill(store)
    store.batch_upsert([{"id": "orphan", "text": "no vector", "source_id": "c"}])
    warm(store)
    assert store.cleanup_orphaned().orphaned_embeddings == 1
    assert still_cached(store) == set(ASKED) - {"store", "source c"}


@pytest.mark.parametrize("cascade", [True, False])
def test_detached_chunks_taken_elsewhere_end_what_found_them(store, other, cascade):
    fill(store)
    store.delete_by_source_id("a", cascade=False)
    assert [hit.text for hit in search(store, **ASKED["chunks of a"])] == ["piece"]
    assert search(store, **ASKED["chunks of a"]).cached
    if cascade:
        other.batch_upsert([doc("a1", "b", chunks=[])])
    else:
        other.batch_upsert([doc("a1", "b")])
    result = search(store, **ASKED["chunks of a"])
    assert not result.cached
    assert list(result) == []


def test_restored_generations_do_not_bring_an_old_answer_back(store, redis_url):
    fill(store)
    client = store.cache_client
    before = {key: client.get(key) for key in client.scan_iter("*")}
    store.batch_upsert([doc("new", "a", "w", value=9)])
    client.flushdb()
    for key, value in before.items():
        client.set(key, value, ex=3600)
    result = search(store, source_id="a")
    assert not result.cached
    assert result[0].id == "new"


def test_inside_a_transaction_the_cache_is_neither_read_nor_filled(store):
    fill(store)
    with store.transaction():
        assert not search(store).cached
        assert not search(store, workspace="new").cached
    assert search(store).cached
    assert not search(store, workspace="new").cached


def test_a_writer_that_began_before_the_search_and_commits_after_it_ends_the_answer(store):
    fill(store)
    with store.transaction() as connection:
        connection.execute(text("DELETE FROM chunks"))
        connection.execute(text("DELETE FROM embeddings WHERE id = 'a2'"))
        store.record_write(connection, sources=["a"])
        answers = in_thread(lambda: [search(store, source_id="a", exact=True) for _ in range(2)])
        assert [a.cached for a in answers] == [False, True]
        assert "a2" in {hit.id for hit in answers[1]}
    result = search(store, source_id="a", exact=True)
    assert not result.cached
    assert "a2" not in {hit.id for hit in result}


def abandoned_write(store):
    with store.transaction() as connection:
        connection.execute(text("DELETE FROM embeddings"))
        store.record_write(connection, everything=True)
        raise RuntimeError("abandoned")


def test_a_writer_that_is_rolled_back_ends_nothing(store):
    fill(store)
    with pytest.raises(RuntimeError, match="abandoned"):
        abandoned_write(store)
    assert still_cached(store) == set(ASKED)


def test_a_write_that_names_nothing_is_refused(store):
    with store.transaction() as connection, pytest.raises(ValidationError, match="nothing is named"):
        store.record_write(connection)


def in_thread(work):
    """What `work` returns in a thread of its own, outside the caller's transaction."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(30)
    return found[0]


def test_an_answer_computed_before_a_write_and_stored_after_it_is_never_served(store, monkeypatch):
    fill(store)
    write = query_cache.QueryCache.store

    def late(cache, slot, result, snapshot):
        in_thread(lambda: store.batch_upsert([doc("late", "a", "w", value=9)]))
        write(cache, slot, result, snapshot)

    monkeypatch.setattr(query_cache.QueryCache, "store", late)
    computed = search(store, source_id="a", exact=True)
    monkeypatch.undo()
    assert "late" not in {hit.id for hit in computed}
    result = search(store, source_id="a", exact=True)
    assert not result.cached
    assert "late" in {hit.id for hit in result}


def _write_elsewhere(database_url, source):
    with db.connect(database_url, False) as store:
        store.batch_upsert([doc("elsewhere", source, value=9)])


def test_two_processes_share_answers_and_see_each_others_writes(store, database_url, redis_url):
    fill(store)
    with db.connect(database_url, redis_url) as second:
        assert still_cached(second) == set(ASKED)
    process = multiprocessing.get_context("spawn").Process(target=_write_elsewhere, args=(database_url, "c"))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert still_cached(store) == set(ASKED) - {"store", "source c"}
    assert search(store)[0].id == "elsewhere"


def test_many_connections_give_the_same_answers(store):
    fill(store)
    results = [in_thread(lambda: still_cached(store)) for _ in range(4)]
    assert all(found == set(ASKED) for found in results)


def test_another_vector_k_or_level_is_another_answer(store):
    fill(store)
    rng = np.random.default_rng(0)
    for asked in ({"k": 4}, {"k": 5, "exact": True}, {"k": 5, "ef_search": 90}, {"k": 5, "where": {"n": 1}}):
        assert not store.search(QUERY, **asked).cached
    assert not store.search(rng.random(8), 5).cached
    assert store.search(np.array(QUERY, dtype=np.float32), 5).cached


def test_what_is_asked_of_redis_is_what_redis_6_understands(store, redis_url):
    """It refuses SET with NX and GET together, and a cache that is refused its generations keeps nothing."""
    fill(store)
    with redis.Redis.from_url(redis_url) as client, client.monitor() as monitor:
        client.flushdb()
        assert [search(store).cached for _ in range(2)] == [False, True]
        client.echo("end")
        asked = list(itertools.takewhile(lambda command: "ECHO end" not in command, commands(monitor)))
    sets = [command.upper().split() for command in asked if command.startswith("SET ")]
    assert any("NX" in words for words in sets)
    assert not [words for words in sets if {"NX", "GET"} <= set(words)]


def commands(monitor):
    while True:
        yield monitor.next_command()["command"]


def test_a_generation_that_another_began_meanwhile_is_that_of_both(store, redis_url):
    fill(store)
    cache, name = store._parts.cache, "vectorkeep:test:generation"
    first = cache._begin_generation(name)
    assert cache._begin_generation(name) == first
    with redis.Redis.from_url(redis_url) as client:
        assert client.get(name) == first.encode()
        assert 0 < client.ttl(name) <= 2 * store.settings.cache_ttl_s
