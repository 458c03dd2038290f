"""Builds of the vector indexes: where shared memory is short, beside writers, and beside builds of others."""

import threading

import psycopg
import pytest
from psycopg import errors as pg

import db
from db.vector_index import INDEXED_TABLES, build_unused_index, ensure_vector_indexes, leftovers, rebuild_vector_index
from tests.integration.examining import plain_owner

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


# -- builds of others ------------------------------------------------------------------------------------------


@pytest.fixture
def built_by_another_role(filled, sql, database_url, until):
    """The vector index while a superuser builds it in psql: the URL of the owner, who may not see of what table."""
    [(build,)] = sql("SELECT pg_get_indexdef('embeddings_vector_idx'::regclass)")
    sql("DROP INDEX embeddings_vector_idx")
    with (
        plain_owner(database_url) as url,
        psycopg.connect(database_url, autocommit=True) as builder,
        psycopg.connect(database_url) as writer,
    ):
        writer.execute("UPDATE embeddings SET text = 'u' WHERE id = '1'")  # the build waits for it
        thread = threading.Thread(
            target=builder.execute, args=(build.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY"),)
        )
        thread.start()
        until(lambda: sql(INDEXES) == [(INDEX, False)])
        yield url, builder, writer
        writer.rollback()
        thread.join()
        assert sql(INDEXES) == [(INDEX, True)]


def test_a_build_by_another_role_is_not_called_interrupted(built_by_another_role):
    url, builder, _ = built_by_another_role
    with db.connect(url, False) as store:
        report = store.get_statistics().indexes[0]
    assert [(finding.rule, finding.verdict) for finding in report.findings] == [("being-built", "degraded")]
    assert f"process {builder.info.backend_pid} builds an index that this role may not see" in report.reasons[0]
    assert not report.needs_rebuild


def test_what_another_role_builds_is_no_leftover(built_by_another_role, sql):
    url, _, _ = built_by_another_role
    with psycopg.connect(url, autocommit=True) as owner:
        assert leftovers(owner) == []
    made = sql("SELECT 'embeddings_vector_idx'::regclass::oid")
    with db.connect(url, False) as store:
        result = store.maintain(skip_compaction=True, deadline_s=10)
    told = {step.name: (step.outcome, step.details) for step in result.steps}
    assert told["remove leftovers"] == ("skipped", "nothing interrupted left anything")
    assert told["build missing indexes"][0] == "skipped"
    assert sql("SELECT 'embeddings_vector_idx'::regclass::oid") == made


def test_who_wants_the_index_that_another_role_builds_leaves_it_to_that_one(built_by_another_role, filled, sql):
    url, _, _ = built_by_another_role
    made = sql("SELECT 'embeddings_vector_idx'::regclass::oid")
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute("SET statement_timeout = 5000")  # whoever waits here waits for this test
        assert ensure_vector_indexes(owner, filled.model, [DOCUMENTS]) == []
    assert sql("SELECT 'embeddings_vector_idx'::regclass::oid") == made


def test_what_is_left_of_a_build_is_a_leftover_again_once_nothing_is_built(built_by_another_role, sql, until):
    url, _, writer = built_by_another_role
    writer.rollback()
    until(lambda: sql(INDEXES) == [(INDEX, True)])
    sql("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embeddings_vector_idx'::regclass")
    with psycopg.connect(url, autocommit=True) as owner:
        until(lambda: leftovers(owner) == [INDEX])
    with db.connect(url, False) as store:
        assert [finding.rule for finding in store.get_statistics().indexes[0].findings] == ["invalid"]
        assert store.maintain(skip_cleanup=True, skip_compaction=True).index_rebuilt
