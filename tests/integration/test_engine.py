"""Connections: lost ones are replaced, missing ones are told in time, and nothing piles up."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np
import psycopg
import pytest
import sqlalchemy
import sqlalchemy.exc

import db
from db import ClosedError, SchemaError, UnavailableError
from db.config import Settings
from db.engine import Database
from db.locks import LOCK_CLASS, Purpose

VECTOR = [1.0, *[0.0] * 7]
POOL_MAX = 2


@pytest.fixture
def small(database_url, redis_url):
    with db.connect(database_url, redis_url, model_id="test-model", dimensions=8, pool_max=POOL_MAX) as store:
        store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])
        yield store


def assert_works(store):
    """With more calls at once than the pool has connections."""
    with ThreadPoolExecutor(2 * POOL_MAX) as threads:
        found = list(threads.map(lambda _: store.get(["a"])[0].id, range(4 * POOL_MAX)))
    assert found == ["a"] * len(found)
    assert len(store.search(VECTOR, 1)) == 1
    assert store.batch_upsert([{"id": "b", "text": f"{time.monotonic()}"}]).failed == 0


def kill(sql, pid):
    assert sql("SELECT pg_terminate_backend(%s, 5000)", pid) == [(True,)]


# -- lost connections ----------------------------------------------------------------------------------------


def test_connections_killed_while_idle_are_replaced_unnoticed(small, sql):
    for _ in range(2 * POOL_MAX):
        kill_all = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'vectorkeep'"
        sql(f"{kill_all} AND datname = current_database()")
        with small.pool.connection() as connection:
            connection.execute("SELECT 1")
        assert_works(small)


def test_a_connection_is_asked_whether_it_works_but_not_where_it_has_just_answered(small, sql, monkeypatch):
    with small.pool.connection() as connection:
        pid = connection.info.backend_pid
        connection.execute("SELECT 'mine'")

    def last_statement_once_taken():
        with ExitStack() as taken:
            while taken.enter_context(small.pool.connection()).info.backend_pid != pid:
                pass
            return sql("SELECT query FROM pg_stat_activity WHERE pid = %s", pid)

    monkeypatch.setattr("db.engine._TRUSTED_S", 600.0)
    assert last_statement_once_taken() == [("SELECT 'mine'",)]
    monkeypatch.setattr("db.engine._TRUSTED_S", 0.0)
    assert last_statement_once_taken() == [("",)]


def test_connections_killed_in_use_go_back_to_the_pool(small, sql):
    for _ in range(2 * POOL_MAX):
        with small.pool.connection() as connection:
            kill(sql, connection.info.backend_pid)
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
    assert_works(small)
    assert small.pool.get_stats()["pool_size"] <= POOL_MAX


def test_connections_killed_in_use_under_sqlalchemy_go_back_to_the_pool(small, sql):
    for _ in range(2 * POOL_MAX):
        with small.engine.connect() as connection:
            kill(sql, connection.connection.driver_connection.info.backend_pid)
            with pytest.raises(sqlalchemy.exc.OperationalError):
                connection.execute(sqlalchemy.text("SELECT 1"))
    assert_works(small)
    assert small.pool.get_stats()["pool_size"] <= POOL_MAX


def test_connections_killed_between_statements_under_sqlalchemy_go_back_to_the_pool(small, sql):
    for _ in range(2 * POOL_MAX):
        with suppress(sqlalchemy.exc.OperationalError), small.engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
            kill(sql, connection.connection.driver_connection.info.backend_pid)
    assert_works(small)


def test_connections_killed_at_sqlalchemys_first_look_go_back_to_the_pool(database_url, redis_url, sql, monkeypatch):
    """It asks the first connection of an engine what server that is, and where this fails forgets the connection."""
    checkout = Database._checkout

    def dying(database):
        connection = checkout(database)
        sql("SELECT pg_terminate_backend(%s, 10000)", connection.info.backend_pid)
        return connection

    monkeypatch.setattr(Database, "_checkout", dying)
    with db.connect(database_url, redis_url, pool_max=POOL_MAX) as store:
        for _ in range(POOL_MAX + 1):
            with pytest.raises(sqlalchemy.exc.OperationalError, match="terminating connection"):
                store.engine.connect()
        assert store.batch_upsert([{"id": "a", "text": "t"}]).inserted == 1


def test_a_write_whose_connection_is_killed_is_done_once_by_another(small, sql):
    sql("CREATE SEQUENCE tries")
    sql("""
        CREATE FUNCTION die_twice() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('tries') <= 2 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
            RETURN NEW;
        END $$
    """)
    sql("CREATE TRIGGER die BEFORE INSERT ON embeddings FOR EACH ROW EXECUTE FUNCTION die_twice()")
    before = sql("SELECT count(*) FROM write_log")[0][0]
    assert small.batch_upsert([{"id": "b", "text": "t", "chunks": [{"text": "c"}]}]).inserted == 1
    assert sql("SELECT count(*) FROM write_log") == [(before + 1,)]
    assert sql("SELECT count(*) FROM chunks") == [(1,)]


# -- nothing piles up ----------------------------------------------------------------------------------------


def test_checkouts_leave_no_handlers_and_no_open_transaction_on_a_connection(small):
    for _ in range(10):
        with small.engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
        small.get(["a"])
    with small.pool.connection() as connection:
        assert len(connection._notice_handlers) <= 1
        assert connection.autocommit
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_pooled_connection_is_the_same_after_an_error_in_sqlalchemy(small):
    for _ in range(2 * POOL_MAX):
        with pytest.raises(sqlalchemy.exc.ProgrammingError), small.engine.begin() as connection:
            connection.execute(sqlalchemy.text("SELECT nonsense"))
    assert_works(small)


def test_sessions_have_a_name_and_timeouts(small):
    with small.pool.connection() as connection:
        settings = "application_name", "statement_timeout", "idle_in_transaction_session_timeout"
        shown = [connection.execute(f"SHOW {name}").fetchone()[0] for name in settings]
    assert shown == ["vectorkeep", "30s", "1min"]


# -- missing connections -------------------------------------------------------------------------------------


def test_an_exhausted_pool_is_unavailable_after_its_timeout(database_url):
    with db.connect(database_url, False, pool_max=1, pool_timeout_s=1) as store:
        with store.pool.connection():
            started = time.monotonic()
            for call in (lambda: store.get(["a"]), lambda: store.batch_upsert([{"id": "b", "text": "t"}])):
                with pytest.raises(UnavailableError, match="no database connection became free"):
                    call()
            assert time.monotonic() - started < 12
        assert store.batch_upsert([{"id": "b", "text": "t"}]).inserted == 1


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_an_unreachable_server_is_told_at_once_and_without_password():
    started = time.monotonic()
    with pytest.raises(UnavailableError, match="cannot connect to PostgreSQL") as refused:
        db.connect(f"postgresql://u:hush@127.0.0.1:{free_port()}/d", False)
    assert time.monotonic() - started < 8
    assert "hush" not in str(refused.value)


def test_a_server_that_never_answers_is_given_up_within_the_connect_timeout():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            db.connect(f"postgresql://127.0.0.1:{listener.getsockname()[1]}/d", False, connect_timeout_s=2)
        assert time.monotonic() - started < 8


def test_a_missing_database_is_unavailable(database_url):
    with pytest.raises(UnavailableError, match="does not exist"):
        db.connect(
            f"{database_url}_missing" if "?" not in database_url else database_url.replace("?", "_missing?"), False
        )


# -- timeouts ------------------------------------------------------------------------------------------------


def test_an_older_pgvector_is_refused_at_the_opening(database_url, sql):
    sql("UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'")
    with pytest.raises(SchemaError, match=r"pgvector 0\.7\.4; expected at least 16 with 0\.8"):
        db.connect(database_url, False)


def test_connections_that_are_idle_for_long_close(database_url, sql, until):
    sessions = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'vectorkeep' AND datname = current_database()"
    )
    with db.connect(database_url, False, pool_idle_s=0.1) as store:
        store.get(["a"])
        until(lambda: sql(sessions) == [(0,)])
        assert store.get(["a"]) == []


def test_a_maintenance_url_to_another_database_is_refused_before_anything_is_done_there(
    make_database, servers, postgres_version
):
    here, other = (make_database(servers.template(postgres_version)) for _ in range(2))
    with db.connect(here, False, model_id="m", maintenance_url=other, maintenance_on_close=False) as store:
        with pytest.raises(SchemaError, match="maintenance_url leads to another database"):
            store.batch_upsert([db.Document("a", "t", VECTOR)])
        with pytest.raises(SchemaError, match="give a maintenance_url beside it, or None"):
            store.pause_ingestion("p")
        with pytest.raises(SchemaError):
            store.maintain()
    for url in (here, other):
        with db.connect(url, False, maintenance_url=None, maintenance_on_close=False) as store:
            assert (store.model, store.get(["a"])) == (None, [])
    with db.connect(here, False, model_id="m", maintenance_url=here.replace("postgresql://", "postgres://")) as store:
        assert store.batch_upsert([db.Document("a", "t", VECTOR)]).inserted == 1


def test_a_statement_that_takes_too_long_is_unavailable_and_the_store_goes_on(database_url, redis_url):
    with db.connect(database_url, redis_url, statement_timeout_s=1, pool_max=POOL_MAX) as store:
        for _ in range(2 * POOL_MAX):
            with pytest.raises(UnavailableError, match="raise statement_timeout_s"), store.transaction() as connection:
                connection.execute(sqlalchemy.text("SELECT pg_sleep(10)"))
        assert store.get(["a"]) == []


def test_a_comparison_that_takes_too_long_leaves_the_connection_as_it_was(database_url, redis_url, admin):
    """psycopg prepares what it has run five times: what the server never got to must not count as prepared."""
    embedder = db.CallableEmbedder(lambda texts: np.ones((len(texts), 2)), "ones", 2)
    with db.connect(database_url, redis_url, embedder=embedder, statement_timeout_s=1, pool_max=1) as store:
        given = [{"id": f"{n}", "text": "t"} for n in range(750)]
        store.embed_batch(given)
        for _ in range(2):
            with admin.transaction():
                admin.execute("LOCK embeddings IN ACCESS EXCLUSIVE MODE")
                with pytest.raises(UnavailableError, match="raise statement_timeout_s"):
                    store.embed_batch(given)
            assert store.embed_batch(given[:1]).skipped == 1
        assert store.embed_batch(given).skipped == 750


def test_writers_that_are_locked_out_are_told_so_and_no_document_is_blamed(database_url, redis_url, admin):
    with db.connect(database_url, redis_url, statement_timeout_s=1) as store:
        admin.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.WRITERS)))
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="writers are locked out"):
            store.batch_upsert([{"id": f"{n}", "text": "t"} for n in range(50)])
        with pytest.raises(UnavailableError, match="writers are locked out"):
            store.delete_by_source_id("s")
        with pytest.raises(UnavailableError, match="writers are locked out"), store.transaction():
            pytest.fail("it has not joined the writers")
        assert time.monotonic() - started < 10  # 50 documents, one after the other, would take 50
        admin.execute("SELECT pg_advisory_unlock_all()")
        assert store.batch_upsert([{"id": "a", "text": "t"}]).inserted == 1


# -- closing and sharing -------------------------------------------------------------------------------------


CALLS = {
    "batch_upsert": lambda s: s.batch_upsert([]),
    "embed_batch": lambda s: s.embed_batch([]),
    "search": lambda s: s.search(VECTOR),
    "get": lambda s: s.get([]),
    "delete": lambda s: s.delete([]),
    "delete_by_source_id": lambda s: s.delete_by_source_id("s"),
    "cleanup_orphaned": lambda s: s.cleanup_orphaned(),
    "iter_hashes": lambda s: list(s.iter_hashes()),
    "get_statistics": lambda s: s.get_statistics(),
    "get_diagnostics": lambda s: s.get_diagnostics(),
    "maintain": lambda s: s.maintain(),
    "transaction": lambda s: s.transaction().__enter__(),
    "embed": lambda s: s.embed("t"),
}


def test_every_call_of_a_closed_store_says_that_it_is_closed(store):
    store.close()
    store.close()
    for call in CALLS.values():
        with pytest.raises(ClosedError, match="the store is closed"):
            call(store)


def test_a_store_closed_during_a_call_says_so(store):
    def source():
        yield {"id": "a", "text": "t"}
        store.close()
        yield {"id": "b", "text": "t"}

    with pytest.raises(ClosedError, match="closed during this call"):
        store.batch_upsert(source(), batch_size=1)


def test_closing_leaves_no_connection_and_no_thread_behind(database_url, redis_url, sql, until):
    others = set(threading.enumerate())
    store = db.connect(database_url, redis_url)
    store.batch_upsert([{"id": "a", "text": "t"}])
    store.close()
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    until(lambda: sql(f"{count} AND backend_type = 'client backend'") == [(0,)])
    assert not [t.name for t in set(threading.enumerate()) - others if t.name.startswith("vectorkeep")]


def test_many_threads_share_a_store_of_few_connections(small):
    def work(n):
        small.batch_upsert([{"id": f"t{n}", "text": f"{n}", "embedding": [1.0, float(n), *[0.0] * 6]}])
        assert small.search([1.0, float(n), *[0.0] * 6], 1)[0].text
        return small.get([f"t{n}"])[0].text

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(40))) == [f"{n}" for n in range(40)]


@pytest.mark.parametrize("threshold", [0, 1, None])
def test_statements_may_be_prepared_at_once_or_never(database_url, threshold):
    with db.connect(database_url, False, prepare_threshold=threshold) as store:
        for n in range(3):
            document = {"id": "a", "text": f"{n}", "embedding": [1.0, n], "chunks": [{"text": "c"}]}
            assert store.batch_upsert([document]).failed == 0
            assert [hit.text for hit in store.search([1.0, n], 1)] == [f"{n}"]
        assert store.delete(["a"]).deleted == 1


def test_a_store_closed_right_after_an_error_leaves_no_connection(database_url, admin, until):
    """Exceptions hold what they happened on: a connection that nobody closes lives on until they are collected."""
    others = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'closed in a hurry'"
    joint = "&" if "?" in database_url else "?"
    kept = []
    for _ in range(20):
        database = Database(f"{database_url}{joint}application_name=closed%20in%20a%20hurry", Settings())
        database.open()
        try:
            with database.connection() as connection:
                connection.execute("SELECT 1/0")
        except psycopg.errors.DivisionByZero as exc:
            kept.append(exc)
        database.close()
    assert len(kept) == 20
    until(lambda: not admin.execute(others).fetchall())
