"""A pause of ingestion: no write is lost to it, none slips by it, and it never outlives its owner or its time."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

import db
from db.locks import LOCK_CLASS, Purpose
from db.pause import current_pause, end_pause, lapsed_pause, pause_for_operator
from tests.integration.counting import items

_ROWS = "SELECT count(*) FROM embeddings"
_LOCK_QUEUE = f"""
    SELECT count(*) FROM pg_locks
    WHERE locktype = 'advisory' AND NOT granted AND classid = {LOCK_CLASS} AND objid = {int(Purpose.WRITERS)}
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

# A process that pauses ingestion, says so, and then only waits to be killed.
_OWNER = """
import sys, time, db
store = db.connect(sys.argv[1], False)
store.pause_ingestion("owned by another process")
print("paused", flush=True)
time.sleep(600)
"""


def document(number):
    return {"id": f"{number:05}", "text": f"text {number}", "embedding": [float(number + 1)] * 8}


@pytest.fixture
def second(database_url):
    """Another store on the same database, as another process has it."""
    with db.connect(database_url, False) as store:
        yield store


@pytest.fixture
def patient(database_url):
    """A store whose writes wait for a pause to end."""
    with db.connect(database_url, False, on_pause="wait", pause_wait_s=30) as store:
        yield store


def count_in_transaction(store):
    with store.transaction() as connection:
        return connection.exec_driver_sql(_ROWS).scalar_one()


WRITES = {
    "batch_upsert": lambda store: store.batch_upsert([document(2)]),
    "delete": lambda store: store.delete(["00001"]),
    "delete_by_source_id": lambda store: store.delete_by_source_id("batch"),
    "cleanup_orphaned": lambda store: store.cleanup_orphaned(),
    "transaction": count_in_transaction,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_kind_of_write_is_refused_while_paused(store, second, sql, write):
    second.batch_upsert([document(1), {"id": "orphan", "text": "without a vector"}])
    before = sql("SELECT * FROM embeddings ORDER BY id")
    store.pause_ingestion("the tables are made anew")
    with pytest.raises(
        db.PausedError, match=r"paused by .*since .*until .*the tables are made anew; 'vectorkeep resume'"
    ):
        write(second)
    assert sql("SELECT * FROM embeddings ORDER BY id") == before
    store.resume_ingestion()
    write(second)


def test_embedding_and_syncing_are_refused_too(embedding_store, sql):
    embedding_store.embed_batch(items(3))
    embedding_store.pause_ingestion("no more")
    with pytest.raises(db.PausedError):
        embedding_store.embed_batch(items(5))
    with pytest.raises(db.PausedError):
        embedding_store.sync([], source_id="s0", allow_empty=True)
    assert sql(_ROWS) == [(3,)]


def test_what_writes_nothing_goes_on(store, second):
    second.batch_upsert([document(1)])
    store.pause_ingestion("searches go on")
    assert second.batch_upsert([document(1)]).unchanged == 1
    assert [hit.id for hit in second.search([1.0] * 8)] == ["00001"]
    assert [found.id for found in second.get(["00001"])] == ["00001"]


def test_a_write_under_way_is_waited_for_and_seen(store, second, sql, until):
    with ThreadPoolExecutor(1) as threads:
        with second.transaction() as connection:
            connection.exec_driver_sql("INSERT INTO embeddings (id, text) VALUES ('in flight', 'text')")
            second.record_write(connection, everything=True)
            pausing = threads.submit(store.pause_ingestion, "wait for it")
            until(lambda: sql(_LOCK_QUEUE) == [(1,)])
            assert not pausing.done()
        pausing.result(timeout=10)
    assert sql(_ROWS) == [(1,)]


def test_newer_writers_are_told_at_once_while_an_older_one_is_waited_for(store, second, database_url, sql, until):
    with ThreadPoolExecutor(1) as threads, db.connect(database_url, False) as third:
        with second.transaction():
            pausing = threads.submit(store.pause_ingestion, "wait for it")
            until(lambda: sql(_LOCK_QUEUE) == [(1,)])
            with pytest.raises(db.PausedError):
                third.batch_upsert([document(1)])
            assert not pausing.done()
        pausing.result(timeout=10)


def test_a_write_that_waits_for_the_lock_sees_the_pause_taken_meanwhile(store, second, admin, sql, until):
    """Its statement began before the pause was committed: an older snapshot must not let it through."""
    admin.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.WRITERS)))
    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(second.batch_upsert, [document(1)])
        until(lambda: sql(_LOCK_QUEUE) == [(1,)])
        pausing = threads.submit(store.pause_ingestion, "taken meanwhile")
        until(lambda: sql("SELECT count(*) FROM ingestion_pause") == [(1,)])
        admin.execute("SELECT pg_advisory_unlock(%s, %s)", (LOCK_CLASS, int(Purpose.WRITERS)))
        with pytest.raises(db.PausedError):
            writing.result(timeout=10)
        pausing.result(timeout=10)
    assert sql(_ROWS) == [(0,)]


