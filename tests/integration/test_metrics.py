"""Metrics: every operation is recorded, and recording never fails, slows or outgrows what it measures."""

import logging
import threading
import time

import pytest

import db
from db import metrics as metrics_module

VECTOR = [1.0, *[0.0] * 7]


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(metrics_module, "_FLUSH_EVERY_S", 0.05)


def recorded(sql, operation=None):
    rows = sql("SELECT operation, success, error_message, metadata FROM performance_metrics ORDER BY id")
    return [row for row in rows if operation in (None, row[0])]


def test_each_operation_is_recorded_with_its_counts(store, sql, until):
    store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}, {"id": "", "text": "t"}])
    store.search(VECTOR)
    store.search(VECTOR)
    store.delete(["a"])
    store.delete_by_source_id("s")
    store.cleanup_orphaned()
    until(lambda: len(recorded(sql)) == 6)
    rows = {row[0]: row for row in recorded(sql)}
    assert rows.keys() == {"batch_upsert", "search", "delete", "delete_by_source_id", "cleanup_orphaned"}
    assert rows["batch_upsert"][3] == {"inserted": 1, "updated": 0, "unchanged": 0, "superseded": 0, "failed": 1}
    assert [row[3]["cached"] for row in recorded(sql, "search")] == [False, True]
    assert rows["delete"][3]["deleted"] == 1
    assert all(row[1] and row[2] is None for row in rows.values())


def test_a_duration_is_that_of_the_operation(store, sql, until):
    def slow():
        time.sleep(0.2)
        yield {"id": "a", "text": "t"}

    result = store.batch_upsert(slow())
    until(lambda: recorded(sql))
    [(duration_ms, age_s)] = sql(
        "SELECT duration_ms, extract(epoch FROM now() - created_at)::float FROM performance_metrics"
    )
    assert 200 <= duration_ms <= result.duration_ms + 50
    assert age_s < 60


def test_a_failed_operation_is_recorded_with_its_error(store, sql, until):
    def broken():
        yield {"id": "a", "text": "t"}
        raise RuntimeError("file is broken")

    with pytest.raises(RuntimeError):
        store.batch_upsert(broken())
    until(lambda: recorded(sql))
    assert recorded(sql)[0][:3] == ("batch_upsert", False, "RuntimeError: file is broken")


def test_what_waits_is_written_at_close(database_url, redis_url, sql, monkeypatch):
    monkeypatch.setattr(metrics_module, "_FLUSH_EVERY_S", 3600)
    with db.connect(database_url, redis_url) as store:
        store.batch_upsert([{"id": "a", "text": "t"}])
        assert recorded(sql) == []
    assert len(recorded(sql)) == 1


@pytest.mark.parametrize("text", ["a\0b", "lone \ud800 surrogate", "x" * 5000])
def test_an_error_message_that_postgresql_cannot_hold_is_recorded_all_the_same(store, sql, until, text):
    def broken():
        raise RuntimeError(text)
        yield

    with pytest.raises(RuntimeError):
        store.batch_upsert(broken())
    store.batch_upsert([{"id": "a", "text": "t"}])
    until(lambda: len(recorded(sql)) == 2)
    assert recorded(sql)[0][2].startswith(f"RuntimeError: {text[:1]}")


def test_operations_go_on_where_metrics_cannot_be_written(store, sql, until, caplog):
    sql("ALTER TABLE performance_metrics RENAME TO hidden")
    with caplog.at_level(logging.WARNING, "vectorkeep"):
        for n in range(5):
            assert store.batch_upsert([{"id": f"{n}", "text": "t"}]).inserted == 1
            until(lambda: not store._parts.metrics._buffer)
        until(lambda: "metrics.not_written" in caplog.messages)
    assert caplog.messages.count("metrics.not_written") == 1
    sql("ALTER TABLE hidden RENAME TO performance_metrics")
    store.search(VECTOR)
    until(lambda: recorded(sql, "search"))


def test_a_locked_metrics_table_slows_no_operation_and_not_the_close(database_url, redis_url, admin, until):
    store = db.connect(database_url, redis_url, model_id="test-model", dimensions=8, pool_max=2)
    store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])
    with admin.transaction():
        admin.execute("LOCK performance_metrics")
        started = time.monotonic()
        for n in range(20):
            assert store.batch_upsert([{"id": f"{n}", "text": "t"}]).inserted == 1
            store.search(VECTOR)
        assert time.monotonic() - started < 10  # waiting 0.5 s for each, they would take 20
        started = time.monotonic()
        store.close()
        assert time.monotonic() - started < 9


def test_a_small_pool_is_not_taken_by_a_locked_metrics_table(database_url, redis_url, admin, until):
    with db.connect(database_url, redis_url, pool_max=1, pool_timeout_s=8) as store, admin.transaction():
        admin.execute("LOCK performance_metrics")
        store.batch_upsert([{"id": "a", "text": "t"}])
        until(lambda: not store._parts.metrics._buffer)
        assert store.batch_upsert([{"id": "b", "text": "t"}]).inserted == 1


def test_where_no_thread_can_start_calls_go_on_and_the_close_writes_what_waits(database_url, redis_url, sql, caplog):
    with db.connect(database_url, redis_url, model_id="m", dimensions=8, maintenance_on_close=False) as store:
        before = threading.stack_size(1 << 46)  # more than there can be
        try:
            assert store.batch_upsert([{"id": "a", "text": "t"}]).inserted == 1
            assert [document.id for document in store.get(["a"])] == ["a"]
            store.close()
        finally:
            threading.stack_size(before)
    assert "metrics.not_started" in {record.msg for record in caplog.records}
    assert sql("SELECT operation FROM performance_metrics") == [("batch_upsert",)]


def test_what_waits_to_be_written_is_bounded(store, monkeypatch):
    monkeypatch.setattr(metrics_module, "_MAX_BUFFERED", 10)
    recorder = metrics_module.MetricsRecorder(store._parts.database, background=lambda: None)
    monkeypatch.setattr(recorder, "start", lambda: None)
    for n in range(50):
        with recorder.measure(f"operation {n}"):
            pass
    assert [row[0] for row in recorder._buffer] == [f"operation {n}" for n in range(40, 50)]
