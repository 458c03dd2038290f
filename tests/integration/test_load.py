"""Under load: a full pool makes callers wait, and then says so; nothing that waits grows; connections stay few."""

import gc
import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import db
from db import UnavailableError
from db import metrics as metrics_module
from db import opening as opening_module
from db.config import Settings
from ops.benchmarks.load.plan import LoadPlan
from ops.benchmarks.load.report import DIRECT_CONNECTIONS
from ops.benchmarks.load.workers import collect, started

from .counting import Counting

ROOT = Path(__file__).parents[2]
VECTOR = [1.0, *[0.0] * 15]
TIMEOUT_S = 1.0
POOL_MAX = 2

# What holds things for another thread, and what bounds it. Whoever adds one adds its bound, and a test of that.
QUEUES = {
    "batch_writer.py": "ThreadPoolExecutor(1, ",  # one batch is written while the next is made ready; no third is begun
    "metrics.py": "deque(maxlen=_MAX_BUFFERED)",
    "opening.py": "deque(maxlen=_MAX_DELIVERED)",
    "openai_embedder.py": "ThreadPoolExecutor(_at_least_one(",  # callers wait for what they asked for
}

CALLS = {
    "get": lambda store: store.get(["a"]),
    "search": lambda store: store.search(VECTOR),
    "search for a text": lambda store: store.search("t"),
    "batch_upsert": lambda store: store.batch_upsert([{"id": "b", "text": "t"}]),
    "embed_batch": lambda store: store.embed_batch([{"id": "c", "text": "t"}]),
    "delete": lambda store: store.delete(["a"]),
    "delete_by_source_id": lambda store: store.delete_by_source_id("s"),
    "get_statistics": lambda store: store.get_statistics(),
    "iter_hashes": lambda store: list(store.iter_hashes()),
    "transaction": lambda store: store.transaction().__enter__(),
}


@pytest.fixture
def small(database_url, redis_url):
    """A store of two connections, with one document."""
    settings = {"pool_max": POOL_MAX, "pool_timeout_s": TIMEOUT_S}
    with db.connect(database_url, redis_url, embedder=Counting(), **settings) as store:
        store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])
        yield store


class Full:
    """All connections of a pool, taken until `release`."""

    def __init__(self, store):
        self.pool = store.pool
        self.held = [self.pool.getconn() for _ in range(self.pool.max_size)]

    def release(self):
        while self.held:
            self.pool.putconn(self.held.pop())


@pytest.fixture
def full(small):
    taken = Full(small)
    yield taken
    taken.release()


# -- a full pool -----------------------------------------------------------------------------------------------


def test_every_call_waits_for_the_timeout_and_then_says_what_to_do(small, full):
    def refused_after_s(call):
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="no database connection became free") as refused:
            call(small)
        assert "fewer threads" in str(refused.value)
        assert "raise pool_max or pool_timeout_s" in str(refused.value)
        assert "vectorkeep doctor" in str(refused.value)
        return time.monotonic() - began

    with ThreadPoolExecutor(len(CALLS)) as threads:
        waited = dict(zip(CALLS, threads.map(refused_after_s, CALLS.values()), strict=True))
    assert all(TIMEOUT_S <= seconds < TIMEOUT_S + 10 for seconds in waited.values()), waited


def test_a_connection_that_becomes_free_in_time_serves_who_waits(small, full):
    with ThreadPoolExecutor(6) as threads:
        found = [threads.submit(small.get, ["a"]) for _ in range(6)]
        time.sleep(0.2)
        assert not any(future.done() for future in found)
        full.release()
        assert [future.result()[0].id for future in found] == ["a"] * 6


def test_one_connection_serves_many_threads_that_do_everything(database_url, redis_url):
    """No call holds a connection while it waits for another: with one of them that would be for ever."""

    def work(number):
        id_ = f"{number}"
        assert store.embed_batch([{"id": id_, "text": id_, "source_id": id_}]).inserted == 1
        assert store.search(id_, 1)[0].text
        assert store.get([id_])
        assert store.get_statistics().documents
        assert store.delete_by_source_id(id_).deleted == 1

    with db.connect(database_url, redis_url, embedder=Counting(), pool_max=1, pool_timeout_s=20) as store:
        store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(work, range(12)))
        assert store.pool.get_stats()["pool_size"] == 1


def test_callers_that_gave_up_are_forgotten_with_all_they_had_in_hand(small, full, until):
    class Text(str):
        """As a plain one, but it can be watched."""

    def fail():
        text = Text("a large document")
        with pytest.raises(UnavailableError):
            small.embed(text)
        return weakref.ref(text)

    watched = [fail() for _ in range(2)]
    gc.collect()
    assert [text() for text in watched] == [None, None]
    until(lambda: small.pool.get_stats()["requests_waiting"] == 0)  # the thread of the metrics may wait just now