def test_nothing_is_written_between_pause_and_resume_and_nothing_is_lost(store, database_url, sql):
    """Writers in threads, each with its own store: what was acknowledged is there, during the pause nothing comes."""
    acknowledged = []
    stop = threading.Event()

    def write(worker):
        with db.connect(database_url, False, on_pause="wait") as own:
            number = 0
            while not stop.is_set():
                given = document(worker * 10_000 + number)
                assert own.batch_upsert([given]).inserted == 1
                acknowledged.append(given["id"])
                number += 1

    with ThreadPoolExecutor(3) as threads:
        writers = [threads.submit(write, n) for n in range(3)]
        try:
            for _ in range(4):
                seen = len(acknowledged)
                while len(acknowledged) < seen + 20:
                    assert not any(w.done() for w in writers)
                store.pause_ingestion("look")
                first = sql(_ROWS)
                again = sql("SELECT count(*), pg_sleep(0.2) FROM embeddings")
                assert again[0][0] == first[0][0] >= seen
                store.resume_ingestion()
        finally:
            stop.set()
        for writer in writers:
            writer.result(timeout=30)
    assert sql("SELECT id FROM embeddings ORDER BY id") == [(id_,) for id_ in sorted(acknowledged)]


def test_a_patient_writer_waits_for_the_end(store, patient, sql, caplog, until):
    caplog.set_level("INFO", "vectorkeep")
    store.pause_ingestion("soon over")
    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(patient.batch_upsert, [document(1)])
        counting = threads.submit(count_in_transaction, patient)
        until(lambda: caplog.text.count("write.waits_for_resume") == 2)
        assert sql(_ROWS) == [(0,)]
        assert not writing.done()
        store.resume_ingestion()
        assert writing.result(timeout=10).inserted == 1
        assert counting.result(timeout=10) in (0, 1)


def test_a_patient_load_that_is_interrupted_waits_no_longer(store, patient):
    def documents():
        yield from (document(number) for number in range(2, 4))
        raise KeyboardInterrupt

    store.pause_ingestion("backup")
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        patient.batch_upsert(documents(), batch_size=2)
    assert time.monotonic() - begun < 15, "as long as it would have waited otherwise"


def test_a_patient_transaction_waits_with_nothing_open_and_holds_no_connection(store, database_url, sql, caplog, until):
    """The server ends a session that waits inside a transaction, and of a pool of one the wait itself needs it."""
    caplog.set_level("INFO", "vectorkeep")
    store.pause_ingestion("longer than a session may be idle in a transaction")
    limits = {"pool_max": 1, "pool_timeout_s": 2, "idle_in_transaction_timeout_s": 0.3}
    with (
        db.connect(database_url, False, on_pause="wait", pause_wait_s=30, **limits) as patient,
        ThreadPoolExecutor(1) as threads,
    ):
        counting = threads.submit(count_in_transaction, patient)
        until(lambda: "write.waits_for_resume" in caplog.text)
        sql("SELECT pg_sleep(0.6)")
        assert patient.get(["00001"]) == []
        assert not counting.done()
        store.resume_ingestion()
        assert counting.result(timeout=10) == 0


def test_a_patient_writer_gives_up_when_its_time_is_over(store, database_url, sql):
    store.pause_ingestion("for long")
    with (
        db.connect(database_url, False, on_pause="wait", pause_wait_s=0.3) as other,
        pytest.raises(db.PausedError, match=r"waited 0\.3 s: ingestion is paused by .*for long"),
    ):
        other.batch_upsert([document(1)])
    assert sql(_ROWS) == [(0,)]


def test_a_pause_ends_with_its_time(store, second, sql):
    second.batch_upsert([document(0)])  # the model is registered, which takes a while
    store.pause_ingestion("short", ttl_s=2)
    with pytest.raises(db.PausedError):
        second.batch_upsert([document(1)])
    sql("SELECT pg_sleep_until(expires_at) FROM ingestion_pause")
    assert second.batch_upsert([document(1)]).inserted == 1


@pytest.mark.every_server
def test_a_pause_ends_when_its_owner_is_killed(store, database_url, admin, until):
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, database_url], env=os.environ | {"PYTHONPATH": "."}, stdout=subprocess.PIPE
    )
    try:
        assert owner.stdout.readline() == b"paused\n"
        with pytest.raises(db.PausedError, match="owned by another process"):
            store.batch_upsert([document(1)])
        os.kill(owner.pid, signal.SIGKILL)
        until(lambda: current_pause(admin) is None)
        assert store.batch_upsert([document(1)]).inserted == 1
        assert lapsed_pause(admin).reason == "owned by another process"
        store.resume_ingestion()
        assert lapsed_pause(admin) is None
    finally:
        owner.kill()
        owner.communicate()


