"""Tenants: each sees and changes its own rows alone, whatever SQL it runs, and whoever's answer is in the cache."""

from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest
from psycopg import errors as pg

import db
from db.config import Settings
from db.rebuild import RebuildPlan, rebuild
from db.registry import register_model
from db.rollback import roll_back
from db.transactions import LoggedWrite, _Attempt, _is_logged

from .role_matrix import VECTOR, Embedder, document
from .roles_of import roles_of
from .test_roles import RIGHTS

TENANTS = ("red", "blue")


@pytest.fixture
def roles(database_url):
    with roles_of(database_url) as made:
        made.make(tenants=True)
        yield made


@pytest.fixture
def owner(database_url, redis_url, roles):
    """A store that sees everything, with a document of each tenant and one of nobody's."""
    with db.connect(database_url, redis_url, model_id="test-model", dimensions=8) as store:
        store.batch_upsert([of(t, t) for t in TENANTS] + [document("nobody", metadata={})])
        yield store


@pytest.fixture
def urls(roles, owner):
    """The URL of each tenant's login, which has the workspace of that name."""
    return {tenant: roles.login(tenant, "tenant", tenant) for tenant in TENANTS}


@pytest.fixture
def raw(urls):
    """A connection of red's, in autocommit."""
    with psycopg.connect(urls["red"], autocommit=True) as connection:
        yield connection


@pytest.fixture
def stores(urls, redis_url):
    opened = {t: db.connect(url, redis_url, embedder=Embedder(), maintenance_on_close=False) for t, url in urls.items()}
    yield opened
    for store in opened.values():
        store.close()


def of(tenant, id_, **more):
    return document(id_, metadata={"workspace": tenant}, **more)


def ids(connection, table="embeddings"):
    return [id_ for (id_,) in connection.execute(f"SELECT id FROM {table} ORDER BY id")]


def search(store, **more):
    result = store.search(VECTOR, 5, **more)
    return result.cached, sorted(hit.id for hit in result)


# ---- raw SQL


@pytest.mark.every_server
def test_a_tenant_sees_its_own_rows(raw):
    assert ids(raw) == ["red"]
    assert ids(raw, "chunks") == ["red#0"]
    assert raw.execute("SELECT role, workspace FROM tenant_workspaces").fetchall() == [(raw.info.user, "red")]


def test_a_tenant_reads_no_other_table(raw, sql):
    tables = [name for (name,) in sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")]
    readable = []
    for table in tables:
        try:
            raw.execute(f"SELECT * FROM {table}")
            readable.append(table)
        except pg.InsufficientPrivilege:
            pass
    assert readable == ["alembic_version", "chunks", "embeddings", "ingestion_pause", "tenant_workspaces"]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT tags FROM write_log",
        "SELECT ef_search_reason FROM embedding_models",
        "INSERT INTO write_log (tags, delivered_at) VALUES ('{store}', now())",
        "INSERT INTO write_log (tags, xid) VALUES ('{all}', '999999999')",
        "INSERT INTO tenant_workspaces VALUES (session_user, 'blue')",
        "UPDATE tenant_workspaces SET workspace = 'blue'",
        "DELETE FROM tenant_workspaces",
        "TRUNCATE tenant_workspaces",
        "TRUNCATE embeddings, chunks",
        "ALTER TABLE embeddings DISABLE ROW LEVEL SECURITY",
        "CREATE POLICY mine ON embeddings USING (true)",
        "DROP POLICY own ON tenant_workspaces",
        "ALTER FUNCTION vectorkeep_scope() OWNER TO CURRENT_USER",
        "SET row_security = off; SELECT FROM embeddings",
        "INSERT INTO embeddings (id, text, workspace) VALUES ('x', 'x', 'blue')",
        "INSERT INTO embeddings (id, text) VALUES ('x', 'x')",
        "UPDATE embeddings SET workspace = 'blue'",
        "UPDATE embeddings SET workspace = NULL",
        "INSERT INTO chunks (id, document_id, chunk_index, text, workspace) VALUES ('x', 'blue', 9, 'x', 'red')",
        "INSERT INTO chunks (id, origin_id, chunk_index, text, workspace) VALUES ('x', 'blue', 9, 'x', 'red')",
        "UPDATE chunks SET document_id = 'blue'",
        "UPDATE chunks SET document_id = NULL, origin_id = 'blue'",
        "UPDATE chunks SET workspace = 'blue'",
        "CREATE TABLE public.mine (id int)",
    ],
)
def test_a_tenant_may_not(raw, statement, sql):
    before = [sql(f"SELECT * FROM {table} ORDER BY id") for table in ("embeddings", "chunks")]
    with pytest.raises(pg.InsufficientPrivilege):
        raw.execute(statement)
    assert [sql(f"SELECT * FROM {table} ORDER BY id") for table in ("embeddings", "chunks")] == before