# -- queues ----------------------------------------------------------------------------------------------------


def test_every_queue_is_known_with_its_bound():
    made = re.compile(r"\b(?:deque|Queue|SimpleQueue|LifoQueue|PriorityQueue|\w*PoolExecutor)\(.*")
    found = [
        (path.name, call) for path in sorted((ROOT / "db").rglob("*.py")) for call in made.findall(path.read_text())
    ]
    assert sorted(name for name, _ in found) == sorted(QUEUES)
    for name, call in found:
        assert call.startswith(QUEUES[name]), f"{name}: {call}"


def test_metrics_that_cannot_be_written_keep_no_invalidation_from_being_delivered(
    database_url, redis_url, sql, admin, until, monkeypatch
):
    """Also where there are metrics to write each time, as there are under load."""
    monkeypatch.setattr(metrics_module, "_FLUSH_EVERY_S", 0.05)
    with db.connect(database_url, redis_url) as store, admin.transaction():
        admin.execute("LOCK performance_metrics")
        for number in range(20):
            store.batch_upsert([{"id": f"{number}", "text": "t"}])

        def all_marked():
            store.search(VECTOR)
            return sql("SELECT count(*) FROM write_log WHERE delivered_at IS NULL") == [(0,)]

        until(all_marked, within_s=15)
        assert not store._parts._delivered


def test_what_waits_to_be_marked_as_delivered_is_bounded(database_url, redis_url, monkeypatch):
    monkeypatch.setattr(opening_module, "_MAX_DELIVERED", 5)
    with db.connect(database_url, redis_url) as store:
        monkeypatch.setattr(store._parts.metrics, "start", lambda: None)  # a consumer that never comes
        for number in range(8):
            store.batch_upsert([{"id": f"{number}", "text": "t"}])
        assert len(store._parts._delivered) == 5


@pytest.mark.parametrize(("method", "ahead"), [("batch_upsert", 2), ("embed_batch", 3)])
def test_a_producer_is_not_read_further_ahead_than_a_slow_server_writes(small, sql, method, ahead):
    """One batch is being written and one is read; with `embed_batch` one more is embedded."""
    sql("CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END'")
    sql("CREATE TRIGGER slow AFTER INSERT ON embeddings FOR EACH STATEMENT EXECUTE FUNCTION slow()")
    size, done, most = 10, 0, 0

    def produce():
        nonlocal most
        for number in range(8 * size):
            most = max(most, number + 1 - done)
            yield {"id": f"n{number}", "text": f"text {number}"}

    def note(processed, _total):
        nonlocal done
        done = processed

    result = getattr(small, method)(produce(), batch_size=size, bulk=False, on_progress=note)
    assert result.inserted == 8 * size
    assert most <= ahead * size


# -- connections -----------------------------------------------------------------------------------------------


def test_many_processes_and_threads_open_no_more_connections_than_is_documented(
    database_url, redis_url, admin, monkeypatch
):
    monkeypatch.setenv("VECTORKEEP_POOL_MAX", "2")
    plan = LoadPlan(3, 2, 4, seconds=1.5, rows=100, dimensions=8, redis_url=redis_url)
    sessions = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
    """
    seen, over = [], threading.Event()

    def count():
        while not over.wait(0.02):
            seen.append(admin.execute(sessions).fetchone()[0])

    fill(database_url, plan)
    counter = threading.Thread(target=count)
    counter.start()
    try:
        with started(database_url, plan) as workers:
            for worker in workers:
                worker.go()
            results, deaths = collect(workers)
    finally:
        over.set()
        counter.join()
    assert not deaths
    assert [result["errors"] for result in results] == [{}] * 3, results
    assert sum(result["pool"]["requests_queued"] for result in results) > 0, "nobody ever had to wait"
    assert 3 * 2 <= max(seen) <= 3 * (2 + DIRECT_CONNECTIONS)


def fill(database_url, plan):
    from ops.benchmarks.load.material import Material

    material = Material(plan.vectors())
    with db.connect(database_url, False, embedder=material, maintenance_on_close=False) as store:
        store.batch_upsert(material.shared_documents(plan.rows))


def test_the_documented_number_of_processes_fits_into_the_servers_default():
    """docs/operations.md reckons with PostgreSQL's own default of 100 connections, 3 of them reserved."""
    text = (ROOT / "docs" / "operations.md").read_text()
    [(processes, pool_max, direct, most)] = re.findall(r"(\d+) processes × \((\d+) \+ (\d+)\) = (\d+)", text)
    default = Settings.model_fields["pool_max"].default
    assert (int(pool_max), int(direct)) == (default, DIRECT_CONNECTIONS)
    assert int(most) == int(processes) * (default + DIRECT_CONNECTIONS) <= 97
    assert (int(processes) + 1) * (default + DIRECT_CONNECTIONS) > 97
