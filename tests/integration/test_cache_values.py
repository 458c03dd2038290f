"""What lies in Redis is believed only where it proves itself: corrupt, swapped, evicted or pruned is a miss."""

import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import text

import db
from db import query_cache

QUERY = [1.0, 0, 0, 0, 0, 0, 0, 0]
ASKED = [{"source_id": "a"}, {"source_id": "b"}, {"workspace": "w"}, {}]
LONG_AGO = "UPDATE write_log SET created_at = now() - interval '1 day'"


def doc(id_, source, version=0, workspace="w"):
    metadata = {"workspace": workspace, "version": version}
    return {"id": id_, "text": id_, "source_id": source, "metadata": metadata, "embedding": QUERY}


@pytest.fixture
def filled(store):
    store.batch_upsert([doc("a", "a"), doc("b", "b")])
    cached(store)
    assert cached(store) == [True] * 4
    return store


@pytest.fixture
def silent(database_url):
    """Another store that never tells Redis of its writes."""
    with db.connect(database_url, False) as opened:
        yield opened


def cached(store):
    return [store.search(QUERY, 3, **asked).cached for asked in ASKED]


def in_thread(work):
    """What `work` returns in a thread of its own, outside the caller's transaction."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(30)


def keys(store, kind):
    return sorted(store.cache_client.scan_iter(f"vectorkeep:*:{kind}:*"))


CORRUPT = {
    "empty": lambda value: b"",
    "truncated": lambda value: value[:-5],
    "one bit": lambda value: value[:60] + bytes([value[60] ^ 1]) + value[61:],
    "not JSON": lambda value: b"\xff\x00" * 50,
    "JSON of another kind": lambda value: b"[]",
    "without its digest": lambda value: value[32:],
}


@pytest.mark.parametrize("how", CORRUPT)
@pytest.mark.parametrize("consistency", ["strict", "bounded"])
def test_a_corrupt_value_is_a_miss_and_is_replaced(filled, how, consistency):
    client = filled.cache_client
    for key in keys(filled, "q"):
        client.set(key, CORRUPT[how](client.get(key)), ex=600)
    results = [filled.search(QUERY, 3, consistency=consistency, **asked) for asked in ASKED]
    assert [r.cached for r in results] == [False] * 4
    assert [{h.id for h in r} for r in results] == [{"a"}, {"b"}, {"a", "b"}, {"a", "b"}]
    assert cached(filled) == [True] * 4


def test_a_key_of_another_type_is_a_miss(filled):
    for key in keys(filled, "q"):
        filled.cache_client.delete(key)
        filled.cache_client.rpush(key, "x")
    assert cached(filled) == [False] * 4
    assert cached(filled) == [True] * 4


@pytest.mark.parametrize("token", [b"", b"\xff\xfe\x00", b"0" * 10_000])
def test_a_generation_that_is_not_ours_is_a_miss_and_no_error(filled, token):
    for key in keys(filled, "g"):
        filled.cache_client.set(key, token)
    assert cached(filled) == [False] * 4


def test_the_answer_to_another_question_is_a_miss(filled):
    def ask():
        one, none = (filled.search(QUERY, 3, source_id="a", where={"version": {"$gte": v}}) for v in (0, 1))
        return [(answer.cached, len(answer)) for answer in (one, none)]

    client, before = filled.cache_client, set(keys(filled, "q"))
    assert ask() == [(False, 1), (False, 0)]
    assert ask() == [(True, 1), (True, 0)]
    first, second = set(keys(filled, "q")) - before
    values = client.get(first), client.get(second)
    client.set(first, values[1], ex=600)
    client.set(second, values[0], ex=600)
    assert ask() == [(False, 1), (False, 0)]


@pytest.mark.parametrize("consistency", ["strict", "bounded"])
def test_evicted_generations_are_a_miss(filled, consistency):
    filled.cache_client.delete(*keys(filled, "g"))
    assert [filled.search(QUERY, 3, consistency=consistency, **asked).cached for asked in ASKED] == [False] * 4


def test_nothing_lives_in_redis_for_ever(filled):
    names = keys(filled, "q") + keys(filled, "g")
    assert len(names) >= 8
    assert all(0 < filled.cache_client.ttl(name) <= 7200 for name in names)


def test_no_pattern_reaches_redis_whatever_a_source_is_called(store):
    database = str(store.cache_client.connection_pool.connection_kwargs.get("db") or 0)
    commands, watching, finished = set(), threading.Event(), "all is said"

    def watch():
        with store.cache_client.monitor() as monitor:
            watching.set()
            for seen in monitor.listen():
                if str(seen["db"]) == database:
                    commands.add(seen["command"].split()[0].upper())
                if finished in seen["command"]:
                    return

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert watching.wait(10)
    for source in ("*", "?", "[a-z]", "a:b", "\\", "\n", " ", "é🦊", "x" * 1024):
        store.batch_upsert([doc("x", source, workspace=source)])
        for _ in range(2):
            assert [h.source_id for h in store.search(QUERY, 3, source_id=source)] == [source]
            store.search(QUERY, 3, workspace=source, consistency="bounded")
        assert store.search(QUERY, 3, source_id=source).cached
        store.delete_by_source_id(source)
    store.cache_client.echo(finished)
    watcher.join(10)
    assert {"MGET", "SET", "TIME"} <= commands
    assert not commands & {"KEYS", "SCAN", "FLUSHDB", "FLUSHALL", "EVAL", "HSCAN", "SSCAN"}


# -- pruning -----------------------------------------------------------------------------------------------


def prune_all(store, sql, until):
    """A transaction of another test's database can hold the horizon back for a moment."""
    until(lambda: store.maintain(skip_compaction=True, skip_index=True) and not sql("SELECT id FROM write_log"))


