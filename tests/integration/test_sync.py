"""sync: one source becomes exactly what the items hold, and nothing is deleted on a doubt."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import psycopg
import pytest

import db
from db.sync import SourceSync
from db.transactions import run_write


class Counting:
    model_id, dimensions = "m", 8

    def __init__(self):
        self.asked = []

    def embed(self, texts):
        self.asked += texts
        return np.array([[len(t), *t.encode()[-3:].ljust(7, b"\1")] for t in texts], dtype=np.float32)


@pytest.fixture
def embedder():
    return Counting()


@pytest.fixture
def store(database_url, redis_url, embedder):
    with db.connect(database_url, redis_url, embedder=embedder) as opened:
        yield opened


def items(*names, text="text of {}"):
    return [db.Item(name, text.format(name)) for name in names]


def counts(result):
    names = ("inserted", "updated", "skipped", "deleted", "superseded", "failed", "embedded")
    return {name: getattr(result, name) for name in names if getattr(result, name)}


@pytest.fixture
def sources(sql):
    """`sources()` gives the ids of each source."""

    def read():
        return dict(sql("SELECT source_id, array_agg(id ORDER BY id) FROM embeddings GROUP BY 1"))

    return read


@contextmanager
def held_sync(store, source_id):
    """A sync that stands in the middle of its items until the block ends. Gives its future."""
    inside, go = threading.Event(), threading.Event()

    def slow():
        yield db.Item("held", "a text")
        inside.set()
        assert go.wait(30)

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(store.sync, slow(), source_id=source_id, batch_size=1)
        try:
            assert inside.wait(30), future.exception(1)
            yield future
        finally:
            go.set()
        future.result(30)


def test_added_changed_unchanged_and_deleted_are_each_counted(store, sources, embedder):
    assert counts(store.sync(items("a", "b", "c", "d"), source_id="s")) == {"inserted": 4, "embedded": 4}
    given = [*items("a"), *items("b", text="another text of {}"), db.Item("c", "text of c", {"n": 1}), *items("e", "f")]
    result = store.sync(given, source_id="s", batch_size=2)
    assert counts(result) == {"inserted": 2, "updated": 2, "skipped": 1, "deleted": 1, "embedded": 3}
    assert sources() == {"s": ["a", "b", "c", "e", "f"]}
    assert counts(store.sync(given, source_id="s")) == {"skipped": 5}


def test_other_sources_are_left_alone_and_what_they_hold_moves_where_it_is_given(store, sources, sql):
    store.sync(items("a", "b"), source_id="s")
    store.sync(items("x", "y"), source_id="t")
    result = store.sync(items("a", "x"), source_id="s")
    assert counts(result) == {"updated": 1, "skipped": 1, "deleted": 1}
    assert sources() == {"s": ["a", "x"], "t": ["y"]}
    assert sql("SELECT DISTINCT document_id, source_id FROM chunks ORDER BY 1") == [("a", "s"), ("x", "s"), ("y", "t")]


def test_the_items_own_source_is_not_looked_at(store, sources):
    store.sync([db.Item("a", "t", source_id="other"), {"id": "b", "text": "t", "source_id": "third"}], source_id="s")
    assert sources() == {"s": ["a", "b"]}


def test_an_iterator_that_raises_deletes_nothing_and_what_came_before_is_stored(store, sources):
    store.sync(items("a", "b", "c"), source_id="s")

    def broken():
        yield from items("a", "new", "newer")
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        store.sync(broken(), source_id="s", batch_size=2)
    assert sources() == {"s": ["a", "b", "c", "new"]}
    assert counts(store.sync(items("a"), source_id="s")) == {"skipped": 1, "deleted": 3}


def test_an_embedder_that_raises_deletes_nothing(store, sources):
    store.sync(items("a", "b"), source_id="s")

    def fail(texts):
        raise RuntimeError("quota")

    with pytest.raises(RuntimeError, match="quota"):
        store.sync(items("c"), source_id="s", embedder=db.CallableEmbedder(fail, "m", 8))
    assert sources() == {"s": ["a", "b"]}


@pytest.mark.parametrize("dry_run", [False, True])
def test_no_items_at_all_need_to_be_allowed(store, sources, dry_run):
    store.sync(items("a", "b"), source_id="s")
    store.sync(items("x"), source_id="t")
    with pytest.raises(db.ValidationError, match="no items for source 's'; give allow_empty=True"):
        store.sync(iter(()), source_id="s", dry_run=dry_run)
    assert sources() == {"s": ["a", "b"], "t": ["x"]}
    result = store.sync(iter(()), source_id="s", dry_run=dry_run, allow_empty=True)
    assert counts(result) == {"deleted": 2}
    assert sources() == ({"s": ["a", "b"], "t": ["x"]} if dry_run else {"t": ["x"]})


def test_items_that_are_not_valid_keep_what_is_stored_of_them(store, sources, sql):
    store.sync(items("a", "b", "c", "gone"), source_id="s")
    given = [
        db.Item("a", ""),
        {"id": "b", "text": "t", "metadata": {"n": float("nan")}},
        {"id": "c"},
        db.Item("new", "NUL \0"),
    ]
    result = store.sync(given, source_id="s")
    assert counts(result) == {"failed": 4, "deleted": 1}
    assert sources() == {"s": ["a", "b", "c"]}
    assert sql("SELECT text FROM embeddings ORDER BY id") == [("text of a",), ("text of b",), ("text of c",)]


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_the_caller_wants_kept_is_kept_and_only_that(store, sources, dry_run):
    store.sync(items("a", "b", "c", "d"), source_id="s")
    asked = []

    def keep(id_):
        asked.append(id_)
        return id_ in unread

    unread = []

    def given():
        yield from items("a")
        unread.append("c")

    assert counts(store.sync(given(), source_id="s", keep=keep, dry_run=dry_run)) == {"skipped": 1, "deleted": 2}
    assert asked == ["b", "c", "d"]
    assert sources() == {"s": ["a", "b", "c", "d"] if dry_run else ["a", "c"]}


def test_a_dry_run_changes_nothing_and_tells_what_the_real_one_then_does(store, sql, embedder):
    store.sync(items("a", "b", "c", "d"), source_id="s")
    store.sync(items("x"), source_id="t")
    everything = (
        "SELECT xmin::text, ctid::text, * FROM embeddings ORDER BY id",
        "SELECT xmin::text, ctid::text, * FROM chunks ORDER BY id",
        "SELECT id FROM write_log ORDER BY id",  # its rows are marked as delivered meanwhile
        "TABLE embedding_models",
    )
    before = [sql(statement) for statement in everything]
    embedder.asked.clear()
    given = [
        *items("a"),
        *items("b", text="new text of {}"),
        db.Item("c", "text of c", {"n": 1}),
        *items("x", "new", "newer"),
        *items("b", text="newest text of {}"),
        *items("new"),
        db.Item("bad", ""),
    ]
    for batch_size in (2, 100):
        told = store.sync(given, source_id="s", dry_run=True, batch_size=batch_size)
        assert (told.embedded, told.cache_hits, embedder.asked) == (0, 0, [])
        expected = {"inserted": 2, "updated": 3, "skipped": 1, "deleted": 1, "superseded": 2, "failed": 1}
        assert counts(told) == expected
    assert [sql(statement) for statement in everything] == before
    done = counts(store.sync(given, source_id="s", batch_size=2))
    done.pop("embedded")
    assert done == expected


def test_a_dry_run_on_a_fresh_store_registers_no_model(database_url, redis_url, sql):
    with db.connect(database_url, redis_url) as store:
        told = store.sync(items("a"), source_id="s", dry_run=True, embedder=Counting())
    assert counts(told) == {"inserted": 1}
    assert sql("SELECT count(*) FROM embedding_models") == [(0,)]


def test_a_second_sync_of_the_source_is_told_who_runs_the_first(store, sources):
    store.sync(items("a"), source_id="s")
    with held_sync(store, "s"):
        with pytest.raises(db.BusyError, match=r"sync of source 's' is locked by process \d+ \(vectorkeep maintenance"):
            store.sync(items("b"), source_id="s")
        assert counts(store.sync(items("x"), source_id="another")) == {"inserted": 1, "embedded": 1}
        assert sources() == {"s": ["a", "held"], "another": ["x"]}
    assert sources() == {"s": ["held"], "another": ["x"]}


def test_a_second_sync_waits_where_it_may(store, sources, sql, until):
    with ThreadPoolExecutor(1) as thread:
        with held_sync(store, "s"):
            second = thread.submit(store.sync, items("b"), source_id="s", wait_s=30)
            polling = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_try_advisory_lock%%'"
            until(lambda: sql(polling) == [(1,)])
            assert not second.done()
        assert counts(second.result(30)) == {"inserted": 1, "deleted": 1, "embedded": 1}
    assert sources() == {"s": ["b"]}


def test_the_lock_goes_with_a_sync_that_failed(store):
    with pytest.raises(db.ValidationError):
        store.sync((), source_id="s")
    assert counts(store.sync(items("a"), source_id="s")) == {"inserted": 1, "embedded": 1}


def test_a_document_that_moved_to_another_source_meanwhile_is_not_deleted(store, sources):
    store.sync(items("a", "moved", "gone"), source_id="s")

    def meanwhile():
        yield from items("a")
        store.embed_batch([db.Item("moved", "text of moved", source_id="t")])

    assert counts(store.sync(meanwhile(), source_id="s")) == {"skipped": 1, "deleted": 1}
    assert sources() == {"s": ["a"], "t": ["moved"]}


def test_a_document_that_is_being_moved_while_it_would_be_deleted_stays(store, sources, sql, admin, until):
    store.sync(items("a", "gone", "moved"), source_id="s")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with ThreadPoolExecutor(1) as thread:
        with admin.transaction():
            admin.execute("UPDATE embeddings SET source_id = 't' WHERE id = 'moved'")
            running = thread.submit(store.sync, items("a"), source_id="s")
            until(lambda: sql(waiting) == [(1,)])
        assert counts(running.result(30)) == {"skipped": 1, "deleted": 1}
    assert sources() == {"s": ["a"], "t": ["moved"]}


def test_ids_seen_are_held_in_memory_some_thousands_at_a_time(store, sql, monkeypatch):
    sql("""
        INSERT INTO embeddings (id, source_id, text)
        SELECT 'id ' || n, 's', 'text' FROM generate_series(0, 25002) AS n
    """)
    most = 0
    noted = SourceSync._flush

    def flush(self, connection):
        nonlocal most
        most = max(most, len(self._buffer))
        noted(self, connection)

    monkeypatch.setattr(SourceSync, "_flush", flush)
    given = (db.Item(f"id {n}", "text") for n in range(25_000))
    result = store.sync(given, source_id="s", dry_run=True, batch_size=5000)
    assert counts(result) == {"updated": 25_000, "deleted": 3}
    assert most == 10_000


def test_many_documents_are_deleted_some_thousands_in_a_transaction(store, sources, sql, monkeypatch):
    sql("""
        INSERT INTO embeddings (id, source_id, text)
        SELECT 'id ' || n, 's', 'text' FROM generate_series(1, 20500) AS n
    """)
    deleted = []

    def noted(database, work, **kwargs):
        deleted.append(run_write(database, work, **kwargs))
        return deleted[-1]

    monkeypatch.setattr("db.sync.run_write", noted)
    assert counts(store.sync(items("a"), source_id="s")) == {"inserted": 1, "deleted": 20_500, "embedded": 1}
    assert deleted == [10_000, 10_000, 500]
    assert sources() == {"s": ["a"]}


def test_what_a_search_found_before_is_not_found_after(store):
    store.sync(items("a", "b"), source_id="s")
    assert {h.id for h in store.search("text of a", k=5, source_id="s")} == {"a", "b"}
    store.sync(items("b"), source_id="s")
    assert {h.id for h in store.search("text of a", k=5, source_id="s")} == {"b"}


@pytest.mark.parametrize(
    "nameless",
    [{"text": "hello"}, {"id": 5, "text": "t"}, {"key": "a", "text": "t"}, {"id": "", "text": "t"}, "a", None],
    ids=["no id", "number", "other key", "empty", "string", "nothing"],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_items_that_do_not_say_which_document_they_are_delete_nothing(store, sources, nameless, dry_run):
    store.sync(items("a", "b"), source_id="s")
    with pytest.raises(db.ValidationError, match="1 items of source 's' have no id that can be used"):
        store.sync([*items("c"), nameless], source_id="s", dry_run=dry_run)
    assert sources() == {"s": ["a", "b"] if dry_run else ["a", "b", "c"]}
    with pytest.raises(db.ValidationError, match="no id that can be used"):
        store.sync([nameless], source_id="s", allow_empty=True)
    assert "a" in sources()["s"]


FOREIGN = psycopg.errors.UniqueViolation("of the caller's own database")


def fail(*_args):
    raise FOREIGN


def failing():
    yield {"id": "a", "text": "t"}
    fail()


def loads(store):
    with store.bulk_load():
        fail()


ITEM = {"id": "a", "text": "t"}


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.batch_upsert(failing()),
        lambda store: store.embed_batch(failing()),
        lambda store: store.embed_batch([{"id": "c", "text": "new"}], embedder=db.CallableEmbedder(fail, "m", 8)),
        lambda store: store.batch_upsert([ITEM], on_progress=fail),
        lambda store: store.sync(failing(), source_id="s"),
        lambda store: store.sync([{"id": "b", "text": "t"}], source_id="s", keep=fail),
        loads,
    ],
)
def test_errors_of_the_callers_own_driver_pass_through(embedding_store, call):
    embedding_store.sync([ITEM], source_id="s")
    with pytest.raises(psycopg.errors.UniqueViolation) as raised:
        call(embedding_store)
    assert raised.value is FOREIGN