def test_what_a_tenant_changes_are_its_own_rows(raw, sql):
    assert raw.execute("UPDATE embeddings SET text = 'changed'").rowcount == 1
    assert raw.execute("UPDATE chunks SET text = 'changed'").rowcount == 1
    assert sql("SELECT id FROM embeddings WHERE text = 'changed'") == [("red",)]
    assert raw.execute("DELETE FROM embeddings").rowcount == 1
    assert sql("SELECT id FROM embeddings ORDER BY id") == [("blue",), ("nobody",)]
    assert sql("SELECT id FROM chunks ORDER BY id") == [("blue#0",), ("nobody#0",)]


@pytest.mark.every_server
def test_a_tenant_cannot_pass_for_another(raw, urls, roles):
    blue = urlsplit(urls["blue"]).username
    for role in (blue, roles.name("app"), roles.name("owner")):
        with pytest.raises(pg.InsufficientPrivilege):
            raw.execute(f"SET ROLE {role}")
        with pytest.raises(pg.InsufficientPrivilege):
            raw.execute(f"SET SESSION AUTHORIZATION {role}")
    raw.execute(f"SET ROLE {roles.name('tenant')}")  # its own group: still the same login
    assert ids(raw) == ["red"]
    for name in ("session_authorization", "role"):
        with pytest.raises(pg.InsufficientPrivilege):
            raw.execute("SELECT set_config(%s, %s, false)", (name, blue))
    raw.execute("RESET ROLE; SET vectorkeep.workspace = 'blue'; SET search_path = pg_temp, public")
    raw.execute("CREATE TEMP TABLE tenant_workspaces (role name, workspace text)")
    raw.execute("INSERT INTO pg_temp.tenant_workspaces VALUES (session_user, 'blue')")
    assert ids(raw) == ["red"]
    assert ids(raw, "chunks") == ["red#0"]


def test_a_tenants_own_functions_see_no_more(raw):
    raw.execute("CREATE FUNCTION pg_temp.peek() RETURNS bigint LANGUAGE sql SECURITY DEFINER "
                "AS 'SELECT count(*) FROM embeddings'")  # fmt: skip
    assert raw.execute("SELECT pg_temp.peek()").fetchone() == (1,)
    raw.execute("CREATE FUNCTION pg_temp.leak(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 "
                "AS $$ BEGIN RAISE NOTICE '%', $1; RETURN true; END $$")  # fmt: skip
    told = []
    raw.add_notice_handler(lambda diagnostic: told.append(diagnostic.message_primary))
    raw.execute("SELECT FROM embeddings WHERE pg_temp.leak(text)")
    assert told == ["red"]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO embeddings (id, text, workspace) VALUES ('blue', 'x', 'red')",
        "INSERT INTO chunks (id, document_id, chunk_index, text, workspace) VALUES ('blue#0', 'red', 9, 'x', 'red')",
        "UPDATE embeddings SET id = 'blue'",
    ],
)
def test_a_taken_id_tells_nothing_of_what_has_it(owner, raw, statement):
    with pytest.raises(pg.IntegrityError) as refused:
        raw.execute(statement)
    told = str(refused.value)
    assert "a piece of" not in told
    assert "workspace" not in told