def test_answers_older_than_the_watermark_are_not_served(filled, silent, sql, until):
    silent.batch_upsert([doc("a", "a", version=1)])
    sql(LONG_AGO)
    prune_all(filled, sql, until)
    assert cached(filled) == [False] * 4
    assert filled.search(QUERY, 3, source_id="a")[0].metadata["version"] == 1
    assert cached(filled) == [True] * 4


def test_a_prune_spares_answers_that_it_cannot_touch(filled, sql):
    filled.maintain(skip_compaction=True, skip_index=True)
    assert sql("SELECT count(*) > 0 FROM write_log") == [(True,)]
    assert cached(filled) == [True] * 4


def test_a_slow_writer_whose_log_row_is_pruned_still_ends_the_answer(filled, silent, sql, until):
    with silent.transaction() as connection:
        connection.execute(text("UPDATE embeddings SET text = 'slow' WHERE id = 'a'"))
        silent.record_write(connection, sources=["a"], workspaces=["w"])
        connection.execute(text(LONG_AGO))
        sql("SELECT pg_current_xact_id()")  # begun later and finished: beyond the writer, seen by the search
        answers = [in_thread(lambda: filled.search(QUERY, 2, source_id="a")) for _ in range(2)]
        assert [(a.cached, a[0].text) for a in answers] == [(False, "a"), (True, "a")]
    prune_all(filled, sql, until)
    result = filled.search(QUERY, 2, source_id="a")
    assert not result.cached
    assert result[0].text == "slow"


def test_a_log_restored_from_another_cluster_does_not_keep_the_cache_off_for_ever(filled, sql):
    sql("UPDATE write_log_watermark SET xid = '9000000000000'")
    sql("INSERT INTO write_log (xid, tags) VALUES ('9000000000001', ARRAY['store', 'source:a', 'source:b', 'all'])")
    assert cached(filled) == [False] * 4
    assert cached(filled) == [False] * 4
    filled.maintain(skip_compaction=True, skip_index=True)
    cached(filled)
    assert cached(filled) == [True] * 4


def test_reads_during_maintenance_are_never_stale(filled, database_url):
    acknowledged, wrong, rounds, stop = [0], [], [0], threading.Event()

    def maintain():
        with psycopg.connect(database_url, autocommit=True) as connection:
            while not stop.is_set():
                connection.execute(LONG_AGO)
                filled.maintain(skip_compaction=True, skip_index=True)
                rounds[0] += 1

    def read():
        while not stop.is_set():
            expected = acknowledged[0]
            found = filled.search(QUERY, 3, source_id="a")
            if found[0].metadata["version"] < expected:
                wrong.append((expected, found))

    threads = [threading.Thread(target=work) for work in (maintain, read, read)]
    for thread in threads:
        thread.start()
    for version in range(1, 80):
        filled.batch_upsert([doc("a", "a", version)])
        acknowledged[0] = version
    stop.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert rounds[0] > 1


def test_the_check_of_an_answer_reads_the_log_by_its_index(filled, sql):
    """Also where the plan was made for any snapshot, over a long log that lies in no order."""
    sql("""INSERT INTO write_log (xid, tags)
           SELECT g::text::xid8, ARRAY['store', 'source:x'] FROM generate_series(1, 5000) AS g ORDER BY random()""")
    sql("ANALYZE write_log")
    snapshot = "5000:5000:"
    statement = query_cache._STILL_TRUE.decode().replace("%(snapshot)s", "$1").replace("%(tags)s", "$2")
    for mode in ("force_generic_plan", "force_custom_plan"):
        sql(f"SET plan_cache_mode = {mode}")
        sql(f"PREPARE {mode} (text, text[]) AS {statement}")
        plan = "\n".join(row[0] for row in sql(f"EXPLAIN EXECUTE {mode} ('{snapshot}', ARRAY['source:a', 'all'])"))
        assert "write_log_xid_idx" in plan
        assert "Seq Scan on write_log " not in plan
