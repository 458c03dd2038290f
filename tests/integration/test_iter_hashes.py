"""iter_hashes: all stored hashes in order, one batch at a time, however slow the caller is."""

import logging
import subprocess
import sys
import time
from hashlib import sha256
from itertools import islice
from pathlib import Path

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


SCAN = """
import resource, sys
import db
def peak_kb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with db.connect(sys.argv[1], False) as store:
    assert sum(1 for _ in store.iter_hashes("few")) == 2000
    before = peak_kb()
    assert sum(1 for _ in store.iter_hashes("many")) == 60_000
    print(peak_kb() - before)
"""


def test_memory_is_that_of_a_batch_however_many_rows_there_are(database_url, sql):
    # 400 bytes a row and more: all of them at once would take 24 MB in libpq alone, a batch 0.4 MB.
    sql("""
        INSERT INTO embeddings (id, source_id, text, text_hash)
        SELECT repeat('x', 400) || source || n, source, 't', sha256(n::text::bytea)
        FROM (VALUES ('few', 2000), ('many', 60000)) AS given (source, rows), generate_series(1, rows) AS n
    """)
    root = Path(__file__).parents[2]
    scan = [sys.executable, "-c", SCAN, database_url]
    ended = subprocess.run(scan, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert ended.stderr == ""
    assert int(ended.stdout) < 8 * 1024


def test_a_long_scan_tells_the_log_how_far_it_is(store, sql, caplog):
    caplog.set_level(logging.INFO, logger="vectorkeep")
    sql("INSERT INTO embeddings (id, source_id, text) SELECT n, 's', 't' FROM generate_series(1, 100001) AS n")
    assert sum(1 for _ in store.iter_hashes("s", batch_size=10_000)) == 100_001
    told = [(r.rows, r.source_id) for r in caplog.records if r.getMessage() == "iter_hashes.progress"]
    assert told == [(50_000, "s"), (100_000, "s")]


def test_the_snapshot_goes_with_the_iterator(filled, sql):
    held = """
        SELECT count(*) FROM pg_stat_activity WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid()
        AND datname = current_database() AND backend_type = 'client backend'
    """
    hashes = filled.iter_hashes(batch_size=2)
    next(hashes)
    assert sql(held) == [(1,)]
    hashes.close()
    assert sql(held) == [(0,)]
