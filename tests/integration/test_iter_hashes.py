"""iter_hashes: all stored hashes in order, one batch at a time, however slow the caller is."""

import time
from hashlib import sha256
from itertools import islice

import psycopg
import pytest

import db
from db.engine import StoreConnection


def digest(text):
    return sha256(text.encode()).digest()


def document(id_, source_id="s", parts=()):
    return {"id": id_, "text": f"text of {id_}", "source_id": source_id, "chunks": [{"text": p} for p in parts]}


@pytest.fixture
def filled(store):
    """25 documents of two sources, written in no order; some with chunks."""
    numbers = [n * 7 % 25 for n in range(25)]
    store.batch_upsert(
        [document(f"{n:02}", "even" if n % 2 == 0 else "odd", [f"{n}/{p}" for p in range(n % 4)]) for n in numbers]
    )
    return store


@pytest.fixture
def fetched(monkeypatch):
    """The sizes of the batches that server-side cursors fetched."""
    sizes = []

    class Watched(psycopg.ServerCursor):
        def _fetch_gen(self, num):
            rows = yield from super()._fetch_gen(num)
            sizes.append(len(rows))
            return rows

    made = StoreConnection.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.server_cursor_factory = Watched

    monkeypatch.setattr(StoreConnection, "__init__", init)
    return sizes


@pytest.mark.parametrize("batch_size", [1, 7, 25, 1000])
def test_all_come_in_order_with_the_hashes_of_their_texts_and_chunks(filled, batch_size):
    assert list(filled.iter_hashes(batch_size=batch_size)) == [
        db.StoredHash(
            f"{n:02}",
            "even" if n % 2 == 0 else "odd",
            digest(f"text of {n:02}"),
            tuple(digest(f"{n}/{p}") for p in range(n % 4)),
        )
        for n in range(25)
    ]


def test_chunk_hashes_are_in_the_order_of_the_chunks(store):
    parts = [f"part {n * 7 % 23}" for n in range(23)]
    store.batch_upsert([document("d", parts=parts)])
    store.batch_upsert([document("d", parts=parts[::-1])])
    [stored] = store.iter_hashes()
    assert stored.chunk_hashes == tuple(map(digest, parts[::-1]))


def test_a_source_gives_its_own_alone(filled):
    assert [h.id for h in filled.iter_hashes("odd")] == [f"{n:02}" for n in range(1, 25, 2)]
    assert {h.source_id for h in filled.iter_hashes("even", batch_size=2)} == {"even"}
    assert list(filled.iter_hashes("neither")) == []


def test_an_empty_store_gives_nothing(store):
    assert list(store.iter_hashes()) == []


def test_rows_without_hashes_come_as_well(store, sql):
    sql("INSERT INTO embeddings (id, source_id, text) VALUES ('by hand', 's', 'text')")
    assert list(store.iter_hashes()) == [db.StoredHash("by hand", "s", b"", ())]


def test_one_batch_is_fetched_at_a_time_and_only_when_it_is_asked_for(fetched, database_url, redis_url):
    with db.connect(database_url, redis_url) as store:
        store.batch_upsert([document(f"{n:02}") for n in range(25)])
        hashes = store.iter_hashes(batch_size=10)
        assert fetched == []
        assert next(hashes).id == "00"
        assert fetched == [10]
        list(islice(hashes, 9))
        assert fetched == [10]
        assert len(list(hashes)) == 15
        assert fetched == [10, 10, 5]


def test_a_slow_caller_outlives_the_timeout_of_the_session(filled, database_url, redis_url):
    with db.connect(database_url, redis_url, idle_in_transaction_timeout_s=0.2) as slow:
        seen = []
        for stored in islice(slow.iter_hashes(batch_size=2), 5):
            time.sleep(0.3)  # longer than the timeout
            seen.append(stored.id)
    assert seen == ["00", "01", "02", "03", "04"]


def test_what_is_written_meanwhile_is_not_seen_and_may_be_written_by_the_caller(filled):
    seen = []
    for stored in filled.iter_hashes(batch_size=5):
        seen.append(stored.id)
        filled.batch_upsert([document(f"{stored.id}+")])
    assert seen == [f"{n:02}" for n in range(25)]
    assert len(list(filled.iter_hashes())) == 50


def test_a_scan_that_is_given_up_gives_its_connection_back(database_url, redis_url):
    with db.connect(database_url, redis_url, pool_max=1, pool_timeout_s=2) as store:
        store.batch_upsert([document(f"{n}") for n in range(10)])
        for _ in range(3):
            hashes = store.iter_hashes(batch_size=2)
            next(hashes)
            hashes.close()
        assert len(store.get(["1"])) == 1


def test_a_server_that_ends_the_scan_is_an_error_of_ours(filled, sql):
    hashes = filled.iter_hashes(batch_size=2)
    next(hashes)
    scanning = "query LIKE 'FETCH%%' AND datname = current_database()"
    ended = sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {scanning}")
    assert ended == [(True,)]
    with pytest.raises(db.UnavailableError):
        list(hashes)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"batch_size": 1.5}, {"source_id": ""}, {"source_id": 3}])
def test_bad_arguments_are_refused_at_once(store, bad):
    with pytest.raises(db.ValidationError, match=next(iter(bad))):
        store.iter_hashes(**bad)
