"""Triggers that log writes of SQL beside the library: what such a statement changes is never served from the cache."""

import psycopg
import pytest

import db
from db.config import Settings
from db.errors import BusyError, PermissionDeniedError
from db.rebuild import rebuild
from db.rebuild_plan import RebuildPlan
from db.rollback import roll_back
from db.transactions import MAX_TAGS
from db.write_triggers import set_write_triggers
from tests.integration.roles_of import roles_of
from tests.integration.test_query_cache import ASKED, doc, fill, search, still_cached, warm

ALL = set(ASKED)
OF_A = {"store", "source a", "chunks of a", "workspace w"}
NEW = "INSERT INTO embeddings (id, text, source_id, embedding, model_id) SELECT {}, 't', {}, embedding, model_id"
ONE_NEW = NEW.format("'new'", "'a'") + " FROM embeddings WHERE id = 'a2'"
AGAIN = NEW.format("id", "source_id") + " FROM embeddings WHERE id = 'b1'"

# What SQL beside the library may do, and what is no longer known afterwards.
STATEMENTS = {
    "INSERT": (ONE_NEW, {"store", "source a", "chunks of a"}),
    "UPDATE": ("UPDATE embeddings SET text = 'other' WHERE id = 'a1'", OF_A),
    "UPDATE that moves": (
        "UPDATE embeddings SET source_id = 'c' WHERE id = 'a2'",
        {"store", "source a", "chunks of a", "source c"},
    ),
    "UPDATE of a chunk": ("UPDATE chunks SET text = 'other'", OF_A),
    "DELETE, and a chunk by its foreign key": ("DELETE FROM embeddings WHERE id = 'a1'", OF_A),
    "ON CONFLICT": (f"{AGAIN} ON CONFLICT (id) DO UPDATE SET text = 'other'", {"store", "source b", "workspace v"}),
    "MERGE": (
        "MERGE INTO embeddings USING (VALUES ('b1'), ('c1')) AS given (id) ON embeddings.id = given.id "
        "WHEN MATCHED AND source_id = 'b' THEN DELETE WHEN MATCHED THEN UPDATE SET text = 'other'",
        {"store", "source b", "source c", "workspace v"},
    ),
    "WITH": (
        "WITH gone AS (DELETE FROM embeddings WHERE id = 'b1' RETURNING id) SELECT * FROM gone",
        {"store", "source b", "workspace v"},
    ),
    "TRUNCATE": ("TRUNCATE chunks", ALL),
    "by a session that plays a replica": (
        "SET session_replication_role = replica; UPDATE embeddings SET text = 'other' WHERE id = 'c1'",
        {"store", "source c"},
    ),
    "no row": ("UPDATE embeddings SET text = 'other' WHERE id = 'nobody'", set()),
    "another table": ("INSERT INTO vector_cache (key, model_id, embedding) VALUES ('k', 'm', '[1]')", set()),
}

OURS = """
    SELECT tgname::text, tgenabled::text FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT proname, '' FROM pg_proc WHERE proname = 'vectorkeep_log_statement'
"""


@pytest.fixture
def triggers(database_url):
    set_write_triggers(database_url, wanted=True)


@pytest.mark.every_server
@pytest.mark.parametrize("name", STATEMENTS)
def test_what_a_statement_changes_is_not_served_from_the_cache(store, sql, triggers, name):
    statement, ended = STATEMENTS[name]
    fill(store)
    sql(statement)
    assert still_cached(store) == ALL - ended


def test_without_them_it_is(store, sql, triggers, database_url):
    fill(store)
    set_write_triggers(database_url, wanted=False)
    sql("DELETE FROM embeddings")
    assert still_cached(store) == ALL


def test_rows_that_come_by_copy_are_told(store, admin, triggers):
    fill(store)
    statement = "COPY embeddings (id, text, source_id, embedding, model_id) FROM STDIN"
    with admin.cursor().copy(statement) as copy:
        copy.write_row(("new", "t", "b", "[9,1,0,0,0,0,0,0]", "test-model"))
    assert still_cached(store) == ALL - {"store", "source b"}
    assert search(store, source_id="b")[0].id == "new"


def test_a_statement_that_touches_many_sources_is_told_as_touching_everything(store, sql, triggers):
    fill(store)
    each = NEW.format("'n' || n", "'s' || n")
    sql(f"{each} FROM embeddings, generate_series(1, {MAX_TAGS + 1}) AS n WHERE id = 'a2'")
    assert still_cached(store) == set()
    assert sql("SELECT tags FROM write_log ORDER BY id DESC LIMIT 1") == [(["all", "store"],)]


def test_what_is_rolled_back_ends_nothing(store, admin, triggers):
    fill(store)
    with admin.transaction(force_rollback=True):
        admin.execute("DELETE FROM embeddings")
    assert still_cached(store) == ALL


def test_the_librarys_own_writes_go_on(store, triggers):
    fill(store)
    result = store.batch_upsert([doc("a1", "a", "w", value=3), doc("a2", "c", value=2), doc("d1", "d")])
    assert (result.inserted, result.updated, result.failed) == (1, 2, 0)
    assert still_cached(store) == ALL - OF_A - {"source c"}
    warm(store)
    assert store.delete_by_source_id("b").deleted == 1
    assert still_cached(store) == ALL - {"store", "source b", "workspace v"}


