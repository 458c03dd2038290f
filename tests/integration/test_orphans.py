"""cleanup_orphaned: finds all orphans, removes only those, and says what it could not do."""

import threading
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

import db
from db import orphans

VECTOR = [1.0, *[0.0] * 7]
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def dangling(sql):
    """`dangling(count)` makes chunks whose document is gone, as a database had them before it got its key."""

    def make(count, prefix="gone"):
        sql("ALTER TABLE chunks DROP CONSTRAINT IF EXISTS chunks_document_id_fkey")
        sql(f"""
            INSERT INTO chunks (id, document_id, chunk_index, source_id, workspace, text)
            SELECT '{prefix}' || n, 'gone' || n, 0, 'lost source', 'lost workspace', repeat('text ', 50)
            FROM generate_series(1, {count}) AS n
        """)
        sql("""
            ALTER TABLE chunks ADD CONSTRAINT chunks_document_id_fkey
            FOREIGN KEY (document_id) REFERENCES embeddings (id) ON DELETE CASCADE NOT VALID
        """)

    return make


def validated(sql):
    return sql("SELECT convalidated FROM pg_constraint WHERE conname = 'chunks_document_id_fkey'")[0][0]


def every_kind(store):
    """Four documents that are none and two that are orphans, and two orphaned chunks."""
    store.batch_upsert(
        [
            {"id": "vector", "text": "t", "embedding": VECTOR},
            {"id": "chunk vector", "text": "t", "chunks": [{"text": "x"}, {"text": "c", "embedding": VECTOR}]},
            {"id": "both", "text": "t", "embedding": VECTOR, "chunks": [{"text": "c", "embedding": VECTOR}]},
            {"id": "vector, bare chunk", "text": "t", "embedding": VECTOR, "chunks": [{"text": "c"}]},
            {"id": "bare", "text": "t"},
            {"id": "bare chunk", "text": "t", "chunks": [{"text": "c"}]},
            {
                "id": "to detach",
                "text": "t",
                "source_id": "s",
                "embedding": VECTOR,
                "chunks": [{"text": "1"}, {"text": "2"}],
            },
        ]
    )
    store.delete_by_source_id("s", cascade=False)


def test_no_walk_of_a_table_is_cut_off_or_keeps_the_writers_lock(database_url, store, sql, monkeypatch):
    every_kind(store)
    sql("""
        CREATE FUNCTION examined(id text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_sleep(0.2);
            IF id = 'vector' AND EXISTS (
                SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory') THEN
                RAISE 'a document that is no orphan is looked at while the lock is held';
            END IF;
            RETURN true;
        END $$
    """)
    slow = psycopg.sql.SQL("examined(embeddings.id) AND ") + orphans._ORPHANED_EMBEDDING
    monkeypatch.setitem(orphans._CONDITIONS, "embeddings", slow)
    with db.connect(database_url, False, statement_timeout_s=1) as hurried:
        assert hurried.cleanup_orphaned(dry_run=True).orphaned_embeddings == 2
        assert hurried.cleanup_orphaned().orphaned_embeddings == 2


def test_exactly_the_orphans_are_removed(store, sql):
    every_kind(store)
    result = store.cleanup_orphaned()
    assert (result.orphaned_chunks, result.orphaned_embeddings, result.cleaned, result.vacuumed) == (2, 2, True, True)
    assert {row[0] for row in sql("SELECT id FROM embeddings")} == {
        "vector", "chunk vector", "both", "vector, bare chunk",
    }  # fmt: skip
    assert sql("SELECT count(*) FROM chunks") == [(4,)]
    assert "Removed 2 orphaned chunks" in result.details
    assert "Removed 2 documents without any vector" in result.details
    assert "Vacuum completed" in result.details
    again = store.cleanup_orphaned()
    assert (again.orphaned_chunks, again.orphaned_embeddings) == (0, 0)


def test_a_dry_run_counts_all_of_them_and_changes_nothing(store, sql, dangling):
    every_kind(store)
    dangling(2500)
    before = sql("SELECT count(*) FROM chunks"), sql("SELECT count(*) FROM write_log")
    result = store.cleanup_orphaned(dry_run=True, batch_size=10)
    assert (result.orphaned_chunks, result.orphaned_embeddings) == (2502, 2)
    assert (result.cleaned, result.vacuumed, result.reclaimed_bytes) == (False, False, 0)
    assert result.details[-1] == "Dry run - no changes made"
    assert (sql("SELECT count(*) FROM chunks"), sql("SELECT count(*) FROM write_log")) == before
    assert not validated(sql)