def test_the_function_for_tenants_tells_nothing_of_others(raw, owner):
    asked = "SELECT vectorkeep_still_true(%s::pg_snapshot, %s)"

    def answers(*tags):
        return raw.execute(asked, (snapshot, list(tags))).fetchone()[0]

    [(snapshot,)] = raw.execute("SELECT pg_current_snapshot()::text").fetchall()
    assert answers("workspace:red")
    owner.batch_upsert([of("blue", "more", source_id="secret")])
    assert answers("workspace:red")
    # A tag of another's answers as any write at all does.
    assert not any(answers(tag) for tag in ("workspace:blue", "source:secret", "source:nowhere", "workspace:nowhere"))


# ---- the library


@pytest.mark.every_server
def test_an_id_that_another_tenant_has_is_refused_alone(owner, stores, sql):
    secret = "what blue wrote"
    owner.batch_upsert([of("blue", "blue", text=secret)])
    given = [of("red", id_) for id_ in ("a", "blue", "c", "nobody")]
    result = stores["red"].batch_upsert([dict(d, text="mine") for d in given])
    assert (result.inserted, result.failed) == (2, 2)
    assert dict(result.errors).keys() == {"blue", "nobody"}
    for _, reason in result.errors:
        assert reason == "refused by the server: its id is taken by a document that this role may not see"
    assert sql("SELECT text, workspace FROM embeddings WHERE id = 'blue'") == [("blue" and secret, "blue")]
    embedded = stores["red"].embed_batch([{"id": "blue", "text": "x", "metadata": {"workspace": "red"}}])
    assert [id_ for id_, _ in embedded.errors] == ["blue"]


def test_a_document_for_another_workspace_is_refused_and_stops_no_other(stores, sql):
    for metadata in ({"workspace": "blue"}, {}):
        result = stores["red"].batch_upsert([of("red", "mine"), document("x", metadata=metadata)])
        assert [id_ for id_, _ in result.errors] == ["x"]
        assert "row-level security" in result.errors[0][1]
    assert sql("SELECT id FROM embeddings WHERE id IN ('x', 'mine')") == [("mine",)]


def test_a_tenant_updates_and_moves_its_documents(roles, urls, stores, sql):
    red = stores["red"]
    roles.map(urlsplit(urls["red"]).username, "crimson")
    changed = of("crimson", "red", text="changed", chunks=[{"text": "new", "embedding": VECTOR}] * 2)
    assert red.batch_upsert([changed]).updated == 1
    assert sql("SELECT id, workspace, text FROM chunks WHERE document_id = 'red' ORDER BY id") == [
        ("red#0", "crimson", "new"), ("red#1", "crimson", "new"),
    ]  # fmt: skip
    moved = of("red", "red", text="changed")
    del moved["chunks"]
    assert red.batch_upsert([moved]).updated == 1
    assert sql("SELECT DISTINCT workspace FROM chunks WHERE document_id = 'red'") == [("red",)]


def test_what_a_tenant_deletes_is_its_own(owner, stores):
    assert stores["red"].delete(["red", "blue", "nobody"]).deleted == 1
    owner.batch_upsert([of("red", "red")])
    assert stores["red"].delete_by_source_id("s").deleted == 1
    assert [d.id for d in owner.get(["red", "blue", "nobody"])] == ["blue", "nobody"]


def test_a_tenants_sync_leaves_others_documents_of_the_source(owner, stores):
    result = stores["red"].sync([{"id": "fresh", "text": "t", "metadata": {"workspace": "red"}}], source_id="s")
    assert (result.inserted, result.deleted) == (1, 1)
    assert [d.id for d in owner.get(["red", "blue", "nobody", "fresh"])] == ["blue", "nobody", "fresh"]


def test_a_tenants_store_warns_of_nothing(stores, caplog):
    red = stores["red"]
    red.search("text", 1)
    red.batch_upsert([of("red", "x")])
    red.close()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


