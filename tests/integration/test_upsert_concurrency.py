"""Writers at once: none gets an error, nothing is lost, and what is counted adds up."""

import multiprocessing
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

import db
from db import batch_writer
from db.locks import LOCK_CLASS, Purpose

IDS = [f"id {n}" for n in range(40)]


def version(id_, writer, n):
    """A document all of whose parts tell who wrote it."""
    name = f"{writer}:{n}"
    return {
        "id": id_,
        "text": name,
        "source_id": f"source {writer}",
        "metadata": {"by": name},
        "embedding": [float(len(name)), float(n + 1), *[0.0] * 6],
        "chunks": [{"text": f"{name}/{part}"} for part in range(1 + n % 3)],
    }


def upsert_at_random(store, writer, rounds=12):
    """Upsert random ids in random order. Returns the counts of all rounds."""
    choose = random.Random(writer)
    totals = {"inputs": 0, "inserted": 0, "updated": 0, "unchanged": 0, "failed": 0}
    for n in range(rounds):
        ids = choose.sample(IDS, 15)
        result = store.batch_upsert([version(id_, writer, n) for id_ in ids], batch_size=choose.choice([4, 15]))
        totals["inputs"] += len(ids)
        for name in ("inserted", "updated", "unchanged", "failed"):
            totals[name] += getattr(result, name)
    return totals


def upsert_in_process(database_url, redis_url, writer):
    with db.connect(database_url, redis_url) as store:
        return upsert_at_random(store, writer)


def assert_consistent(store, sql, totals):
    assert sum(t["failed"] for t in totals) == 0
    for counts in totals:
        assert counts["inserted"] + counts["updated"] + counts["unchanged"] == counts["inputs"]
    stored = store.get(IDS)
    assert sum(t["inserted"] for t in totals) == len(stored)
    for document in stored:
        writer, n = document.text.split(":")
        expected = version(document.id, writer, int(n))
        assert document.source_id == expected["source_id"]
        assert document.metadata == expected["metadata"]
        assert document.embedding.tolist() == expected["embedding"]
        assert [c.text for c in document.chunks] == [c["text"] for c in expected["chunks"]]
    assert sql(
        "SELECT count(*) FROM chunks JOIN embeddings d ON d.id = document_id WHERE chunks.source_id <> d.source_id"
    ) == [(0,)]


def test_threads_that_upsert_the_same_ids_leave_whole_documents(store, sql):
    with ThreadPoolExecutor(4) as threads:
        totals = list(threads.map(lambda writer: upsert_at_random(store, writer), "abcd"))
    assert_consistent(store, sql, totals)


def test_processes_that_upsert_the_same_ids_leave_whole_documents(store, sql, database_url, redis_url):
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(2) as processes:
        totals = processes.starmap(upsert_in_process, [(database_url, redis_url, w) for w in "xy"])
    assert_consistent(store, sql, totals)


def test_upserts_in_opposite_order_never_deadlock(store):
    def write(order):
        for n in range(10):
            ids = IDS if order > 0 else IDS[::-1]
            result = store.batch_upsert([version(id_, f"{order}", n) for id_ in ids])
            assert result.failed == 0

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, (1, -1)))
    with store.pool.connection() as connection:
        row = connection.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()").fetchone()
    assert row == (0,)


def test_deletions_between_upserts_leave_no_part_behind(store, sql):
    stop = threading.Event()

    def delete():
        choose = random.Random(1)
        while not stop.is_set():
            store.delete(choose.sample(IDS, 10))
            store.delete_by_source_id(f"source {choose.choice('ab')}", cascade=choose.random() < 0.5)

    with ThreadPoolExecutor(3) as threads:
        deleting = threads.submit(delete)
        try:
            totals = list(threads.map(lambda writer: upsert_at_random(store, writer), "ab"))
        finally:
            stop.set()
        deleting.result()
    assert sum(t["failed"] for t in totals) == 0
    for document in store.get(IDS):
        writer, n = document.text.split(":")
        assert [c.text for c in document.chunks] == [c["text"] for c in version("", writer, int(n))["chunks"]]
    assert sql(
        "SELECT count(*) FROM chunks WHERE document_id IS NULL AND origin_id IN (SELECT id FROM embeddings)"
    ) == [(0,)]


