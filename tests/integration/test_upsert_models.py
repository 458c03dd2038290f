"""The model of a store: registered by the first vector, and kept from then on."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import db
from db import SchemaError
from db.locks import LOCK_CLASS, Purpose
from db.registry import register_model

from .upserts import counts, doc


def test_the_first_vector_registers_the_model_with_its_indexes(database_url, redis_url, sql):
    with db.connect(database_url, redis_url, model_id="first", distance="l2") as store:
        store.batch_upsert([doc("a", embedding=[1.0, 2.0, 3.0])])
        assert (store.model.model_id, store.model.dimensions, store.model.distance) == ("first", 3, "l2")
    assert sql("SELECT model_id, dimensions, distance, active FROM embedding_models") == [("first", 3, "l2", True)]
    assert sql("SELECT count(*) FROM pg_index WHERE indexrelid::regclass::text LIKE '%_vector_idx' AND indisvalid") == [
        (2,)
    ]
    assert sql("SELECT model_id FROM embeddings") == [("first",)]


def test_an_invalid_first_vector_registers_nothing(database_url, redis_url, sql):
    with db.connect(database_url, redis_url) as store:
        assert counts(store.batch_upsert([doc("a", embedding=[0.0, 0.0]), doc("b", embedding=["x"])])) == {"failed": 2}
        assert store.model is None
    assert sql("SELECT count(*) FROM embedding_models") == [(0,)]


@pytest.mark.parametrize("before", [0, 300])
def test_a_registration_that_is_cut_off_is_told_and_nothing_of_its_batch_is_lost(
    database_url, redis_url, sql, admin, until, before
):
    """Also in a store of texts, where a batch is compared a part at a time, and the vectors are in a later one."""
    given = [doc(f"{n}") for n in range(before)]
    given += [doc(f"{n}", embedding=[1.0, float(n)]) for n in range(before, 1500)]
    waiting = """
        SELECT pid FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE 'SELECT pg_try_advisory_lock%' AND pid <> pg_backend_pid()
    """
    with db.connect(database_url, redis_url) as store, ThreadPoolExecutor(1) as thread:
        store.batch_upsert([doc("first"), *given[: before // 2]])
        admin.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.REGISTRY)))
        upsert = thread.submit(store.batch_upsert, given, batch_size=1500)
        until(lambda: sql(waiting))
        sql(f"SELECT pg_terminate_backend(pid) FROM ({waiting}) AS waiting")
        with pytest.raises(db.UnavailableError):
            upsert.result()
        admin.execute("SELECT pg_advisory_unlock_all()")
        assert store.batch_upsert(given).inserted == 1500 - before // 2
    assert sql("SELECT count(*) FROM embeddings WHERE embedding IS NOT NULL") == [(1500 - before,)]


@pytest.mark.parametrize("table", ["embeddings", "chunks"])
def test_a_model_of_other_dimensions_than_the_stored_vectors_is_not_registered(database_url, redis_url, sql, table):
    """A store of before there was a registry has vectors and no model."""
    sql("INSERT INTO embeddings (id, text) SELECT n::text, 't' FROM generate_series(1, 3) AS n")
    sql("INSERT INTO chunks (id, document_id, chunk_index, text) SELECT id || '#0', id, 0, 't' FROM embeddings")
    sql(f"UPDATE {table} SET embedding = '[1,2,3]' WHERE id LIKE '2%'")
    for _ in range(2):
        with pytest.raises(db.DimensionError, match=f"{table} holds a vector of 3 dimensions, of '2.*'m' would have 4"):
            register_model(database_url, "m", 4, "cosine")
    with db.connect(database_url, redis_url) as store:
        result = store.batch_upsert([doc("a", embedding=[1.0, 2.0]), doc("b", embedding=[1.0, 2.0, 3.0])])
        assert (counts(result), store.model.dimensions) == ({"inserted": 1, "failed": 1}, 3)
        assert [(id_, "of 3 dimensions" in reason) for id_, reason in result.errors] == [("a", True)]
    register_model(database_url, "default", 3, "cosine")
    assert sql("SELECT model_id, dimensions FROM embedding_models") == [("default", 3)]


def test_a_second_model_is_refused_every_time_and_writes_nothing(database_url, redis_url, sql):
    with db.connect(database_url, redis_url, model_id="second", dimensions=3) as late:
        with db.connect(database_url, redis_url, model_id="first", dimensions=3) as first:
            first.batch_upsert([doc("a", embedding=[1.0, 0.0, 0.0])])
        for _ in range(2):
            with pytest.raises(SchemaError, match="the store's model is 'first', not 'second'"):
                late.batch_upsert([doc("b", embedding=[0.0, 1.0, 0.0])])
            with pytest.raises(SchemaError, match="'first', not 'second'"):
                late.search([0.0, 1.0, 0.0])
    assert sql("SELECT id FROM embeddings") == [("a",)]
    with pytest.raises(SchemaError, match="'first', not 'second'"):
        db.connect(database_url, redis_url, model_id="second")


@pytest.mark.parametrize("distance", ["l2", "inner_product"])
def test_vectors_that_the_index_cannot_hold_are_refused(database_url, redis_url, distance):
    with db.connect(database_url, redis_url, distance=distance) as store:
        result = store.batch_upsert([doc("fits", embedding=[65_504.0, 1.0]), doc("beyond", embedding=[65_505.0, 1.0])])
        assert counts(result) == {"inserted": 1, "failed": 1}
        assert result.errors == [
            ("beyond", "vector has a component beyond ±65504, which its halfvec index cannot hold; scale all vectors")
        ]
        assert [hit.id for hit in store.search([65_504.0, 1.0])] == ["fits"]


def test_a_role_that_may_not_write_is_told_so(store, sql):
    [(name,)] = sql("SELECT current_database()")
    role = f"{name}_reader"
    sql(f"CREATE ROLE {role}")
    try:
        sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} SET role = {role}")
        store.pool.drain()
        with pytest.raises(db.PermissionDeniedError, match="permission denied for table embeddings; grant the role"):
            store.batch_upsert([doc("a")])
        assert store.get(["a"]) == []
    finally:
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} RESET role")
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")


def test_what_a_constraint_refuses_of_a_callers_transaction_is_told_as_of_any_call(store, sql):
    store.batch_upsert([doc("a")])
    with pytest.raises(db.ValidationError, match=r"refuses this: .* \(Key \(id\)=\(a\)"), store.transaction() as own:
        own.exec_driver_sql("INSERT INTO embeddings (id, text) VALUES ('b', 't'), ('a', 't')")
    assert sql("SELECT id FROM embeddings") == [("a",)]


def test_a_callers_transaction_is_refused_once_the_store_was_moved_to_another_model(store, sql):
    store.batch_upsert([doc("a", embedding=[1.0] * 8)])
    with store.transaction():
        pass
    sql("UPDATE embedding_models SET model_id = 'another' WHERE active")
    with pytest.raises(SchemaError, match=r"is 'another' .* now"), store.transaction():
        pytest.fail("its writes would be of the old model")