def test_the_real_run_goes_on_batch_by_batch_until_none_is_left(store, sql, dangling):
    store.batch_upsert([{"id": "kept", "text": "t", "embedding": VECTOR}])
    dangling(2500)
    told = []
    result = store.cleanup_orphaned(batch_size=1000, on_progress=lambda *t: told.append(t))
    assert result.orphaned_chunks == 2500
    assert sql("SELECT count(*) FROM chunks") == [(0,)]
    assert [done for done, _ in told][:3] == [1000, 2000, 2500]
    tags = sql("SELECT tags FROM write_log ORDER BY id DESC LIMIT 3")
    assert tags == [(["source:lost source", "store", "workspace:lost workspace"],)] * 3
    assert result.reclaimed_bytes > 100_000
    assert f"Reclaimed {result.reclaimed_bytes} bytes" in result.details


def test_the_foreign_key_is_validated_afterwards(store, sql, dangling):
    dangling(5)
    assert not validated(sql)
    result = store.cleanup_orphaned()
    assert validated(sql)
    assert "Validated the foreign key chunks_document_id_fkey" in result.details
    assert not any("foreign key" in detail for detail in store.cleanup_orphaned().details)


def test_what_is_younger_than_the_minimum_age_is_spared(store, sql, dangling):
    store.batch_upsert([{"id": "old", "text": "t", "created_at": LONG_AGO}, {"id": "young", "text": "t"}])
    dangling(3)
    sql("UPDATE chunks SET created_at = '2020-01-01' WHERE id = 'gone1'")
    day = timedelta(days=1)
    dry = store.cleanup_orphaned(dry_run=True, min_age=day)
    result = store.cleanup_orphaned(min_age=day)
    assert (result.orphaned_chunks, result.orphaned_embeddings) == (1, 1)
    assert (dry.orphaned_chunks, dry.orphaned_embeddings) == (1, 1)
    assert sql("SELECT id FROM embeddings") == [("young",)]
    assert sql("SELECT count(*) FROM chunks") == [(2,)]
    assert not validated(sql)
    assert any("stays unvalidated: younger orphans remain" in detail for detail in result.details)


def test_a_role_that_may_not_vacuum_is_told_so(store, sql, dangling):
    dangling(3)
    [(name,)] = sql("SELECT current_database()")
    role = f"{name}_worker"
    sql(f"CREATE ROLE {role}")
    try:
        sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} SET role = {role}")
        store.pool.drain()
        result = store.cleanup_orphaned()
        assert (result.orphaned_chunks, result.cleaned, result.vacuumed) == (3, True, False)
        assert any(d.startswith("Vacuum not done: ") and "permission denied" in d for d in result.details)
        assert any("only the tables' owner may validate it" in d for d in result.details)
        assert "Vacuum completed" not in result.details
    finally:
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} RESET role")
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")


def test_an_orphan_that_another_session_holds_is_left_and_not_waited_for(store, sql, admin):
    store.batch_upsert([{"id": f"{n}", "text": "t"} for n in range(10)])
    with admin.transaction():
        admin.execute("SELECT FROM embeddings WHERE id = '4' FOR UPDATE")
        store.cleanup_orphaned(batch_size=3)
    assert sql("SELECT id FROM embeddings") == [("4",)]


def test_documents_that_get_their_vectors_meanwhile_are_never_removed(store, sql):
    """A writer makes bare documents and gives each its vector at once after: some are caught bare, none with one."""
    stop = threading.Event()
    written = []

    def write():
        n = 0
        while not stop.is_set():
            n += 1
            ids = [f"{n}-{m}" for m in range(5)]
            store.batch_upsert([{"id": id_, "text": "t"} for id_ in ids])
            result = store.batch_upsert([{"id": id_, "text": "t", "embedding": VECTOR} for id_ in ids])
            assert result.failed == 0
            written.extend(ids)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(5):
            store.cleanup_orphaned(batch_size=2)
    finally:
        stop.set()
        writer.join()
    assert written
    assert {row[0] for row in sql("SELECT id FROM embeddings WHERE embedding IS NOT NULL")} == set(written)


def test_removing_orphans_makes_a_cached_search_untrue(store, sql):
    store.batch_upsert([{"id": "a", "text": "t", "source_id": "s", "chunks": [{"text": "c", "embedding": VECTOR}]}])
    store.delete_by_source_id("s", cascade=False)
    search = {"k": 3, "level": "chunks", "source_id": "s"}
    assert len(store.search(VECTOR, **search)) == 1
    assert store.search(VECTOR, **search).cached
    store.cleanup_orphaned()
    assert len(store.search(VECTOR, **search)) == 0
