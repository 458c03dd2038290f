"""Bulk loads: rows first, indexes after; no index in use is lost, no search is silently empty, no crash is for good."""

import itertools
import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psycopg
import pytest

import db
from db import bulk_load, vector_index
from db.locks import Purpose, advisory_lock

MANY = bulk_load.AUTO_MIN_INPUTS
INDEXES = {"embeddings_vector_idx": True, "chunks_vector_idx": True}


def documents(count, prefix="d"):
    vectors = np.random.default_rng(len(prefix) + count).standard_normal((count, 8)).astype(np.float32)
    return [{"id": f"{prefix}{n}", "text": f"{prefix} {n}", "embedding": v} for n, v in enumerate(vectors)]


def with_chunks(given):
    return [{**d, "chunks": [{"text": d["text"], "embedding": d["embedding"]}]} for d in given]


@pytest.fixture
def indexes(sql):
    """`indexes()` gives the vector indexes that there are, and whether each is valid."""

    def read():
        return dict(
            sql("""
                SELECT indexrelid::regclass::text, indisvalid FROM pg_index
                WHERE indexrelid::regclass::text LIKE '%%\\_vector\\_idx'
            """)
        )

    return read


@pytest.fixture
def registered(store, indexes):
    """A store whose model is registered, its indexes made, without any row."""
    store.batch_upsert([*documents(1)])
    store.delete(["d0"])
    assert indexes() == INDEXES
    return store


def index_oids(sql):
    return sql("SELECT relname, oid, relfilenode FROM pg_class WHERE relname LIKE '%%\\_vector\\_idx' ORDER BY 1")