def test_a_bounded_cache_is_told_once_of_each_write(database_url, redis_url, sql, triggers, monkeypatch):
    monkeypatch.setattr("db.query_cache._LEFT_AFTER_S", 0.0)
    with db.connect(database_url, redis_url, model_id="test-model", dimensions=8, consistency="bounded") as store:
        fill(store)
        store._parts._deliver()
        assert sql("SELECT count(*) FROM write_log WHERE delivered_at IS NULL") == [(0,)]
        assert still_cached(store) == ALL, "the library had told of its own write"
        sql("UPDATE embeddings SET text = 'other' WHERE id = 'c1'")
        assert still_cached(store) == ALL, "within its bound"
        store._parts._deliver()
        assert still_cached(store) == ALL - {"store", "source c"}


def test_a_table_may_have_columns_of_any_name(store, sql, triggers):
    fill(store)
    for name in ("tag", "touched", "source", "touching"):
        sql(f"ALTER TABLE embeddings ADD COLUMN {name} text")
    warm(store)
    sql("UPDATE embeddings SET text = 'other', tag = 'x' WHERE id = 'c1'")
    assert ALL - still_cached(store) == {"store", "source c"}
    assert store.delete(["c1"]).deleted == 1


def test_they_stay_when_a_rebuild_makes_the_tables_again(embedding_store, database_url, redis_url, sql, embedder):
    store = embedding_store
    store.embed_batch([{"id": "a", "text": "one two three", "source_id": "a"}])
    set_write_triggers(database_url, wanted=True)
    rebuild(Settings(database_url=database_url, redis_url=redis_url), RebuildPlan())
    [logged] = sql("SELECT count(*) FROM write_log WHERE tags @> '{source:a}'")
    sql("UPDATE embeddings SET text = 'other'")
    assert sql("SELECT count(*) FROM write_log WHERE tags @> '{source:a}'") == [(logged[0] + 1,)]


def test_they_are_dropped_from_the_tables_that_a_rebuild_replaced_too(
    embedding_store, database_url, redis_url, sql, embedder
):
    settings = Settings(database_url=database_url, redis_url=redis_url)
    set_write_triggers(database_url, wanted=True)
    rebuild(settings, RebuildPlan())
    set_write_triggers(database_url, wanted=False)
    assert sql(OURS) == []
    roll_back(settings)
    assert sql(OURS) == []
    assert embedding_store.embed_batch([{"id": "a", "text": "one two three"}]).inserted == 1


def test_a_tenants_statement_is_logged_and_the_log_stays_closed_to_it(store, database_url, sql, triggers):
    with roles_of(database_url) as roles:
        roles.make(tenants=True)
        url = roles.login("w", "tenant", "w")
        fill(store)
        with psycopg.connect(url, autocommit=True) as tenant:
            tenant.execute("UPDATE embeddings SET text = 'mine'")
            assert still_cached(store) == ALL - OF_A
            for forbidden in (
                "SELECT tags FROM write_log",
                "CREATE TEMP TABLE own (source_id text, workspace text); CREATE TRIGGER t AFTER INSERT ON own "
                "REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION vectorkeep_log_statement()",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    tenant.execute(forbidden)
        owner = "SELECT pg_get_userbyid(proowner) FROM pg_proc WHERE proname = 'vectorkeep_log_statement'"
        assert sql(owner) == [(roles.name("owner"),)]


def test_a_role_that_may_write_the_documents_and_nothing_else_is_logged(store, database_url, sql, triggers):
    with roles_of(database_url) as roles:
        roles.make()
        url = roles.login("plain")
        role = roles.prefix + "_plain_login"
        sql(f"GRANT USAGE ON SCHEMA public TO {role}; GRANT SELECT, UPDATE ON embeddings TO {role}")
        fill(store)
        with psycopg.connect(url, autocommit=True) as plain:
            plain.execute("UPDATE embeddings SET text = 'other' WHERE id = 'c1'")
        assert still_cached(store) == ALL - {"store", "source c"}


def test_they_may_be_made_again_and_dropped_again_and_leave_nothing(database_url, sql):
    for _ in range(2):
        set_write_triggers(database_url, wanted=True)
        made = sql(OURS)
        assert len(made) == 9
        assert {enabled for _, enabled in made} == {"A", ""}
    for _ in range(2):
        set_write_triggers(database_url, wanted=False)
        assert sql(OURS) == []


def test_a_writer_that_holds_the_table_is_waited_for_no_longer_than_lock_timeout(database_url, monkeypatch, sql):
    monkeypatch.setenv("VECTORKEEP_LOCK_TIMEOUT_S", "0.2")
    with psycopg.connect(database_url) as writer:
        writer.execute("LOCK TABLE chunks IN ROW EXCLUSIVE MODE")
        with pytest.raises(BusyError):
            set_write_triggers(database_url, wanted=True)
    assert sql("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal") == [(0,)]


def test_whose_tables_they_are_not_may_not_make_them(store, database_url):
    with roles_of(database_url) as roles:
        roles.make()
        with pytest.raises(PermissionDeniedError):
            set_write_triggers(roles.login("app", "app"), wanted=True)
