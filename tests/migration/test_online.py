"""Migrations of a store in use: writers and readers go on, and none waits long for them."""

import itertools
import threading
import time
from contextlib import suppress

import psycopg
import pytest
from alembic.script import ScriptDirectory

from db.errors import BusyError
from db.migrate import alembic_config, upgrade
from db.write_triggers import set_write_triggers
from tests.integration.roles_of import roles_of

LOCK_TIMEOUT_S = 2.0
# What a loaded machine adds to a statement that waited for a lock: the fsync-less servers of the tests answer each
# of these in some milliseconds, but two cores are shared by all of this and by whatever else runs.
MARGIN_S = 2.5
# Nobody queues behind a migration for longer than a stint of 0.1 s, for each table that it locks.
STINTS_S = 0.2

ROWS = 4000
FILL = f"""
    INSERT INTO embeddings (id, source_id, text, embedding, metadata)
    SELECT 'd' || n, 's' || n % 9, 'text ' || n, ARRAY[n, 1, 2, 3]::vector, '{{"workspace": "w"}}'
    FROM generate_series(1, {ROWS}) AS n;
    INSERT INTO chunks (id, document_id, chunk_index, text, embedding)
    SELECT 'd' || n || '#' || i, 'd' || n, i, 'piece', ARRAY[n, i, 2, 3]::vector
    FROM generate_series(1, {ROWS}) AS n, generate_series(0, 1) AS i;
"""
# Transactions of a program that knows the oldest shape alone, in every order in which rows and tables can be locked.
DOCUMENT_FIRST = (
    "INSERT INTO embeddings (id, source_id, text, embedding) VALUES (%(low)s, 's', 'new', '[1,2,3,4]') "
    "ON CONFLICT (id) DO UPDATE SET text = excluded.text, embedding = excluded.embedding, updated_at = now()",
    "DELETE FROM chunks WHERE document_id = %(low)s",
    "INSERT INTO chunks (id, document_id, chunk_index, text) VALUES (%(low)s || '#0', %(low)s, 0, 'new')",
)
CHUNKS_FIRST = (
    "DELETE FROM chunks WHERE document_id = %(low)s",
    "DELETE FROM embeddings WHERE id = %(low)s",
    "INSERT INTO embeddings (id, text) VALUES (%(low)s, 'again')",
)
LATER_ROW_FIRST = (
    "UPDATE embeddings SET metadata = metadata || '{\"x\": 1}' WHERE id = %(high)s",
    "UPDATE chunks SET metadata = '{}' WHERE document_id = %(high)s",
    "UPDATE embeddings SET metadata = metadata || '{\"x\": 2}' WHERE id = %(low)s",
    "UPDATE chunks SET metadata = '{}' WHERE document_id = %(low)s",
)
SEARCH = ("SELECT id FROM embeddings ORDER BY embedding <=> '[1,2,3,4]' LIMIT 5",)
SLOW_READER = ("SELECT count(*) FROM chunks", "SELECT pg_sleep(0.3)", "SELECT count(*) FROM embeddings")


class Users:
    """Threads that each run one transaction over and over; what the longest statement took, and what failed."""

    def __init__(self, url):
        self.url = url
        self.longest = {}
        self.failed = []
        self.done = {}
        self._stop = threading.Event()
        self._threads = []

    def begin(self, name, statements):
        first_row = 1000 * len(self._threads)
        self._threads.append(threading.Thread(target=self._work, args=(name, statements, first_row)))
        self._threads[-1].start()

    def end(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, name, statements, first_row):
        try:
            with psycopg.connect(self.url, autocommit=True) as connection:
                for number in itertools.count(1):
                    if self._stop.is_set():
                        return
                    row = first_row + 1 + number % 400
                    rows = {"low": f"d{row}", "high": f"d{row + 500}"}  # no other user's: none waits for another
                    with connection.transaction():
                        for statement in statements:
                            self._run(connection, name, statement, rows)
                    self.done[name] = number
        except psycopg.Error as exc:
            self.failed.append(f"{name}: {exc}")

    def _run(self, connection, name, statement, rows):
        started = time.monotonic()
        connection.execute(statement, rows if "%(" in statement else None)
        if "pg_sleep" not in statement:
            self.longest[name] = max(self.longest.get(name, 0), time.monotonic() - started)


