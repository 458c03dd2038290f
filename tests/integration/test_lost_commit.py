"""A COMMIT whose reply never came: it is found out whether it happened, and a report is true either way."""

import dataclasses
import logging
import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit, urlunsplit

import pytest

import db
from db.transactions import LoggedWrite, _Attempt, _is_logged


class Proxy:
    """Between a client and PostgreSQL. Cuts the line at the next COMMIT, before it or after it took effect."""

    def __init__(self, host, port):
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut = None
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            threading.Thread(target=self._to_server, args=(client, server), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client), daemon=True).start()

    def _to_server(self, client, server):
        try:
            while data := client.recv(65536):
                if self.cut and b"COMMIT" in data:
                    when, self.cut = self.cut, None
                    self.cuts += 1
                    # From here on nothing reaches the client any more.
                    client.shutdown(socket.SHUT_RDWR)
                    if when == "after":
                        server.sendall(data)
                    break
                server.sendall(data)
        except OSError:
            pass
        finally:
            with suppress(OSError):
                server.shutdown(socket.SHUT_WR)

    def _forward(self, source, target):
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, target):
                end.close()

    def close(self):
        self._listener.close()


@pytest.fixture
def proxy(database_url):
    parts = urlsplit(database_url)
    if not parts.hostname:
        pytest.skip("the server listens on a socket file only")
    proxy = Proxy(parts.hostname, parts.port)
    yield proxy
    proxy.close()


@pytest.fixture
def distant(proxy, database_url, redis_url):
    """A store that reaches its database through the proxy."""
    parts = urlsplit(database_url)
    user = parts.netloc.rpartition("@")[0]
    url = urlunsplit(parts._replace(netloc=f"{user}@127.0.0.1:{proxy.port}", query="sslmode=disable"))
    with db.connect(url, redis_url, model_id="test-model", dimensions=8) as store:
        store.batch_upsert([{"id": "first", "text": "t"}])
        yield store


def test_a_commit_that_happened_is_confirmed_and_not_done_again(distant, proxy, sql, caplog):
    proxy.cut = "after"
    with caplog.at_level(logging.INFO, "vectorkeep"):
        result = distant.batch_upsert([{"id": "a", "text": "t", "chunks": [{"text": "c"}]}])
    assert proxy.cuts == 1
    assert (result.inserted, result.updated, result.unchanged, result.failed) == (1, 0, 0, 0)
    assert "write.commit_confirmed" in caplog.messages
    assert sql("SELECT count(*) FROM write_log") == [(2,)]


def test_a_commit_that_did_not_happen_is_done_again(distant, proxy, sql, caplog):
    proxy.cut = "before"
    with caplog.at_level(logging.INFO, "vectorkeep"):
        result = distant.batch_upsert([{"id": "a", "text": "t", "chunks": [{"text": "c"}]}])
    assert proxy.cuts == 1
    assert result.inserted == 1
    assert "write.commit_confirmed" not in caplog.messages
    assert sql("SELECT count(*) FROM write_log") == [(2,)]
    assert sql("SELECT count(*) FROM chunks") == [(1,)]


def test_another_write_that_got_its_numbers_after_a_crash_confirms_nothing(store, sql):
    store.batch_upsert([{"id": "a", "text": "t"}])
    [(log_id, xid, created_at)] = sql("SELECT id, xid::text, created_at::text FROM write_log")
    attempt = _Attempt(xid, created_at, "", None, LoggedWrite(log_id, []))
    assert _is_logged(store._parts.database, attempt) == (True, False)
    earlier = dataclasses.replace(attempt, created_at="2026-01-01 00:00:00.000001+00")
    assert _is_logged(store._parts.database, earlier) == (False, False)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_deletion_reports_what_it_deleted_though_its_reply_was_lost(distant, proxy, sql, when):
    proxy.cut = when
    assert distant.delete(["first"]).deleted == 1
    assert proxy.cuts == 1
    assert sql("SELECT count(*) FROM embeddings") == [(0,)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_cache_learns_of_a_write_whose_reply_was_lost(distant, proxy, when):
    vector = [1.0, *[0.0] * 7]
    distant.batch_upsert([{"id": "a", "text": "t", "embedding": vector}])
    distant.search(vector)
    assert distant.search(vector).cached
    proxy.cut = when
    distant.delete(["a"])
    assert len(distant.search(vector)) == 0