# ---- cached answers


@pytest.mark.every_server
@pytest.mark.parametrize("consistency", ["strict", "bounded"])
def test_equal_questions_of_two_tenants_have_answers_of_their_own(owner, stores, consistency):
    for asked in ({}, {"source_id": "s"}, {"workspace": "red"}, {"level": "chunks"}):
        more = asked | {"consistency": consistency}
        suffix = "#0" if "level" in asked else ""
        everything = ["red"] if "workspace" in asked else [id_ + suffix for id_ in ("blue", "nobody", "red")]
        assert search(owner, **more) == (False, everything)
        assert search(stores["red"], **more) == (False, ["red" + suffix])
        assert search(stores["blue"], **more) == (False, [] if "workspace" in asked else ["blue" + suffix])
        assert search(owner, **more) == (True, everything)
        assert search(stores["red"], **more) == (True, ["red" + suffix])
        assert search(stores["blue"], **more) == (True, [] if "workspace" in asked else ["blue" + suffix])


def test_a_write_ends_the_answers_of_tenants(owner, stores):
    for asked in ({}, {"workspace": "red"}, {"source_id": "s"}):
        search(stores["red"], **asked)
        assert search(stores["red"], **asked) == (True, ["red"])
        owner.batch_upsert([of("red", "more")])
        assert search(stores["red"], **asked) == (False, ["more", "red"])
        owner.delete(["more"])
        assert search(stores["red"], **asked) == (False, ["red"])


def test_an_answer_about_its_workspace_outlives_writes_of_others(owner, stores):
    search(stores["red"], workspace="red")
    owner.batch_upsert([of("blue", "more")])
    assert search(stores["red"], workspace="red") == (True, ["red"])
    assert search(stores["red"])[0] is False


def test_a_changed_mapping_ends_a_tenants_answers_and_no_others(owner, stores, roles, urls, sql):
    red = urlsplit(urls["red"]).username
    for store in (owner, *stores.values()):
        search(store)
        assert search(store)[0]
    roles.map(red, "blue")
    assert search(stores["red"]) == (False, ["blue", "red"])
    assert search(stores["blue"]) == (True, ["blue"])
    assert search(owner) == (True, ["blue", "nobody", "red"])
    assert [search(stores["red"]) for _ in range(3)][-1] == (True, ["blue", "red"])
    sql("DELETE FROM tenant_workspaces WHERE role = %s AND workspace = 'red'", red)
    assert search(stores["red"]) == (False, ["blue"])
    sql("DELETE FROM tenant_workspaces WHERE role = %s", red)
    assert search(stores["red"]) == (False, [])


@pytest.mark.parametrize(
    "change",
    [
        "CREATE POLICY less ON embeddings AS RESTRICTIVE USING (id <> 'red')",
        "ALTER POLICY {tenant} ON embeddings USING (false)",
        "DROP POLICY {tenant} ON embeddings",
    ],
)
def test_changed_policies_end_a_tenants_answers(owner, stores, roles, sql, change):
    search(stores["red"])
    assert search(stores["red"]) == (True, ["red"])
    sql(change.format(tenant=roles.name("tenant")))
    assert [search(stores["red"])[1] for _ in range(3)] == [[]] * 3


def test_a_login_that_leaves_the_group_is_served_no_more(owner, stores, roles, urls, sql):
    app = urlsplit(roles.login("worker", "app")).username
    with db.connect(roles.url(app), owner.settings.redis_url, maintenance_on_close=False) as store:
        search(store)
        assert search(store) == (True, ["blue", "nobody", "red"])
        sql(f"GRANT {roles.name('tenant')} TO {app}; REVOKE {roles.name('app')} FROM {app}")
        roles.map(app, "red")
        assert [search(store)[1] for _ in range(3)] == [["red"]] * 3


# ---- rebuilds and dumps