def test_an_upgrade_under_load_is_waited_for_by_nobody(empty_database_url, empty):
    upgrade(empty_database_url, "0001")
    empty.execute(FILL)
    users = Users(empty_database_url)
    users.begin("document first", DOCUMENT_FIRST)
    users.begin("chunks first", CHUNKS_FIRST)
    users.begin("later row first", LATER_ROW_FIRST)
    users.begin("search", SEARCH)
    users.begin("slow reader", SLOW_READER)
    try:
        until(lambda: len(users.done) == 5 or users.failed)
        before = dict(users.done)
        until_at_head(empty_database_url)
    finally:
        users.end()
    assert users.failed == []
    assert all(users.done[name] > before[name] for name in before), "somebody stood still"
    assert max(users.longest.values()) < LOCK_TIMEOUT_S + MARGIN_S, users.longest
    filled = "SELECT count(*), count(*) FILTER (WHERE text LIKE 'text %' AND text_hash IS NULL) FROM embeddings"
    assert empty.execute(filled).fetchone() == (ROWS, 0)


def until_at_head(url):
    """As an operator does: an upgrade that did not get a lock is run again."""
    for _ in range(10):
        with suppress(BusyError):
            upgrade(url, lock_timeout_s=LOCK_TIMEOUT_S)
            return
    pytest.fail("ten upgrades did not get their locks")


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.01)


READ_DOCUMENTS, READ_CHUNKS = "SELECT FROM embeddings", "SELECT FROM chunks"
WRITE_DOCUMENT = "UPDATE embeddings SET text = text WHERE id = 'd1'"
WRITE_CHUNK = "UPDATE chunks SET text = text WHERE id = 'd1#0'"
READ_MODELS, READ_BUILDS = "SELECT FROM embedding_models", "SELECT FROM index_builds"


class Running:
    """A call in a thread of its own, and its outcome."""

    def __init__(self, call):
        self.outcome = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call):
        try:
            self.outcome = call()
        except Exception as exc:  # noqa: BLE001  (whatever it is, the test fails with it)
            self.outcome = exc

    def end(self):
        self._thread.join()
        return self.outcome


@pytest.mark.parametrize(
    ("revision", "first", "then"),
    [
        ("0002", READ_DOCUMENTS, READ_CHUNKS),
        ("0002", READ_CHUNKS, READ_DOCUMENTS),
        ("0004", WRITE_DOCUMENT, WRITE_CHUNK),
        ("0004", WRITE_CHUNK, WRITE_DOCUMENT),
        ("0005", READ_MODELS, READ_BUILDS),
        ("0005", READ_BUILDS, READ_MODELS),
    ],
)
def test_nobody_queues_behind_a_migration_that_waits(empty_database_url, empty, revision, first, then):
    """Nor is anybody cancelled for a deadlock with it, in whichever order they lock the tables."""
    before = f"{int(revision) - 1:04}"
    upgrade(empty_database_url, before)
    empty.execute("INSERT INTO embeddings (id, text) VALUES ('d1', 't'), ('d2', 't')")
    empty.execute("INSERT INTO chunks (id, chunk_index, text) VALUES ('d1#0', 0, 't'), ('d2#0', 0, 't')")
    with psycopg.connect(empty_database_url) as holder:
        holder.execute(first)
        waits = threading.Event()
        migration = Running(
            lambda: upgrade(empty_database_url, revision, lock_timeout_s=10, on_wait=lambda _: waits.set())
        )
        try:
            assert waits.wait(30)
            took = [seconds(empty, statement.replace("d1", "d2")) for statement in (first, then) * 4]
            took.append(seconds(holder, then))
        finally:
            holder.rollback()
            outcome = migration.end()
    assert outcome == (before, revision)
    assert max(took) < STINTS_S + MARGIN_S, took