def test_a_pause_ends_when_its_session_is_killed_or_its_store_is_closed(store, database_url, admin, until):
    with db.connect(database_url, False) as owner:
        owner.pause_ingestion("first")
        admin.execute("SELECT pg_terminate_backend(owner_pid) FROM ingestion_pause")
        until(lambda: current_pause(admin) is None)
        owner.pause_ingestion("second")
        assert current_pause(admin).reason == "second"
    assert current_pause(admin) is None
    assert lapsed_pause(admin) is None


def test_a_pause_of_somebody_else_is_not_overwritten(store, second, admin):
    store.pause_ingestion("mine")
    with pytest.raises(db.BusyError, match=r"paused already by .*mine"):
        second.pause_ingestion("another's")
    with pytest.raises(db.BusyError):
        pause_for_operator(admin, "an operator's", ttl_s=60)
    store.pause_ingestion("mine still", ttl_s=60)
    assert current_pause(admin).reason == "mine still"


def test_anybody_may_end_a_pause(store, second, admin):
    store.pause_ingestion("mine")
    second.resume_ingestion()
    assert current_pause(admin) is None
    second.pause_ingestion("now the other's")
    store.resume_ingestion()
    assert second.batch_upsert([document(1)]).inserted == 1


def test_an_operators_pause_outlives_its_connection_and_may_be_begun_anew(store, database_url, admin):
    with psycopg.connect(database_url, autocommit=True) as connection:
        pause_for_operator(connection, "first", ttl_s=60)
    with psycopg.connect(database_url, autocommit=True) as connection:
        longer = pause_for_operator(connection, "longer", ttl_s=3600)
    with pytest.raises(db.PausedError, match="longer"):
        store.batch_upsert([document(1)])
    with pytest.raises(db.BusyError, match="longer"):
        store.pause_ingestion("a program's")
    assert end_pause(admin) == longer
    assert store.batch_upsert([document(1)]).inserted == 1


def test_a_write_that_does_not_end_is_named_and_nothing_stays_paused(store, second, admin, monkeypatch):
    monkeypatch.setattr("db.pause._IN_FLIGHT_WAIT_S", 0.2)
    with second.transaction(), ThreadPoolExecutor(1) as threads:
        pausing = threads.submit(store.pause_ingestion, "in vain")
        with pytest.raises(db.BusyError, match=r"a write of process \d+ .* has not ended within 0\.2 s"):
            pausing.result(timeout=10)
    assert current_pause(admin) is None
    assert second.batch_upsert([document(1)]).inserted == 1


def test_a_pause_inside_a_transaction_of_ones_own_is_refused(store):
    with store.transaction(), pytest.raises(db.ValidationError, match="inside transaction"):
        store.pause_ingestion("it would wait for itself")


@pytest.mark.parametrize(
    ("reason", "ttl_s"), [("", 60), ("NUL \0", 60), ("why", 0), ("why", float("nan")), ("why", 1e12)]
)
def test_a_reason_and_a_time_that_make_no_sense_are_refused(store, admin, reason, ttl_s):
    with pytest.raises(db.ValidationError, match=r"reason|ttl_s"):
        store.pause_ingestion(reason, ttl_s=ttl_s)
    assert current_pause(admin) is None
    store.pause_ingestion("backup")
    with pytest.raises(db.ValidationError, match=r"reason|ttl_s"):
        store.pause_ingestion(reason, ttl_s=ttl_s)
    assert current_pause(admin).reason == "backup"


def test_a_server_that_ends_idle_sessions_does_not_end_a_pause(database_url, admin, sql, until):
    [(name,)] = sql("SELECT quote_ident(current_database())")
    sql(f"ALTER DATABASE {name} SET idle_session_timeout = '50ms'")
    with db.connect(database_url, False, maintenance_on_close=False) as store:
        store.pause_ingestion("backup")
        with psycopg.connect(database_url, autocommit=True) as another:  # idle for as long
            pid = another.info.backend_pid
            until(lambda: sql("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", pid) == [(0,)])
        assert current_pause(admin).reason == "backup"


def test_a_role_that_could_write_before_may_see_pauses(database_url, sql):
    """The migration gives SELECT to whom it finds writing; new tables would lock them out."""
    role = f"writer_{os.getpid()}"
    sql(f"CREATE ROLE {role}")
    try:
        from db.migrate import downgrade, upgrade

        sql(f"GRANT INSERT ON write_log TO {role}")
        downgrade(database_url, "0004", drop_rows=True)
        upgrade(database_url)
        assert sql("SELECT has_table_privilege(%s, 'ingestion_pause', 'SELECT')", role) == [(True,)]
    finally:
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")
