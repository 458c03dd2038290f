"""Builds of the vector indexes: where shared memory is short, and beside writers."""

import threading

import psycopg
import pytest
from psycopg import errors as pg

from db.vector_index import INDEXED_TABLES, build_unused_index, ensure_vector_indexes, rebuild_vector_index

DOCUMENTS = INDEXED_TABLES[0]
INDEX = "embeddings_vector_idx"
INDEXES = """
    SELECT relname, indisvalid FROM pg_class JOIN pg_index ON indexrelid = pg_class.oid
    WHERE indrelid = 'embeddings'::regclass AND relname LIKE 'embeddings_vector_idx%'
"""


@pytest.fixture
def filled(store):
    store.batch_upsert({"id": f"{n}", "text": "t", "embedding": [1.0, n + 1.0, *[0.0] * 6]} for n in range(20))
    return store


@pytest.fixture
def short_of_shared_memory(filled, sql):
    """Parallel builds ask for more shared memory than any machine has: a parallel one takes all of its memory there."""
    [(database,)] = sql("SELECT current_database()")
    sql("ALTER TABLE embeddings SET (parallel_workers = 2)")
    sql(f"ALTER DATABASE {database} SET maintenance_work_mem = '2000GB'")
    return filled


def build_missing(connection, model):
    connection.execute("DROP INDEX embeddings_vector_idx")
    assert ensure_vector_indexes(connection, model, [DOCUMENTS]) == [INDEX]


def build_of_unused_table(connection, model):
    connection.execute("DROP INDEX embeddings_vector_idx")
    build_unused_index(connection, DOCUMENTS, model, 20)


def rebuild(connection, model):
    rebuild_vector_index(connection, model, DOCUMENTS, 20)


@pytest.mark.parametrize("build", [build_missing, build_of_unused_table, rebuild])
def test_where_shared_memory_is_short_a_build_is_done_without_workers(build, short_of_shared_memory, sql, database_url):
    model = short_of_shared_memory.model
    with psycopg.connect(database_url, autocommit=True) as connection:
        with pytest.raises(pg.DiskFull, match="shared memory"):
            connection.execute("CREATE INDEX o ON embeddings USING hnsw ((embedding::halfvec(8)) halfvec_ip_ops)")
        build(connection, model)
        assert connection.execute("SHOW max_parallel_maintenance_workers").fetchone() == ("2",)
    assert sql(INDEXES) == [(INDEX, True)]
    assert sql("SELECT rows FROM index_builds ORDER BY id DESC LIMIT 1") == [(20,)]


def test_a_table_with_texts_and_no_vectors_is_indexed_without_blocking_writers(store, sql, database_url, until):
    """The build reads the whole table for vectors, however few it finds."""
    store.batch_upsert([{"id": "gone", "text": "t", "embedding": [1.0] * 8}, {"id": "a", "text": "t"}])
    store.delete(["gone"])
    sql("DROP INDEX embeddings_vector_idx")
    insert = "INSERT INTO embeddings (id, text) VALUES (%s, 't')"
    with psycopg.connect(database_url, autocommit=True) as builder, psycopg.connect(database_url) as writer:
        writer.execute(insert, ("uncommitted",))
        build = threading.Thread(target=ensure_vector_indexes, args=(builder, store.model, [DOCUMENTS]))
        build.start()
        until(lambda: sql("SELECT 1 FROM pg_locks WHERE pid = %s AND NOT granted", builder.info.backend_pid))
        sql("SET lock_timeout = 1000")
        sql(insert, "beside the build")
        writer.rollback()
        build.join()
    assert sql(INDEXES) == [(INDEX, True)]