@pytest.fixture
def first_waits(sql):
    """Every row of source `one` waits, once it is written, for the lock 42 of the test's own session."""
    sql("""
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN NULL; END $$
    """)
    sql("""
        CREATE TRIGGER wait AFTER INSERT OR UPDATE ON embeddings FOR EACH ROW
        WHEN (NEW.source_id = 'one') EXECUTE FUNCTION wait()
    """)
    sql("SELECT pg_advisory_lock(42)")


def waiting(sql):
    return sql("""
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'vectorkeep' AND wait_event_type = 'Lock'
    """)[0][0]


def test_a_new_id_written_into_two_sources_at_once_is_logged_in_both(store, sql, until, first_waits):
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(
            store.batch_upsert, [{"id": "a", "text": "1", "source_id": "one", "chunks": [{"text": "c1"}]}]
        )
        until(lambda: waiting(sql) == 1)
        second = threads.submit(
            store.batch_upsert, [{"id": "a", "text": "2", "source_id": "two"}, {"id": "b", "text": "2"}]
        )
        until(lambda: waiting(sql) == 2)
        sql("SELECT pg_advisory_unlock(42)")
        assert first.result().inserted == 1
        assert (second.result().inserted, second.result().updated) == (1, 1)
    assert [d.text for d in store.get(["a", "b"])] == ["2", "2"]
    assert sql("SELECT source_id FROM chunks") == [("two",)]
    [(tags,)] = sql("SELECT tags FROM write_log ORDER BY id DESC LIMIT 1")
    assert set(tags) == {"store", "source:one", "source:two", "source:batch"}


def test_a_document_that_another_writer_made_equal_meanwhile_is_unchanged(store, sql, until, first_waits):
    same = {"id": "a", "text": "1", "source_id": "one", "chunks": [{"text": "c1"}]}
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(store.batch_upsert, [same])
        until(lambda: waiting(sql) == 1)
        second = threads.submit(store.batch_upsert, [same])
        until(lambda: waiting(sql) == 2)
        sql("SELECT pg_advisory_unlock(42)")
        assert first.result().inserted == 1
        assert (second.result().unchanged, second.result().failed) == (1, 0)
    assert sql("SELECT count(*) FROM write_log") == [(1,)]


def test_the_next_batch_is_made_ready_while_one_is_written(store, database_url):
    asked = threading.Event()

    def documents():
        yield from ({"id": f"{n}", "text": "x"} for n in range(2))
        asked.set()
        yield {"id": "2", "text": "x"}

    with psycopg.connect(database_url) as other, ThreadPoolExecutor(1) as caller:
        other.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_CLASS, int(Purpose.WRITERS)))
        writing = caller.submit(store.batch_upsert, documents(), batch_size=2)
        asked_in_time = asked.wait(10)
        other.rollback()
        assert writing.result().inserted == 3
    assert asked_in_time


@pytest.mark.parametrize("stored", [False, True])
def test_the_next_batch_is_begun_as_soon_as_the_rows_of_one_are_sent(store, sql, first_waits, monkeypatch, stored):
    monkeypatch.setattr(batch_writer, "_HEAD_START_S", 60)  # longer than this test would wait
    if stored:
        store.batch_upsert([{"id": f"{n}", "text": "old"} for n in range(3)])
    asked = threading.Event()

    def documents():
        yield from ({"id": f"{n}", "text": "x", "source_id": "one"} for n in range(2))
        asked.set()
        yield {"id": "2", "text": "x", "source_id": "one"}

    with ThreadPoolExecutor(1) as caller:
        writing = caller.submit(store.batch_upsert, documents(), batch_size=2)
        asked_in_time = asked.wait(10)
        sql("SELECT pg_advisory_unlock(42)")
        result = writing.result()
    assert (result.inserted, result.updated) == ((0, 3) if stored else (3, 0))
    assert asked_in_time
