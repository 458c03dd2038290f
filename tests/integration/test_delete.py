"""Deleting documents and sources: all of it in one transaction, and every place it was is logged."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from psycopg import errors as pg

import db
from db import DeleteResult, ValidationError

EMBEDDER = db.CallableEmbedder(lambda texts: np.ones((len(texts), 8)), "test-model", 8)
CHUNKS = [{"text": "one"}, {"text": "two"}]


@pytest.fixture
def filled(store):
    """Two documents of two chunks each in source `s`, one of them in a workspace, and one in `other`."""
    store.batch_upsert(
        [
            {"id": "a", "text": "a", "source_id": "s", "chunks": CHUNKS, "metadata": {"workspace": "w"}},
            {"id": "b", "text": "b", "source_id": "s", "chunks": CHUNKS},
            {"id": "c", "text": "c", "source_id": "other", "chunks": CHUNKS},
        ]
    )
    return store


def last_tags(sql):
    return set(sql("SELECT tags FROM write_log ORDER BY id DESC LIMIT 1")[0][0])


def test_deleting_by_id_removes_the_chunks_too(filled, sql):
    assert filled.delete(["a", "c", "a", "missing"]) == DeleteResult(2, 4, 0)
    assert [d.id for d in filled.get(["a", "b", "c"])] == ["b"]
    assert sql("SELECT DISTINCT document_id FROM chunks") == [("b",)]
    assert last_tags(sql) == {"store", "source:s", "source:other", "workspace:w"}


def test_deleting_nothing_is_no_write(filled, sql):
    before = sql("SELECT count(*) FROM write_log")
    assert filled.delete([]) == filled.delete(["missing"]) == DeleteResult(0, 0, 0)
    assert filled.delete_by_source_id("missing") == DeleteResult(0, 0, 0)
    assert filled.delete_by_source_id("missing", cascade=False) == DeleteResult(0, 0, 0)
    assert sql("SELECT count(*) FROM write_log") == before


def test_a_source_is_deleted_whole_and_no_other(filled, sql):
    assert filled.delete_by_source_id("s") == DeleteResult(2, 4, 0)
    assert sql("SELECT id FROM embeddings") == [("c",)]
    assert sql("SELECT DISTINCT document_id FROM chunks") == [("c",)]
    assert last_tags(sql) == {"store", "source:s", "workspace:w"}


def test_without_cascade_chunks_stay_and_remember_their_document(filled, sql):
    assert filled.delete_by_source_id("s", cascade=False) == DeleteResult(2, 0, 4)
    assert sql("SELECT id, origin_id, source_id, workspace FROM chunks WHERE document_id IS NULL ORDER BY id") == [
        ("a#0", "a", "s", "w"),
        ("a#1", "a", "s", "w"),
        ("b#0", "b", "s", None),
        ("b#1", "b", "s", None),
    ]
    assert last_tags(sql) == {"store", "source:s", "workspace:w"}


def test_with_cascade_the_sources_detached_chunks_go_too(filled, sql):
    filled.delete_by_source_id("s", cascade=False)
    filled.batch_upsert([{"id": "new", "text": "n", "source_id": "s", "chunks": CHUNKS[:1]}])
    assert filled.delete_by_source_id("s") == DeleteResult(1, 5, 0)
    assert sql("SELECT DISTINCT document_id FROM chunks") == [("c",)]
    assert last_tags(sql) == {"store", "source:s", "workspace:w"}


def test_detached_chunks_alone_are_deleted_with_their_source(filled, sql):
    filled.delete_by_source_id("s", cascade=False)
    assert filled.delete_by_source_id("s") == DeleteResult(0, 4, 0)
    assert last_tags(sql) == {"store", "source:s", "workspace:w"}


@pytest.mark.parametrize("cascade", [True, False])
def test_a_deletion_that_fails_half_way_deletes_nothing(filled, sql, cascade):
    sql("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not %', OLD.id; END $$")
    sql("CREATE TRIGGER refuse BEFORE DELETE ON embeddings FOR EACH ROW WHEN (OLD.id = 'b') EXECUTE FUNCTION refuse()")
    with pytest.raises(ValidationError, match="the database refuses this: not b; "):
        filled.delete_by_source_id("s", cascade=cascade)
    assert [len(d.chunks) for d in filled.get(["a", "b", "c"])] == [2, 2, 2]
    assert sql("SELECT count(*) FROM write_log") == [(1,)]


@pytest.mark.parametrize(
    "remove",
    [
        lambda store: store.delete(["a"]),
        lambda store: store.delete_by_source_id("s"),
        lambda store: store.sync([], source_id="s", embedder=EMBEDDER, allow_empty=True),
        lambda store: store.cleanup_orphaned(),
    ],
    ids=["delete", "delete_by_source_id", "sync", "cleanup_orphaned"],
)
def test_a_document_that_a_table_of_the_users_own_refers_to_is_kept_and_told(filled, sql, remove):
    sql("CREATE TABLE notes (document_id text REFERENCES embeddings (id))")
    sql("INSERT INTO notes VALUES ('a')")
    told = r'"notes" \(Key \(id\)=\(a\) is still referenced.*remove what'
    with pytest.raises(ValidationError, match=told) as refused:
        remove(filled)
    assert isinstance(refused.value.__cause__, pg.ForeignKeyViolation)
    assert [d.id for d in filled.get(["a", "b", "c"])] == ["a", "b", "c"]


def test_a_document_that_moved_away_meanwhile_is_not_deleted(filled, sql, admin, until):
    with ThreadPoolExecutor(1) as threads:
        with admin.transaction():
            admin.execute("UPDATE embeddings SET source_id = 'elsewhere' WHERE id = 'b'")
            deletion = threads.submit(filled.delete_by_source_id, "s")
            until(
                lambda: admin.execute(
                    "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
                    " AND transactionid = pg_current_xact_id()::text::xid)"
                ).fetchone()[0]
            )
        assert deletion.result().deleted == 1
    assert sql("SELECT id FROM embeddings ORDER BY id") == [("b",), ("c",)]


@pytest.fixture
def hurried(database_url, filled, sql):
    """The store with a time limit that no deletion of two documents keeps."""
    sql("CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.6); RETURN OLD; END $$")
    sql("CREATE TRIGGER slow BEFORE DELETE ON embeddings FOR EACH ROW EXECUTE FUNCTION slow()")
    with db.connect(database_url, False, statement_timeout_s=1) as store:
        yield store


@pytest.mark.parametrize("cascade", [True, False])
def test_a_source_however_large_can_be_deleted(hurried, cascade):
    assert hurried.delete_by_source_id("s", cascade=cascade).deleted == 2


def test_a_sync_may_delete_for_longer_than_a_statement_may_take(hurried):
    assert hurried.sync([], source_id="s", embedder=EMBEDDER, allow_empty=True).deleted == 2


def test_a_deletion_waits_for_a_lock_no_longer_than_any_write(hurried, admin):
    with admin.transaction():
        admin.execute("SELECT FROM embeddings WHERE id = 'a' FOR UPDATE")
        with pytest.raises(db.UnavailableError, match="another session holds rows"):
            hurried.delete_by_source_id("s")


@pytest.mark.parametrize("ids", ["abc", [""], [None], ["x" * 1025], ["\0"]])
def test_ids_that_cannot_be_any_are_refused(store, ids):
    with pytest.raises(ValidationError):
        store.delete(ids)


@pytest.mark.parametrize("source_id", ["", None, 3])
def test_a_source_that_cannot_be_any_is_refused(store, source_id):
    with pytest.raises(ValidationError, match="source_id is"):
        store.delete_by_source_id(source_id)


def test_many_ids_are_deleted_in_one_transaction(store, sql):
    ids = [f"{n}" for n in range(3000)]
    store.batch_upsert([{"id": id_, "text": "t"} for id_ in ids])
    before = sql("SELECT count(*) FROM write_log")[0][0]
    assert store.delete(ids).deleted == 3000
    assert sql("SELECT count(*) FROM write_log") == [(before + 1,)]