@pytest.mark.every_server
def test_a_rebuild_keeps_policies_and_grants(owner, database_url, roles, urls, raw, sql):
    before = sql(RIGHTS)
    settings = Settings(database_url=database_url, redis_url=False)
    rebuild(settings, RebuildPlan())
    assert sql(RIGHTS) == before
    assert ids(raw) == ["red"]
    assert ids(raw, "chunks") == ["red#0"]
    for table in ("embeddings", "chunks"):
        with pytest.raises(pg.InsufficientPrivilege):
            raw.execute(f"SELECT FROM vectorkeep_previous.{table}")
    roll_back(settings)
    assert sql(RIGHTS) == before
    assert ids(raw) == ["red"]


@pytest.mark.every_server
def test_the_owners_dump_is_whole_and_a_tenants_is_refused(owner, roles, raw):
    with psycopg.connect(roles.login("dba", "owner"), autocommit=True) as dba:
        dba.execute("SET row_security = off")  # as pg_dump does
        assert ids(dba) == ["blue", "nobody", "red"]
    raw.execute("SET row_security = off")
    with pytest.raises(pg.InsufficientPrivilege):
        ids(raw)


# ---- a small tenant in a big store


def top(vectors, query, k):
    distances = 1 - vectors @ query
    return set(np.argsort(distances, kind="stable")[:k])


@pytest.mark.parametrize("workspaces", [1, 40])
def test_a_small_tenant_in_a_big_store_gets_its_k_rows(database_url, roles, workspaces):
    register_model(database_url, "wide", 32, "cosine")
    random = np.random.default_rng(7)
    others = random.normal(size=(10_000, 32)).astype(np.float32)
    others[:, 0] += 3  # the questions lie among them, far from what the tenant has
    own = random.normal(size=(50, 32)).astype(np.float32)
    own[:, 0] -= 1
    with db.connect(database_url, False) as store:
        rows = [(f"o{n}", v, f"w{n % workspaces}") for n, v in enumerate(others)]
        rows += [(f"t{n}", v, "small") for n, v in enumerate(own)]
        result = store.batch_upsert(
            {"id": id_, "text": id_, "embedding": v, "metadata": {"workspace": w}} for id_, v, w in rows
        )
        assert result.inserted == 10_050
        with store.pool.connection() as connection:
            connection.execute("ANALYZE embeddings")
    unit = own / np.linalg.norm(own, axis=1, keepdims=True)
    with db.connect(roles.login("small", "tenant", "small"), False, maintenance_on_close=False) as store:
        for asked in ({}, {"workspace": "small"}):
            found = 0
            for query in others[:20]:
                query = query / np.linalg.norm(query)
                result = store.search(query, 10, **asked)
                assert len(result) == 10
                assert result.complete
                found += len({int(hit.id[1:]) for hit in result} & top(unit, query, 10))
            # The named workspace is known to be small, and compared whole. The other way the index is asked first:
            # it brings ten and more of the tenant's rows before it gives up, but not always the nearest.
            assert found == 200


# ---- a COMMIT whose reply was lost


def test_a_tenants_commit_is_confirmed_by_its_numbers_while_no_crash_can_have_given_them_again(stores, owner):
    database = stores["red"]._parts.database
    stores["red"].batch_upsert([of("red", "new")])
    with owner.pool.connection() as connection, database.connection() as own:
        [row] = connection.execute("SELECT id, xid::text, created_at::text FROM write_log ORDER BY id DESC LIMIT 1")
        attempt = _Attempt(row[1], row[2], own.identity.life, None, LoggedWrite(row[0], []))
    assert _is_logged(database, attempt) == (True, False)
    earlier = replace(attempt, life="before a crash")
    assert _is_logged(database, earlier) == (False, False)
    assert database.pool.get_stats()["pool_size"] == 1
    with database.connection() as kept_by_a_pooler:
        kept_by_a_pooler.identity = replace(kept_by_a_pooler.identity, life="before a crash")
    assert _is_logged(database, earlier) == (False, False)