def assert_finds(store, given, level="documents"):
    """Every document is its own nearest, through the index or not."""
    for document in given[:: max(1, len(given) // 7)]:
        [hit] = store.search(document["embedding"], k=1, level=level)
        assert hit.document_id == document["id"]


@pytest.mark.every_server
def test_into_an_empty_store_rows_come_first_and_searches_meanwhile_see_all(registered, indexes, sql):
    given, during = documents(MANY + 500), []

    def look(done, total):
        found = registered.search(given[done - 1]["embedding"], k=done)
        during.append((indexes(), found.exact, found.complete, len(found), found[0].id == given[done - 1]["id"]))

    result = registered.batch_upsert(given, batch_size=500, on_progress=look)
    assert (result.inserted, result.failed) == (MANY + 500, 0)
    assert during == [({}, True, True, done, True) for done in (500, 1000, 1500)]
    assert indexes() == INDEXES
    assert_finds(registered, given)
    assert not registered.search(given[0]["embedding"], k=1).exact
    built = sql("SELECT index_name, rows FROM index_builds WHERE rows > 0")
    assert built == [("embeddings_vector_idx", MANY + 500)]


def test_the_first_call_ever_loads_and_then_builds(store, indexes):
    given, during = with_chunks(documents(MANY)), []
    store.batch_upsert(given, batch_size=500, on_progress=lambda *_: during.append(indexes()))
    assert during == [{}, {}]
    assert indexes() == INDEXES
    assert_finds(store, given)
    assert_finds(store, given, level="chunks")


def test_an_iterable_of_unknown_length_is_loaded_too(registered, indexes):
    during = []
    registered.batch_upsert(iter(documents(20)), on_progress=lambda *_: during.append(indexes()))
    assert during == [{}]
    assert indexes() == INDEXES


def test_embed_batch_loads_so_too(registered, indexes):
    def embed(texts):
        during.append(indexes())
        return np.random.default_rng(1).standard_normal((len(texts), 8))

    during = []
    items = [db.Item(f"i{n}", f"text {n}") for n in range(MANY)]
    registered.embed_batch(items, embedder=db.CallableEmbedder(embed, "test-model", 8))
    assert during == [{}]
    assert indexes() == INDEXES


def test_a_model_registered_while_another_loads_gets_its_indexes_from_the_load(database_url, indexes):
    with db.connect(database_url, False) as loader, db.connect(database_url, False) as other:
        with loader.bulk_load():
            assert other.batch_upsert(documents(3)).inserted == 3
            assert indexes() == {}
            loader.batch_upsert(documents(2, "more"))
        assert indexes() == INDEXES


def test_few_rows_are_written_beside_the_index(registered, indexes):
    during = []
    registered.batch_upsert(documents(MANY - 1), on_progress=lambda *_: during.append(indexes()))
    assert during == [INDEXES]


def test_an_index_in_use_is_never_dropped_by_itself(registered, indexes, sql):
    registered.batch_upsert(with_chunks(documents(1)))
    before, during = index_oids(sql), []
    registered.batch_upsert(documents(MANY, "new"), on_progress=lambda *_: during.append(indexes()))
    assert during == [INDEXES]
    assert index_oids(sql) == before


@contextmanager
def index_build_held(url):
    with psycopg.connect(url, autocommit=True) as builder, advisory_lock(builder, Purpose.INDEX_BUILD, wait_s=0):
        yield


def test_no_index_is_dropped_or_waited_for_where_one_table_stays_empty(registered, indexes, sql, database_url):
    registered.batch_upsert(documents(1))
    before, builds, during = index_oids(sql), sql("SELECT count(*) FROM index_builds"), []
    with index_build_held(database_url):
        told = registered.batch_upsert(documents(MANY, "n"), on_progress=lambda *_: during.append(indexes()))
    assert (told.inserted, during) == (MANY, [INDEXES])
    assert index_oids(sql) == before
    assert sql("SELECT count(*) FROM index_builds") == builds


def test_where_another_process_builds_an_automatic_load_returns_and_warns(
    registered, indexes, database_url, monkeypatch, caplog
):
    monkeypatch.setattr(bulk_load, "_AUTO_BUILDER_WAIT_S", 0.1)
    with index_build_held(database_url):
        assert registered.batch_upsert(documents(MANY)).inserted == MANY
    [told] = [r for r in caplog.records if r.msg == "vector_index.missing"]
    assert (told.levelname, told.indexes, told.remedy) == ("WARNING", list(INDEXES), "run 'vectorkeep maintain'")
    assert "index_build is locked by process" in told.reason
    assert indexes() == {}
    registered.maintain()
    assert indexes() == INDEXES


@pytest.mark.parametrize("bulk", ["auto", True])
def test_a_load_whose_idle_session_is_ended_loses_nothing_and_builds_through_another(
    registered, indexes, sql, bulk, caplog
):
    def given():
        yield from documents(MANY)
        idle = "application_name = 'vectorkeep maintenance' AND datname = current_database()"
        assert sql(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {idle}") == [(True,)]
        yield from documents(10, "late")

    assert registered.batch_upsert(given(), bulk=bulk).inserted == MANY + 10
    assert "bulk_load.session_lost" in {record.msg for record in caplog.records}
    assert indexes() == INDEXES


def endless():
    for n in itertools.count():
        yield {"id": f"d{n}", "text": f"text {n}", "embedding": np.full(8, n + 1.0)}


@pytest.mark.parametrize("bound", [("AUTO_MAX_INPUTS", 25), ("AUTO_MAX_S", 0)])
def test_an_automatic_load_ends_at_a_bound_and_goes_on_beside_the_index(
    registered, indexes, monkeypatch, bound, caplog
):
    monkeypatch.setattr(bulk_load, *bound)
    caplog.set_level(logging.INFO, logger="vectorkeep")
    during = []
    registered.batch_upsert(
        itertools.islice(endless(), 50), batch_size=10, on_progress=lambda *_: during.append(indexes())
    )
    loaded = 2 if bound[0] == "AUTO_MAX_INPUTS" else 0
    assert during == [{}] * loaded + [INDEXES] * (5 - loaded)
    assert caplog.messages.count("bulk_load.ended_early") == 1
    assert registered.get_statistics().documents == 50


def test_a_load_that_another_thread_ends_is_waited_for(registered, indexes, database_url, sql, until, monkeypatch):
    """Who began it may have no more to bring, while the other builds over the connection of the load."""
    monkeypatch.setattr(bulk_load, "AUTO_MAX_INPUTS", 15)
    end = threading.Event()

    def given():
        yield from itertools.islice(endless(), 10)
        end.wait(30)

    with ThreadPoolExecutor(2) as threads:
        owner = threads.submit(registered.batch_upsert, given(), batch_size=10)
        until(lambda: sql("SELECT count(*) FROM embeddings") == [(10,)])
        with psycopg.connect(database_url) as writer:
            writer.execute("UPDATE embeddings SET text = 'u' WHERE id = 'd0'")  # the build waits for it
            other = threads.submit(registered.batch_upsert, documents(20, "other"))
            until(lambda: sql("SELECT pid FROM pg_stat_progress_create_index WHERE datname = current_database()"))
            end.set()
            assert not wait([owner], timeout=0.5).done
        assert (owner.result().inserted, other.result().inserted) == (10, 20)
    assert indexes() == INDEXES


def test_several_calls_and_embed_batch_end_at_the_bound_too(registered, indexes, monkeypatch):
    monkeypatch.setattr(bulk_load, "AUTO_MAX_INPUTS", 25)
    with registered.bulk_load(only_into_empty=True):
        found = []
        for prefix in "abcd":
            items = [db.Item(f"{prefix}{n}", f"{prefix} {n}") for n in range(10)]
            registered.embed_batch(items, embedder=EMBEDDER)
            found.append(indexes())
        assert found == [{}, {}, INDEXES, INDEXES]


def test_a_load_of_a_known_number_is_not_cut_short(registered, indexes, monkeypatch):
    monkeypatch.setattr(bulk_load, "AUTO_MAX_INPUTS", 10)
    during = []
    registered.batch_upsert(documents(MANY), batch_size=500, on_progress=lambda *_: during.append(indexes()))
    assert during == [{}, {}]


def test_a_table_that_was_filled_just_before_the_load_keeps_its_index(
    registered, indexes, sql, database_url, redis_url, monkeypatch
):
    look, oids, during = bulk_load._loadable_tables, [], []

    def overtaken(connection, inputs):
        found = look(connection, inputs)
        if not oids:  # between this look and the lock another loader does all of its work
            oids.append(None)
            with db.connect(database_url, redis_url) as other:
                other.batch_upsert(with_chunks(documents(MANY, "other")))
            oids[0] = index_oids(sql)
        return found

    monkeypatch.setattr(bulk_load, "_loadable_tables", overtaken)
    registered.batch_upsert(documents(MANY), on_progress=lambda *_: during.append(indexes()))
    assert during == [INDEXES]
    assert index_oids(sql) == oids[0]


def test_where_one_index_cannot_be_dropped_the_other_is_there_again(registered, indexes, admin, monkeypatch):
    monkeypatch.setattr(vector_index, "_LOCK_TIMEOUT_MS", 200)
    with admin.transaction():
        admin.execute("LOCK TABLE chunks IN ACCESS SHARE MODE")
        result = registered.batch_upsert(documents(MANY))
    assert result.inserted == MANY
    assert indexes() == INDEXES


def test_an_explicit_load_drops_indexes_in_use_and_builds_them_again(registered, indexes, sql):
    first = with_chunks(documents(1200))
    registered.batch_upsert(first)
    before = index_oids(sql)
    with registered.bulk_load():
        assert indexes() == {}
        found = registered.search(first[7]["embedding"], k=3)
        assert (found[0].id, found.exact, found.complete, len(found)) == ("d7", True, True, 3)
        registered.batch_upsert(documents(3, "few"))
        assert indexes() == {}
    assert indexes() == INDEXES
    assert not {row[2] for row in before} & {row[2] for row in index_oids(sql)}
    assert_finds(registered, first)


def unit_vectors(texts):
    return np.random.default_rng(1).standard_normal((len(texts), 8))


EMBEDDER = db.CallableEmbedder(unit_vectors, "test-model", 8)
CALLS = {
    "batch_upsert": lambda store, count, **kw: store.batch_upsert(documents(count, "new"), **kw),
    "embed_batch": lambda store, count, **kw: store.embed_batch(
        [db.Item(f"i{n}", f"text {n}") for n in range(count)], embedder=EMBEDDER, **kw
    ),
    "sync": lambda store, count, **kw: store.sync(
        [db.Item(f"i{n}", f"text {n}") for n in range(count)], source_id="s", embedder=EMBEDDER, **kw
    ),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
def test_a_caller_who_asks_loads_without_the_indexes_in_use(registered, indexes, sql, call):
    registered.batch_upsert(with_chunks(documents(3)))
    before, during = index_oids(sql), []
    result = call(registered, 5, bulk=True, on_progress=lambda *_: during.append(indexes()))
    assert (result.inserted, during) == (5, [{}])
    assert indexes() == INDEXES
    assert not {row[2] for row in before} & {row[2] for row in index_oids(sql)}


@each_call
def test_a_caller_who_refuses_keeps_even_unused_indexes(registered, indexes, sql, call):
    before, during = index_oids(sql), []
    call(registered, MANY, bulk=False, on_progress=lambda *_: during.append(indexes()))
    assert during == [INDEXES]
    assert index_oids(sql) == before


@each_call
@pytest.mark.parametrize("bad", [None, "yes", 1])
def test_another_bulk_is_refused(registered, call, bad):
    with pytest.raises(db.ValidationError, match=f"bulk is {bad!r}; expected True, False or 'auto'"):
        call(registered, 1, bulk=bad)


def test_who_asks_while_another_loads_is_told_and_nothing_is_written(registered, database_url, redis_url, sql):
    with db.connect(database_url, redis_url) as other, registered.bulk_load():
        with pytest.raises(db.BusyError, match="bulk_load is locked by process"):
            other.batch_upsert(documents(1), bulk=True)
        assert sql("SELECT count(*) FROM embeddings") == [(0,)]
        assert other.batch_upsert(documents(1), bulk=False).inserted == 1


def test_a_sync_that_has_to_give_way_drops_no_index(registered, sql, indexes):
    before = index_oids(sql)

    def held():
        yield db.Item("a", "text")
        with pytest.raises(db.BusyError, match="sync of source 's'"):
            CALLS["sync"](registered, MANY, bulk=True)
        assert index_oids(sql) == before

    registered.sync(held(), source_id="s", embedder=EMBEDDER, bulk=False)
    assert index_oids(sql) == before


@pytest.mark.parametrize("bulk", [True, "auto"])
def test_no_index_is_dropped_while_ingestion_is_paused(registered, sql, bulk):
    before = index_oids(sql)
    registered.pause_ingestion("moving the disk")
    with pytest.raises(db.PausedError, match="moving the disk"):
        registered.batch_upsert(documents(MANY), bulk=bulk)
    assert index_oids(sql) == before
    registered.resume_ingestion()
    registered.batch_upsert(documents(MANY), bulk=bulk)
    assert index_oids(sql) != before


def test_a_load_waits_for_the_end_of_a_pause_where_writes_do(
    registered, indexes, database_url, redis_url, caplog, until
):
    caplog.set_level(logging.INFO, logger="vectorkeep")

    def load(store):
        with store.bulk_load():
            return indexes()

    registered.pause_ingestion("moving the disk")
    with db.connect(database_url, redis_url, on_pause="wait") as patient, ThreadPoolExecutor(1) as thread:
        during = thread.submit(load, patient)
        until(lambda: "write.waits_for_resume" in caplog.messages)
        assert indexes() == INDEXES
        registered.resume_ingestion()
        assert during.result(30) == {}


def test_several_calls_into_an_empty_store_are_one_load(registered, indexes, sql):
    with registered.bulk_load(only_into_empty=True):
        for prefix in "abc":
            registered.batch_upsert(documents(10, prefix))
            assert indexes() == {}
    assert indexes() == INDEXES
    before = index_oids(sql)
    with registered.bulk_load(only_into_empty=True):
        assert indexes() == INDEXES
    assert index_oids(sql) == before


@pytest.fixture
def advice(caplog):
    """`advice()` gives the fields of each event that says a bulk load would be faster, since it was last asked."""
    caplog.set_level(logging.INFO, logger="vectorkeep")

    def read():
        told = [r for r in caplog.records if r.getMessage() == "bulk_load.would_be_faster"]
        found = [(r.rows, r.stored, r.seconds_beside_index, round(r.seconds_bulk_load, 3)) for r in told]
        caplog.clear()
        return found

    return read


def test_where_an_index_in_use_cost_much_the_log_says_what_a_bulk_load_would(registered, advice):
    registered.batch_upsert(documents(10))
    registered.batch_upsert(iter(documents(MANY, "new")))
    assert advice() == [(MANY, MANY + 10, 2.0, 0.202)]


def test_nothing_is_advised_where_nothing_is_to_be_gained(registered, advice, sql):
    registered.batch_upsert(documents(MANY, "first"))  # into an empty store: it was a bulk load
    assert advice() == []
    sql("UPDATE index_builds SET duration_ms = 200")
    registered.batch_upsert(documents(MANY, "first"))  # unchanged
    registered.batch_upsert(documents(MANY - 1, "few"))
    registered.batch_upsert(documents(MANY, "refused"), bulk=False)
    registered.batch_upsert(documents(MANY, "asked"), bulk=True)
    assert advice() == []
    sql("DROP INDEX embeddings_vector_idx")
    registered.batch_upsert(iter(documents(MANY, "no index")))
    assert advice() == []


def test_the_prediction_uses_the_measured_rate_of_the_last_large_build(registered, advice, sql):
    registered.batch_upsert(documents(1))
    for rows, seconds in ((MANY, 0.1), (MANY, 1), (MANY - 1, 0.1)):  # the last but one counts: 1,000 rows a second
        sql(
            "INSERT INTO index_builds (index_name, table_name, rows, size_bytes, duration_ms)"
            " VALUES ('embeddings_vector_idx', 'embeddings', %s, 1, %s)",
            rows,
            seconds * 1000,
        )
    registered.batch_upsert(documents(MANY - 1, "few"), bulk=False)
    registered.batch_upsert(documents(MANY, "a"))  # 2 s beside the index against 2 s: not clearly
    assert advice() == []
    registered.batch_upsert(documents(2 * MANY, "b"))  # 4 s against 4 s
    assert advice() == []
    registered.delete([f"few{n}" for n in range(MANY - 1)] + [f"a{n}" for n in range(MANY)])
    registered.batch_upsert(documents(2 * MANY, "c"))
    assert advice() == []
    registered.delete([f"{prefix}{n}" for n in range(2 * MANY) for prefix in "bc"])
    sql("UPDATE index_builds SET duration_ms = 800 WHERE duration_ms = 1000")
    registered.batch_upsert(documents(MANY, "e"))
    assert advice() == [(MANY, MANY + 1, 2.0, 0.801)]


def test_a_load_that_raises_builds_all_the_same(registered, indexes):
    def load():
        with registered.bulk_load():
            registered.batch_upsert(documents(10))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        load()
    assert indexes() == INDEXES
    assert len(registered.get([f"d{n}" for n in range(10)])) == 10


def test_inputs_that_raise_half_way_build_all_the_same(registered, indexes):
    def broken():
        yield from documents(600)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        registered.batch_upsert(broken(), batch_size=500)
    assert indexes() == INDEXES
    assert len(registered.get([f"d{n}" for n in range(600)])) == 500


def test_a_second_load_is_told_who_runs_the_first_and_large_writes_go_on(registered, indexes, database_url, redis_url):
    with db.connect(database_url, redis_url) as other, registered.bulk_load():
        with pytest.raises(db.BusyError, match=r"bulk_load is locked by process \d+"), other.bulk_load():
            pytest.fail("two loads at once")
        assert indexes() == {}
        assert other.batch_upsert(documents(MANY)).inserted == MANY
        assert indexes() == {}
    assert indexes() == INDEXES
    assert_finds(registered, documents(MANY))


def test_workers_that_fill_an_empty_store_at_once_lose_nothing(indexes, sql, database_url, redis_url):
    everything = documents(1500)
    start = threading.Barrier(3)

    def work(number):
        mine = everything[number * 250 : number * 250 + 1000]
        with db.connect(database_url, redis_url, model_id="test-model", dimensions=8) as store:
            start.wait(30)
            return store.batch_upsert(mine if number != 1 else mine[::-1], batch_size=100)

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(work, range(3)))
    assert [r.errors for r in results] == [[], [], []]
    assert sum(r.inserted for r in results) == 1500
    assert sum(r.inserted + r.unchanged for r in results) == 3000
    assert sql("SELECT count(*), count(embedding) FROM embeddings") == [(1500, 1500)]
    assert indexes() == INDEXES
    with db.connect(database_url, redis_url) as store:
        assert_finds(store, everything)


HELD_LOADS = """
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 5
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
LOADER = """
import sys
sys.path.insert(0, sys.argv[3])
import db, test_bulk_load
store = db.connect(sys.argv[1], sys.argv[2], model_id="test-model", dimensions=8)
def told(done, total):
    print("loaded", flush=True)
    sys.stdin.read()
store.batch_upsert(test_bulk_load.documents(1200), batch_size=1200, on_progress=told)
"""


@pytest.fixture
def left_by_a_killed_loader(registered, database_url, redis_url, sql, until, indexes):
    """A store whose loader was killed after its rows were written, before it built the indexes."""
    root = Path(__file__).parents[2]
    loader = subprocess.Popen(
        [sys.executable, "-c", LOADER, database_url, redis_url, str(Path(__file__).parent)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert loader.stdout.readline() == "loaded\n"
    finally:
        loader.kill()
        loader.communicate(timeout=30)
    until(lambda: sql(HELD_LOADS) == [(0,)])
    assert indexes() == {}
    return registered


def test_a_killed_loader_leaves_a_store_that_is_searched_exactly(left_by_a_killed_loader):
    given = documents(1200)
    found = left_by_a_killed_loader.search(given[3]["embedding"], k=5)
    assert (found[0].id, found.exact, found.complete, len(found)) == ("d3", True, True, 5)


def test_the_next_large_write_finishes_what_a_killed_loader_left(left_by_a_killed_loader, indexes):
    left_by_a_killed_loader.batch_upsert(documents(1, "one"))
    assert indexes() == {}
    left_by_a_killed_loader.batch_upsert(documents(1200))
    assert indexes() == INDEXES
    assert_finds(left_by_a_killed_loader, documents(1200))


def test_maintain_finishes_what_a_killed_loader_left(left_by_a_killed_loader, indexes):
    assert left_by_a_killed_loader.maintain().index_rebuilt
    assert indexes() == INDEXES


@pytest.fixture
def warned(caplog, database_url, redis_url):
    """`warned()` opens the store, and gives what it warned of."""

    def read(url=database_url):
        caplog.clear()
        with db.connect(url, redis_url):
            return [(r.levelname, r.indexes, r.remedy) for r in caplog.records if r.msg == "vector_index.missing"]

    return read


def test_the_next_open_warns_of_what_a_killed_loader_left_and_names_the_remedy(left_by_a_killed_loader, warned):
    assert warned() == [("WARNING", list(INDEXES), "run 'vectorkeep maintain'")]
    left_by_a_killed_loader.maintain()
    assert warned() == []


def test_an_open_during_a_load_does_not_warn(registered, warned):
    with registered.bulk_load():
        assert warned() == []


def test_an_invalid_index_is_warned_of(registered, warned, sql):
    sql("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'chunks_vector_idx'::regclass")
    assert warned() == [("WARNING", ["chunks_vector_idx"], "run 'vectorkeep maintain'")]


def test_a_role_that_could_not_build_is_not_warned(left_by_a_killed_loader, plain_url, warned):
    assert warned(plain_url) == []


def test_a_store_without_a_model_or_with_one_too_long_to_index_does_not_warn(store, warned, database_url):
    assert warned() == []
    with db.connect(database_url, False, model_id="test-model", dimensions=4001) as long:
        long.batch_upsert([{"id": "a", "text": "t", "embedding": np.ones(4001)}])
    assert warned() == []


def test_an_invalid_index_is_built_anew(registered, indexes, sql):
    registered.batch_upsert(documents(1200))
    sql("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embeddings_vector_idx'::regclass")
    assert registered.search(documents(1200)[0]["embedding"], k=1).exact
    registered.batch_upsert(documents(MANY, "more"))
    assert indexes() == INDEXES


@pytest.fixture
def plain_url(registered, url_as, sql):
    """The database, as a role that may write and read it and owns nothing."""
    [(role,)] = sql("SELECT current_database() || '_plain'")
    sql(f"CREATE ROLE {role} LOGIN PASSWORD 'plain'")
    for kind in ("TABLES", "SEQUENCES"):
        sql(f"GRANT ALL ON ALL {kind} IN SCHEMA public TO {role}")
    sql(f"GRANT EXECUTE ON FUNCTION pg_control_system() TO {role}")
    yield url_as(role, "plain")
    sql(f"DROP OWNED BY {role}")
    sql(f"DROP ROLE {role}")


def test_a_role_that_may_not_build_just_writes(plain_url, indexes, sql):
    before = index_oids(sql)
    with db.connect(plain_url, False) as store:
        result = store.batch_upsert(documents(MANY))
        assert (result.inserted, result.failed) == (MANY, 0)
        with pytest.raises(db.PermissionDeniedError), store.bulk_load():
            pytest.fail("it may not drop indexes")
    assert index_oids(sql) == before
    assert indexes() == INDEXES


def test_a_build_that_outgrows_its_memory_is_reported_with_the_figure_that_fits(registered, sql, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="vectorkeep")
    monkeypatch.setattr(vector_index, "_MAX_BUILD_MB", 1)
    [(database,)] = sql("SELECT current_database()")
    sql(f"ALTER DATABASE {database} SET maintenance_work_mem = '1MB'")
    registered.batch_upsert(documents(3000), batch_size=3000)
    [told] = [r for r in caplog.records if r.getMessage() == "vector_index.build_outgrew_memory"]
    assert "no longer fits into maintenance_work_mem" in told.notice
    assert told.maintenance_work_mem_needed_mb == vector_index.build_memory_mb(registered.model, 3000) == 66


def test_a_build_gets_the_memory_it_needs(registered, sql, caplog):
    caplog.set_level(logging.INFO, logger="vectorkeep")
    [(database,)] = sql("SELECT current_database()")
    sql(f"ALTER DATABASE {database} SET maintenance_work_mem = '1MB'")
    registered.batch_upsert(documents(3000), batch_size=3000)
    assert not [r for r in caplog.records if "memory" in r.getMessage()]
