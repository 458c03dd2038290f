"""What an upsert costs: nothing for rows that did not change, and no vector index for metadata alone."""

import numpy as np
import pytest

import db


def doc(id_, text="text", **parts):
    return {"id": id_, "text": text, **parts}


def documents(count=200, **parts):
    return [
        doc(f"{n:04}", f"text {n}", embedding=[1.0, n, *[0.0] * 6], chunks=[{"text": f"chunk of {n}"}], **parts)
        for n in range(count)
    ]


@pytest.fixture
def small(database_url, redis_url):
    """A store of one connection, so that its statistics can be flushed, and that gives up soon on a lock."""
    with db.connect(
        database_url, redis_url, model_id="test-model", dimensions=8, pool_max=1, statement_timeout_s=3
    ) as store:
        yield store


@pytest.fixture
def writes(small, sql):
    """How many rows of a table were inserted, updated, updated HOT and deleted so far."""

    def count(table="embeddings"):
        with small.pool.connection() as connection:
            connection.execute("SELECT pg_stat_force_next_flush()")
        columns = "n_tup_ins, n_tup_upd, n_tup_hot_upd, n_tup_del"
        return sql(f"SELECT {columns} FROM pg_stat_user_tables WHERE relname = %s", table)[0]

    return count


def test_unchanged_rows_are_not_touched_at_all(small, sql, writes):
    small.batch_upsert(documents())
    rows = "SELECT id, ctid::text, xmin::text, xmax::text FROM {} ORDER BY id"
    before = [sql(rows.format(table)) for table in ("embeddings", "chunks")]
    counted = [writes(table) for table in ("embeddings", "chunks")]
    result = small.batch_upsert(documents())
    assert result.unchanged == 200
    assert [sql(rows.format(table)) for table in ("embeddings", "chunks")] == before
    assert [writes(table) for table in ("embeddings", "chunks")] == counted
    assert sql("SELECT count(*) FROM write_log") == [(1,)]


def test_unchanged_rows_write_no_wal(small, sql, until):
    small.batch_upsert(documents())
    sql("VACUUM embeddings, chunks")  # sets the hint bits that a first read would set, and log

    def silent():
        # The server writes WAL of its own now and then: one run without any is proof enough.
        [(before,)] = sql("SELECT pg_current_wal_insert_lsn()")
        assert small.batch_upsert(documents()).unchanged == 200
        [(after,)] = sql("SELECT pg_current_wal_insert_lsn()")
        return before == after

    until(silent, within_s=120)


def test_unchanged_rows_wait_for_no_lock(small, admin):
    small.batch_upsert(documents(20))
    with admin.transaction():
        admin.execute("SELECT FROM embeddings FOR UPDATE")
        admin.execute("SELECT FROM chunks FOR UPDATE")
        assert small.batch_upsert(documents(20)).unchanged == 20


def test_of_a_batch_only_the_changed_rows_are_locked(small, admin):
    small.batch_upsert(documents(20))
    changed = documents(20)
    changed[7]["text"] = "other"
    with admin.transaction():
        admin.execute("SELECT FROM embeddings WHERE id <> '0007' FOR UPDATE")
        result = small.batch_upsert([*changed, doc("new")])
    assert (result.inserted, result.updated, result.unchanged, result.failed) == (1, 1, 19, 0)


def test_an_update_of_metadata_alone_is_hot_and_spares_the_vector_index(small, sql, writes):
    small.batch_upsert(documents())
    size = "SELECT pg_relation_size('embeddings_vector_idx')"
    before, size_before = writes(), sql(size)
    assert small.batch_upsert(documents(metadata={"seen": 1})[::10]).updated == 20
    after = writes()
    assert after[1] - before[1] == 20
    assert after[2] - before[2] == 20, "every update is HOT"
    assert sql(size) == size_before
    assert writes("chunks")[1] == 0


def test_an_equal_vector_that_is_stored_out_of_line_is_not_written_again(database_url, redis_url, sql):
    random = np.random.default_rng(5)
    given = [doc(f"{n}", embedding=random.standard_normal(1024)) for n in range(100)]
    with db.connect(database_url, redis_url, pool_max=1) as store:
        store.batch_upsert(given)
        assert store.batch_upsert([{**d, "metadata": {"seen": 1}} for d in given[::10]]).updated == 10
        with store.pool.connection() as connection:
            connection.execute("SELECT pg_stat_force_next_flush()")
    assert sql("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'embeddings'") == [(10, 10)]


def test_a_text_changed_beside_an_equal_vector_is_hot_too(small, writes):
    small.batch_upsert(documents())
    before = writes()
    changed = [{**d, "text": "other " + d["text"]} for d in documents()[::10]]
    assert small.batch_upsert(changed).updated == 20
    assert writes()[2] - before[2] == 20


def test_a_changed_vector_is_found_by_search(small):
    small.batch_upsert(documents(20))
    assert small.batch_upsert([doc("0003", "text 3", embedding=[-1.0, *[0.0] * 7])]).updated == 1
    assert small.search([-1.0, *[0.0] * 7], 1)[0].id == "0003"


def test_one_transaction_and_one_logged_write_a_batch(small, sql):
    small.batch_upsert(documents(200), batch_size=50)
    assert sql("SELECT count(*), count(DISTINCT xid) FROM write_log") == [(4, 4)]
    assert sql("SELECT count(DISTINCT xmin::text) FROM chunks") == [(4,)]


def test_a_write_to_very_many_sources_is_logged_as_everything(small, sql):
    small.batch_upsert([doc(f"{n}", source_id=f"s{n}") for n in range(250)])
    assert sql("SELECT tags FROM write_log") == [(["all", "store"],)]
