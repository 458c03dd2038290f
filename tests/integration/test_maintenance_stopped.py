"""Maintenance that is stopped in the middle: at once, the outcome said, and nothing left behind."""

import threading
import time

import psycopg
import pytest

import db
from db.locks import LOCK_CLASS, Purpose
from db.vector_index import leftovers

INVALID = "SELECT relname FROM pg_class JOIN pg_index ON indexrelid = pg_class.oid WHERE NOT indisvalid"
REINDEXING = "SELECT count(*) FROM pg_stat_progress_create_index WHERE datname = current_database()"


def outcomes(result):
    return {step.name: step.outcome for step in result.steps}


@pytest.fixture
def stale(database_url, redis_url, sql):
    """A store whose document index is to be rebuilt."""
    sql("ALTER TABLE embeddings SET (autovacuum_enabled = false)")
    with db.connect(database_url, redis_url, model_id="test-model", dimensions=8, pool_max=1) as store:
        store.batch_upsert(
            {"id": f"{n}", "text": "t", "source_id": "drop" if n % 2 else "keep", "embedding": [1.0, n + 1.0, *[0] * 6]}
            for n in range(2400)
        )
        store.delete_by_source_id("drop")
        with store.pool.connection() as connection:
            connection.execute("SELECT pg_stat_force_next_flush()")
        yield store


@pytest.fixture
def held(database_url):
    """A transaction that builds online wait for: REINDEX for its lock, CREATE INDEX for its snapshot."""
    with psycopg.connect(database_url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SELECT count(*) FROM embeddings")
        yield connection


def in_background(work):
    """A thread at `work`, and the list that gets what it returned or raised."""
    results = []

    def run():
        try:
            results.append(work())
        except db.VectorKeepError as exc:
            results.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_a_deadline_stops_a_rebuild_that_runs_and_the_rest_is_not_reached(stale, held, sql):
    started = time.monotonic()
    result = stale.maintain(skip_cleanup=True, deadline_s=3)
    assert time.monotonic() - started < 15
    told = outcomes(result)
    assert told["rebuild stale indexes"] == "not reached"
    assert told["vacuum embeddings"] == "not reached"
    assert told["record the run"] == "done"
    assert not result.index_rebuilt
    assert sql("SELECT success FROM maintenance_runs") == [(False,)]
    held.rollback()
    assert [s.details for s in result.steps if s.name == "rebuild stale indexes"] == [
        "stopped: the deadline of 3 s has passed"
    ]


def test_an_event_stops_it_at_once_and_no_invalid_index_stays(stale, held, sql, until):
    cancel = threading.Event()
    thread, results = in_background(lambda: stale.maintain(skip_cleanup=True, cancel=cancel))
    until(lambda: sql(REINDEXING) == [(1,)])
    until(lambda: sql(INVALID))  # the copy is there, and invalid
    cancel.set()
    until(lambda: sql(REINDEXING) == [(0,)])
    held.rollback()
    thread.join(15)
    assert outcomes(results[0])["rebuild stale indexes"] == "not reached"
    assert sql(INVALID) == []
    assert len(stale.search([1.0, *[0.0] * 7], 5)) == 5
    assert outcomes(stale.maintain(skip_cleanup=True))["rebuild stale indexes"] == "done"


def test_a_rebuild_that_fails_leaves_no_invalid_index_either(stale, sql):
    """Until the next run every write would pay for two indexes."""
    ready = "UPDATE pg_index SET indisready = %s WHERE indexrelid = 'embeddings_vector_idx'::regclass"
    sql(ready, False)  # lets a row in that no build can take
    sql("INSERT INTO embeddings (id, text, embedding) VALUES ('short', 't', '[1,2,3]')")
    sql(ready, True)
    result = stale.maintain(skip_cleanup=True, skip_compaction=True)
    [told] = [s for s in result.steps if s.name == "rebuild stale indexes"]
    assert (told.outcome, "expected 8 dimensions, not 3" in told.details) == ("failed", True)
    assert sql(INVALID) == []
    assert sql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'embeddings_vector_idx'::regclass") == [(True,)]


def test_what_a_killed_rebuild_left_is_dropped_by_the_next_run(stale, held, sql, until):
    thread, results = in_background(lambda: stale.maintain(skip_cleanup=True, skip_compaction=True))
    until(lambda: sql(REINDEXING) == [(1,)] and sql(INVALID))
    sql("SELECT pg_terminate_backend(pid) FROM pg_stat_progress_create_index WHERE datname = current_database()")
    until(lambda: sql(REINDEXING) == [(0,)])
    held.rollback()
    thread.join(15)
    assert isinstance(results[0], db.UnavailableError)
    [(left,)] = sql(INVALID)
    dry = stale.maintain(skip_index=True, dry_run=True)
    assert [s.details for s in dry.steps if s.name == "remove leftovers"] == [f"dry run: would drop {left}"]
    result = stale.maintain(skip_index=True)
    assert [s.details for s in result.steps if s.name == "remove leftovers"] == [f"dropped {left}"]
    assert sql(INVALID) == []


def test_a_build_that_runs_is_no_leftover(stale, held, sql, until, admin):
    cancel = threading.Event()
    thread, _ = in_background(lambda: stale.maintain(skip_cleanup=True, cancel=cancel))
    until(lambda: sql(REINDEXING) == [(1,)] and sql(INVALID))
    assert leftovers(admin) == []
    cancel.set()
    held.rollback()
    thread.join(15)


def test_progress_tells_the_phase_of_a_build(stale, held, until):
    told, cancel = [], threading.Event()
    thread, _ = in_background(
        lambda: stale.maintain(skip_cleanup=True, cancel=cancel, on_progress=lambda *t: told.append(t))
    )
    until(lambda: any(name == "rebuild stale indexes" and details for name, details in told))
    cancel.set()
    held.rollback()
    thread.join(15)
    details = next(d for name, d in told if name == "rebuild stale indexes" and d)
    assert details.startswith("embeddings: ")


def test_a_deadline_is_kept_where_another_process_builds(stale, admin):
    admin.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.INDEX_BUILD)))
    started = time.monotonic()
    result = stale.maintain(skip_cleanup=True, deadline_s=1)
    assert time.monotonic() - started < 15
    assert outcomes(result)["rebuild stale indexes"] in ("failed", "not reached")
    assert outcomes(result)["tune searches"] == "not reached"


@pytest.fixture
def unindexed(stale, sql):
    sql("DROP INDEX embeddings_vector_idx")
    return stale


def test_a_build_that_was_stopped_leaves_no_invalid_index(unindexed, held, sql, until):
    cancel = threading.Event()
    thread, results = in_background(lambda: unindexed.maintain(skip_cleanup=True, cancel=cancel))
    until(lambda: sql(REINDEXING) == [(1,)] and sql(INVALID))
    cancel.set()
    until(lambda: sql(REINDEXING) == [(0,)])
    held.rollback()
    thread.join(15)
    assert outcomes(results[0])["build missing indexes"] == "not reached"
    assert sql(INVALID) == []


def test_indexes_are_left_to_a_bulk_load_that_runs(stale, database_url, sql):
    with db.connect(database_url, False) as other, other.bulk_load():
        result = stale.maintain(skip_cleanup=True)
        [told] = [s.details for s in result.steps if s.name == "build missing indexes"]
        assert told.startswith("a bulk load runs, and builds")
        assert sql("SELECT to_regclass('embeddings_vector_idx')") == [(None,)]
    assert sql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'embeddings_vector_idx'::regclass") == [(True,)]
