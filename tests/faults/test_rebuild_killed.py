"""Rebuilds that are killed, and rebuilds in the middle of traffic: the store is the old one or the new one, always."""

import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from alembic import command as alembic

import db
from db.config import Settings
from db.migrate import alembic_config
from db.pause import current_pause
from db.rebuild import rebuild
from db.rebuild_plan import RebuildPlan
from db.rebuild_runs import clear_remains, previous_tables, unfinished_rebuild
from db.rollback import roll_back
from tests.acceptance.conftest import ROOT, environment, forked
from tests.integration.counting import Counting, items, vector_of

CONTENTS = (
    "SELECT * FROM embeddings ORDER BY id",
    "SELECT * FROM chunks ORDER BY id",
    "SELECT * FROM embedding_models",
)
OID = "SELECT 'embeddings'::regclass::oid, 'chunks'::regclass::oid"

BEFORE_THE_SWAP = [
    "rebuild.measuring",
    "rebuild.pausing",
    "rebuild.creating",
    "rebuild.filling",
    "rebuild.copied_embeddings",
    "rebuild.copied_chunks",
    "rebuild.indexing",
    "rebuild.indexed_embeddings",
    "rebuild.indexed_chunks",
    "rebuild.checking",
    "rebuild.swapping",
    "swap.before_commit",
]