def seconds(connection, statement):
    started = time.monotonic()
    connection.execute(statement)
    return time.monotonic() - started


@pytest.fixture
def roles(database_url):
    with roles_of(database_url) as made:
        yield made


def with_triggers(roles):
    set_write_triggers(roles.database_url, wanted=True)


def without_triggers(roles):
    set_write_triggers(roles.database_url, wanted=False)


def with_roles(roles):
    roles.make()


def with_tenants(roles):
    roles.make(tenants=True)


WAITING = """
    SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE datname = current_database() AND locktype = 'relation' AND NOT granted
"""


@pytest.mark.parametrize(
    ("before", "alter", "first", "then"),
    [
        (None, with_triggers, WRITE_DOCUMENT, WRITE_CHUNK),
        (None, with_triggers, WRITE_CHUNK, WRITE_DOCUMENT),
        (with_triggers, without_triggers, READ_DOCUMENTS, READ_CHUNKS),
        (with_triggers, without_triggers, READ_CHUNKS, READ_DOCUMENTS),
        (None, with_roles, READ_MODELS, READ_BUILDS),
        (None, with_roles, READ_BUILDS, READ_MODELS),
        (with_roles, with_tenants, READ_DOCUMENTS, READ_CHUNKS),
        (with_roles, with_tenants, READ_CHUNKS, READ_DOCUMENTS),
    ],
)
def test_nor_behind_one_that_makes_roles_or_triggers(database_url, roles, monkeypatch, before, alter, first, then):
    monkeypatch.setenv("VECTORKEEP_LOCK_TIMEOUT_S", "10")
    if before is not None:
        before(roles)
    with psycopg.connect(database_url, autocommit=True) as other, psycopg.connect(database_url) as holder:
        other.execute("INSERT INTO embeddings (id, text) VALUES ('d1', 't'), ('d2', 't')")
        other.execute("INSERT INTO chunks (id, chunk_index, text) VALUES ('d1#0', 0, 't'), ('d2#0', 0, 't')")
        holder.execute(first)
        running = Running(lambda: alter(roles))
        try:
            until(lambda: other.execute(WAITING).fetchone() != (0,))
            took = [seconds(other, statement.replace("d1", "d2")) for statement in (first, then) * 4]
            took.append(seconds(holder, then))
        finally:
            holder.rollback()
            outcome = running.end()
    assert outcome is None
    assert max(took) < STINTS_S + MARGIN_S, took


def test_the_fill_waits_for_no_row_while_it_holds_others(database_url):
    revision = ScriptDirectory.from_config(alembic_config()).get_revision("0002").module
    fill = revision.FILL.format(table="embeddings", update=revision.FILL_EMBEDDINGS)
    waiting = """
        SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
        WHERE datname = current_database() AND locktype = 'transactionid' AND NOT granted
    """
    with psycopg.connect(database_url) as writer, psycopg.connect(database_url, autocommit=True) as filler:
        filler.execute("INSERT INTO embeddings (id, text) SELECT 'd' || n, 't' FROM generate_series(1, 9) AS n")
        writer.execute("UPDATE embeddings SET metadata = '{\"workspace\": \"w\"}' WHERE id = 'd9'")
        thread = threading.Thread(target=filler.execute, args=(fill,))
        thread.start()
        try:
            until(lambda: writer.execute(waiting).fetchone() == (1,))
            started = time.monotonic()
            writer.execute("UPDATE embeddings SET text = text WHERE id < 'd9'")
            took = time.monotonic() - started
        finally:
            writer.commit()
            thread.join()
        assert took < MARGIN_S
        filled = "SELECT count(*), max(workspace) FROM embeddings WHERE text_hash = sha256(convert_to(text, 'UTF8'))"
        assert writer.execute(filled).fetchone() == (9, "w")
