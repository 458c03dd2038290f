"""Traps that a careful reader found: each of these once lost data, waited for ever, or served an old answer."""

import psycopg
import pytest
from sqlalchemy import text

import db
from db.registry import register_model

VECTOR = [1.0] + [0.0] * 7


def test_an_explicit_argument_wins_over_the_environment(database_url, monkeypatch):
    monkeypatch.setenv("VECTORKEEP_CONSISTENCY", "bounded")
    monkeypatch.setenv("VECTORKEEP_POOL_MAX", "3")
    with db.connect(database_url, False, consistency="strict") as store:
        assert (store.settings.consistency, store.settings.pool_max) == ("strict", 3)


def test_an_explicit_distance_must_be_the_stores(database_url):
    register_model(database_url, "m", 8, "l2")
    with db.connect(database_url, False) as store:
        assert store.model.distance == "l2"
    with pytest.raises(db.ValidationError, match="distance is l2, not cosine"):
        db.connect(database_url, False, distance="cosine")


def test_record_write_takes_no_string_for_a_list(store):
    with store.transaction() as connection, pytest.raises(db.ValidationError, match="is a string"):
        store.record_write(connection, sources="zoo")


def test_rows_that_another_session_holds_are_no_fault_of_the_documents(database_url, admin):
    with db.connect(database_url, False, model_id="m", dimensions=8, statement_timeout_s=1) as store:
        rows = [{"id": f"{n}", "text": "t", "embedding": VECTOR} for n in range(8)]
        store.batch_upsert(rows)
        with admin.transaction():
            admin.execute("SELECT FROM embeddings FOR UPDATE")
            with pytest.raises(db.UnavailableError, match="another session holds rows"):
                store.batch_upsert([{**row, "text": "other"} for row in rows])


def test_an_adopted_vector_that_no_hash_tells_of_is_removed(store, sql):
    store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])
    sql("UPDATE embeddings SET vector_hash = NULL")
    assert store.batch_upsert([{"id": "a", "text": "t", "embedding": None}]).updated == 1
    assert store.get(["a"])[0].embedding is None


def test_chunk_ids_that_count_from_one_are_replaced(store, sql):
    store.batch_upsert([{"id": "a", "text": "t", "chunks": [{"text": f"c{n}"} for n in range(3)]}])
    sql("UPDATE chunks SET id = 'a#' || chunk_index + 10")
    sql("UPDATE chunks SET id = 'a#' || chunk_index + 1")
    sql("UPDATE embeddings SET chunks_hash = NULL")
    result = store.batch_upsert([{"id": "a", "text": "t", "chunks": [{"text": f"d{n}"} for n in range(4)]}])
    assert (result.updated, result.errors) == (1, [])
    assert [(c.id, c.text) for c in store.get(["a"])[0].chunks] == [(f"a#{n}", f"d{n}") for n in range(4)]


def test_a_reader_may_search_a_text(store, sql, url_as, until):
    store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])
    [(role,)] = sql("SELECT current_database() || '_reader'")
    sql(f"CREATE ROLE {role} LOGIN PASSWORD 'reader'")
    sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    try:
        embedder = db.CallableEmbedder(lambda texts: [VECTOR for _ in texts], "test-model", 8)
        with db.connect(url_as(role, "reader"), False, embedder=embedder) as reader:
            assert reader.search("hello")[0].id == "a"
    finally:
        until(lambda: not sql("SELECT 1 FROM pg_stat_activity WHERE usename = %s", role))
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")


@pytest.mark.parametrize("wrong", [{"redis_url": "localhost:6379"}, {"chunk_size": 100, "chunk_overlap": 100}])
def test_a_store_that_does_not_open_leaves_nothing_open(database_url, admin, until, wrong):
    with pytest.raises(db.ValidationError):
        db.connect(database_url, **wrong)
    ours = "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'vectorkeep%%' AND datname = current_database()"
    until(lambda: not admin.execute(ours).fetchall())


def test_an_address_in_postgres_port_is_not_read_where_a_url_is_given(database_url, monkeypatch):
    monkeypatch.setenv("POSTGRES_PORT", "tcp://10.0.0.1:5432")
    db.connect(database_url, False).close()
    monkeypatch.setenv("POSTGRES_HOST", "localhost")
    with pytest.raises(db.ValidationError, match="POSTGRES_PORT is 'tcp://"):
        db.connect()


def test_hot_updates_do_not_make_an_index_stale(store, sql, until):
    rows = [{"id": f"{n}", "text": "t", "embedding": [1.0, n, *VECTOR[:6]]} for n in range(200)]
    store.batch_upsert(rows)
    store.batch_upsert([{**row, "metadata": {"n": 1}} for row in rows[::10]])

    def dead_rows_are_counted():
        sql("SELECT pg_stat_clear_snapshot()")
        return sql("SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'embeddings'")[0][0] >= 20

    until(dead_rows_are_counted)
    assert store.get_statistics().indexes[0].stale_percent == 0


def test_an_index_build_that_gives_up_stops_nobody(store, database_url, sql, monkeypatch):
    from db import vector_index

    monkeypatch.setattr(vector_index, "_CONCURRENT_WAIT_MS", 300)
    monkeypatch.setattr(vector_index, "_LOCK_TIMEOUT_MS", 300)
    store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])
    with psycopg.connect(database_url) as reader:
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with store.bulk_load():
            reader.execute("SELECT count(*) FROM embeddings")  # its snapshot and lock last as long as it does
        assert store.search(VECTOR)[0].id == "a"
        assert store.batch_upsert([{"id": "b", "text": "t", "embedding": VECTOR}]).inserted == 1
    with store.bulk_load():
        pass
    assert sql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'embeddings_vector_idx'::regclass") == [(True,)]


def test_sync_ends_where_rows_cannot_be_deleted(database_url, sql):
    embedder = db.CallableEmbedder(lambda texts: [VECTOR for _ in texts], "m", 8)
    with db.connect(database_url, False, embedder=embedder) as store:
        store.sync([db.Item("a", "a"), db.Item("b", "b")], source_id="s")
        sql("CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
        sql("CREATE TRIGGER keep BEFORE DELETE ON embeddings FOR EACH ROW EXECUTE FUNCTION keep()")
        assert store.sync([db.Item("a", "a")], source_id="s").deleted == 0
        with store.engine.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM embeddings")) == 2