@pytest.fixture
def admin(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def filled(database_url, redis_url):
    with db.connect(database_url, redis_url, embedder=Counting()) as store:
        store.embed_batch(items(1200))
        yield store


def contents(admin):
    return [admin.execute(statement).fetchall() for statement in CONTENTS]


def run(database_url, *arguments, fault):
    env = environment(VECTORKEEP_DATABASE_URL=database_url, VECTORKEEP_REDIS_URL="off", VECTORKEEP_FAULT=fault)
    return subprocess.run(
        forked("rebuild", *arguments), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def told_by_the_doctor(store):
    [finding] = [finding for finding in store.doctor() if finding.check == "rebuild"]
    assert finding.status == "warn"
    return finding.evidence


@pytest.mark.parametrize("point", BEFORE_THE_SWAP)
def test_killed_before_the_swap_the_old_store_is_intact(filled, admin, database_url, until, point):
    before, oids = contents(admin), admin.execute(OID).fetchall()
    killed = run(database_url, fault=f"{point}:kill")
    assert killed.returncode == -9, killed.stderr
    until(lambda: unfinished_rebuild(admin) is not None)  # the server has noticed
    assert "the store is as it was before" in told_by_the_doctor(filled)
    assert contents(admin) == before
    assert admin.execute(OID).fetchall() == oids
    alembic.check(alembic_config(database_url))
    assert filled.search(vector_of("text number 7"), 1)[0].id == "00007"
    until(lambda: current_pause(admin) is None)
    filled.batch_upsert([{"id": "later", "text": "writers are let in again"}])
    filled.delete(["later"])
    if point == "swap.before_commit":  # for once by the next run
        assert run(database_url, fault="").returncode == 0
        assert admin.execute(OID).fetchall() != oids
    else:
        assert clear_remains(admin) is not None
    assert unfinished_rebuild(admin) is None
    assert clear_remains(admin) is None
    assert admin.execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'vectorkeep_shadow'").fetchall() == [(0,)]
    assert contents(admin) == before
    alembic.check(alembic_config(database_url))


@pytest.mark.every_server
def test_killed_right_after_the_swap_the_new_store_is_complete(filled, admin, database_url, until):
    before, oids = contents(admin), admin.execute(OID).fetchall()
    query = vector_of("text number 7")
    filled.search(query)
    assert run(database_url, fault="rebuild.swapped:kill").returncode == -9
    until(lambda: unfinished_rebuild(admin) is not None)
    assert "it had ended, and the store lacks nothing" in told_by_the_doctor(filled)
    assert contents(admin) == before
    assert admin.execute(OID).fetchall() != oids
    assert previous_tables(admin) is not None
    alembic.check(alembic_config(database_url))
    found = filled.search(query, 1)
    assert (found[0].id, found.cached) == ("00007", False)
    assert clear_remains(admin) is not None
    assert filled.batch_upsert([{"id": "later", "text": "writers are let in again"}]).inserted == 1


def test_a_rollback_that_is_killed_changes_nothing(filled, admin, database_url, until):
    assert run(database_url, fault="").returncode == 0
    before, oids = contents(admin), admin.execute(OID).fetchall()
    assert run(database_url, "--rollback", fault="swap.before_commit:kill").returncode == -9
    until(lambda: unfinished_rebuild(admin) is not None)
    assert (contents(admin), admin.execute(OID).fetchall()) == (before, oids)
    assert run(database_url, "--rollback", fault="").returncode == 0
    assert contents(admin) == before
    assert admin.execute(OID).fetchall() != oids


def test_an_interrupted_one_tidies_up_after_itself(filled, admin, database_url):
    before = contents(admin)
    stopped = run(database_url, fault="rebuild.checking:raise")
    assert stopped.returncode == 70
    assert unfinished_rebuild(admin) is None
    assert current_pause(admin) is None
    assert contents(admin) == before


# -- in the middle of traffic --------------------------------------------------------------------------

# Between two calls of a thread: without a breath the six of them leave the rebuild, in this process, next to no time.
PACE_S = 0.05


def version(number):
    """All documents of the source `kept`, their text and metadata telling which version they are of."""
    return [
        {"id": f"v{n:04}", "text": f"version {number} of {n}", "metadata": {"version": number}, "source_id": "kept"}
        for n in range(1100)
    ]


class Traffic:
    """Searches and writes from many threads, as long as nobody stops them. Every failure is raised at the end."""

    def __init__(self, database_url, redis_url):
        self.url, self.redis_url = database_url, redis_url
        self.stop = threading.Event()
        self.searches = Counter()
        self.acknowledged = []

    def searching(self, level, redis_url):
        with db.connect(self.url, redis_url, embedder=Counting()) as store:
            number = 0
            while not self.stop.wait(PACE_S):
                number += 1
                found = store.search(vector_of(f"{level} {number % 50}"), 10, level=level, source_id="kept")
                versions = {hit.metadata["version"] for hit in found}
                assert len(found) == 10, f"{len(found)} hits"
                assert len(versions) == 1, f"a mixture of {versions}"
                assert {hit.text.split()[1] for hit in found} == {str(*versions)}
                self.searches[level, *versions] += 1

    def reading(self):
        with db.connect(self.url, False) as store:
            while not self.stop.wait(PACE_S):
                [document] = store.get(["v0007"])
                assert document.chunks[0].text == document.text
                assert document.text == f"version {document.metadata['version']} of 7"
                self.searches["get", document.metadata["version"]] += 1

    def writing(self, worker):
        with db.connect(self.url, self.redis_url, embedder=Counting(), on_pause="wait") as store:
            number = 0
            while not self.stop.wait(PACE_S):
                id_ = f"w{worker}-{number:06}"
                result = store.embed_batch([{"id": id_, "text": f"written {id_}", "source_id": "written"}])
                assert result.inserted == 1
                self.acknowledged.append(id_)
                number += 1


def test_no_search_fails_and_no_write_is_lost_while_the_tables_are_exchanged(database_url, redis_url, admin):
    settings = Settings.load({"database_url": database_url, "redis_url": redis_url})
    with db.connect(database_url, redis_url, embedder=Counting()) as store:
        store.embed_batch(version(0))
    traffic = Traffic(database_url, redis_url)
    with ThreadPoolExecutor(6) as threads:
        running = [
            threads.submit(traffic.searching, "documents", redis_url),
            threads.submit(traffic.searching, "documents", False),
            threads.submit(traffic.searching, "chunks", redis_url),
            threads.submit(traffic.reading),
            threads.submit(traffic.writing, 1),
            threads.submit(traffic.writing, 2),
        ]
        try:
            for number in (1, 2):
                written = len(traffic.acknowledged)
                rebuild(settings, RebuildPlan(sources={"kept": lambda n=number: version(n)}), Counting())
                while len(traffic.acknowledged) < written + 3 or not traffic.searches["chunks", number]:
                    assert not any(thread.done() for thread in running)
            roll_back(settings, force=True)
            while not traffic.searches["documents", 1] or not traffic.searches["get", 1]:
                assert not any(thread.done() for thread in running)
        finally:
            traffic.stop.set()
        for thread in running:
            thread.result(timeout=60)
    assert all(traffic.searches[level, number] for level in ("documents", "chunks", "get") for number in (0, 1, 2))
    present = {row[0] for row in admin.execute("SELECT id FROM embeddings WHERE source_id = 'written'")}
    present |= {row[0] for row in admin.execute("SELECT id FROM vectorkeep_previous.embeddings")}
    assert set(traffic.acknowledged) <= present  # those that the rollback, told to, left behind are still there
    alembic.check(alembic_config(database_url))
