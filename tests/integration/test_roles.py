"""The roles that `vectorkeep migrate --roles` makes: what each can do, and that they are made whole or not at all."""

import threading
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

import db
from db.config import Settings
from db.migrate import downgrade, upgrade
from db.registry import register_model
from db.role_rights import GRANTS
from db.roles import KINDS, RolesPlan, make_roles, roles_sql
from tests.servers import database_of

from .role_matrix import MATRIX, OPERATIONS, VERBS, Embedder, as_markdown, document, expected, outcome
from .roles_of import roles_of

DOC = Path(__file__).parents[2] / "docs" / "roles.md"
# Dead rows enough that maintain wants to vacuum, told to the statistics at once.
WORK_FOR_MAINTAIN = """
    INSERT INTO performance_metrics (operation, duration_ms) SELECT 'x', 1 FROM generate_series(1, 3000);
    DELETE FROM performance_metrics WHERE operation = 'x';
    SELECT pg_stat_force_next_flush();
    DROP INDEX embeddings_vector_idx;
"""
RIGHTS = """
    SELECT relname, pg_get_userbyid(relowner), relrowsecurity, relacl::text,
           (SELECT array_agg(attacl::text ORDER BY attnum) FROM pg_attribute WHERE attrelid = pg_class.oid),
           (SELECT array_agg(polname || pg_get_expr(polqual, polrelid) ORDER BY polname) FROM pg_policy
            WHERE polrelid = pg_class.oid)
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY 1
"""


@pytest.fixture
def roles(database_url):
    with roles_of(database_url) as made:
        yield made


@pytest.fixture
def model(database_url):
    register_model(database_url, "test-model", 8, "cosine")


# ---- the matrix


@pytest.mark.every_server
@pytest.mark.parametrize("kind", KINDS)
def test_each_role_can_do_what_the_matrix_says(kind, roles, model, database_url, redis_url, admin, sql, until):
    roles.make(tenants=True)
    with db.connect(database_url, False) as filler:
        filler.batch_upsert([document("kept"), document("gone"), document("detached", source_id="u")])
    url = roles.login("somebody", kind, *(["w"] if kind == "tenant" else []))
    found = {}
    with db.connect(url, redis_url, embedder=Embedder(), maintenance_on_close=False) as store:
        for operation, work in OPERATIONS.items():
            if operation == "maintain":
                admin.execute(WORK_FOR_MAINTAIN)
            found[operation] = outcome(lambda work=work: work(store))
    settings = Settings(database_url=url, redis_url=False)
    still_there = "SELECT pid FROM pg_stat_activity WHERE usename = %s"
    for verb, work in VERBS.items():
        if verb == "migrate":
            downgrade(database_url, "0005", drop_rows=True)
        until(lambda: not sql(still_there, urlsplit(url).username))
        found[verb] = outcome(lambda work=work: work(settings, roles.prefix))
        if verb == "migrate" and kind != "owner":
            upgrade(database_url)
    assert found == expected(kind, admin.info.server_version // 10_000)


@pytest.mark.parametrize("kind", ["app", "tenant"])
@pytest.mark.parametrize(
    "right",
    [
        "UPDATE ON embeddings",
        "INSERT ON write_log",
        "SELECT ON write_log",
        "SELECT ON ingestion_pause",
        "SELECT ON embedding_models",
        "TEMPORARY ON DATABASE {}",
    ],
)
def test_without_a_right_that_every_write_needs_a_call_ends_and_blames_no_document(kind, right, roles, model, sql):
    roles.make(tenants=True)
    url = roles.login("writer", kind, *(["w"] if kind == "tenant" else []))
    with db.connect(url, False, maintenance_on_close=False) as store:
        assert store.batch_upsert([document("a")]).inserted == 1
        store.pool.drain()  # its sessions have their temporary tables already
        sql(f"REVOKE {right.format(roles.prefix)} FROM PUBLIC, {roles.name(kind)}")
        with pytest.raises(db.PermissionDeniedError, match="permission denied"):
            store.batch_upsert([document(id_, text="new") for id_ in "abcd"])


def test_the_matrix_is_that_of_the_documentation():
    assert list(MATRIX) == [*OPERATIONS, *VERBS]
    assert as_markdown() in DOC.read_text()


def test_the_rights_are_those_of_the_documentation():
    rows = [f"| `{table}` | {rights} |" for kind in ("app", "tenant") for table, rights in GRANTS[kind].items()]
    text = DOC.read_text()
    assert [row for row in rows if row not in text] == []
    assert set(GRANTS["reader"]) == set(GRANTS["app"])
    assert set(GRANTS["reader"].values()) == {"SELECT"}


# ---- how they are made


@pytest.mark.every_server
def test_again_and_by_many_at_once_makes_the_same(roles, database_url, sql):
    roles.make(tenants=True)
    first = sql(RIGHTS)
    assert {row[1] for row in first} == {roles.name("owner")}
    failed = []

    def make():
        try:
            make_roles(database_url, RolesPlan(roles.prefix))
        except Exception as exc:  # noqa: BLE001  (whatever it is, the test fails with it)
            failed.append(exc)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sql(RIGHTS) == first


def test_two_stores_of_one_server_make_the_same_roles_at_once(roles, make_database, servers, postgres_version):
    others = [make_database(servers.template(postgres_version)) for _ in range(3)]
    failed = []

    def make(url):
        try:
            make_roles(url, RolesPlan(roles.prefix))
        except Exception as exc:  # noqa: BLE001  (whatever it is, the test fails with it)
            failed.append(exc)

    threads = [threading.Thread(target=make, args=(url,)) for url in (roles.database_url, *others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for url in others:  # their tables are the owner's, too
        with psycopg.connect(url, autocommit=True) as connection:
            assert {row[1] for row in connection.execute(RIGHTS)} == {roles.name("owner")}
            for kind in KINDS:
                connection.execute(SQL("DROP OWNED BY {} CASCADE").format(Identifier(roles.name(kind))))
    assert failed == []


def test_what_a_role_had_beyond_its_rights_goes(roles, sql):
    roles.make()
    expected = sql(RIGHTS)
    sql(f"GRANT ALL ON vector_cache, write_log TO {roles.name('tenant')}, {roles.name('reader')}")
    roles.make()
    assert sql(RIGHTS) == expected


def test_without_tenants_there_is_no_row_security_and_the_app_copies(roles, model):
    roles.make()
    with db.connect(roles.login("worker", "app"), False, maintenance_on_close=False) as store:
        assert store.batch_upsert([document("a")]).inserted == 1
        with store.pool.connection() as connection:
            staged = "SELECT to_regclass('pg_temp.vectorkeep_documents') IS NOT NULL"
            assert connection.execute(staged).fetchone() == (False,)
            active = "SELECT row_security_active('embeddings'), row_security_active('chunks')"
            assert connection.execute(active).fetchone() == (False, False)


def test_without_tenants_the_tenant_role_may_nothing(roles, sql):
    roles.make()
    [(count,)] = sql(
        "SELECT count(*) FROM pg_class, aclexplode(relacl) WHERE grantee = %s::regrole", roles.name("tenant")
    )
    assert count == 0


def test_a_store_that_has_tenants_keeps_them(roles, sql):
    roles.make(tenants=True)
    before = sql(RIGHTS)
    roles.make()
    assert sql(RIGHTS) == before


@pytest.mark.every_server
def test_nothing_needs_a_superuser_once_the_extension_is_there(postgres_url, make_database, admin, until):
    url = make_database(None)
    prefix = database_of(url)
    with psycopg.connect(url, autocommit=True) as superuser, roles_of(url) as roles:
        superuser.execute("CREATE EXTENSION vector")
        owner = roles.login("dba", options="CREATEROLE")
        superuser.execute(f"ALTER DATABASE {prefix} OWNER TO {prefix}_dba_login")
        try:
            upgrade(owner)
            register_model(owner, "test-model", 8, "cosine")
            result = make_roles(owner, RolesPlan(prefix, tenants=True))
            assert (result.tenants, result.notes[1:]) == (True, [])
            with db.connect(roles.login("worker", "app"), False, maintenance_on_close=False) as store:
                assert store.batch_upsert([document("a")]).inserted == 1
        finally:
            superuser.execute(f"ALTER DATABASE {prefix} OWNER TO CURRENT_USER")


def test_who_may_not_make_roles_is_told_what_an_administrator_runs(roles, database_url, sql):
    plain = roles.login("plain")
    plain_role = urlsplit(plain).username
    sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {plain_role}")
    before = sql(RIGHTS)
    with pytest.raises(db.PermissionDeniedError) as refused:
        make_roles(plain, RolesPlan(roles.prefix))
    for kind in KINDS:
        assert f'CREATE ROLE "{roles.name(kind)}" NOLOGIN' in str(refused.value)
    assert f'GRANT "{roles.name("owner")}" TO "{plain_role}"' in str(refused.value)
    assert sql(RIGHTS) == before
    # What was named is run; the rest it may do itself as soon as the tables are its own, through the owner.
    for statement in str(refused.value).partition("run: ")[2].partition("; then")[0].split("; "):
        sql(statement)
    sql(f"ALTER TABLE embeddings OWNER TO {roles.name('owner')}")
    with pytest.raises(db.PermissionDeniedError, match=r"ALTER TABLE public\.alembic_version OWNER"):
        make_roles(plain, RolesPlan(roles.prefix))
    roles.make()
    assert make_roles(plain, RolesPlan(roles.prefix)).roles == {kind: roles.name(kind) for kind in KINDS}


def test_a_right_that_the_server_only_warned_about_is_not_claimed(roles, database_url, sql):
    """GRANT of what is not one's to give is a warning."""
    roles.make()
    plain = roles.login("plain", "owner")
    sql(f"REVOKE TEMPORARY ON DATABASE {roles.prefix} FROM PUBLIC, {roles.name('app')}")
    with pytest.raises(db.PermissionDeniedError, match=f"TEMPORARY on the database to {roles.name('app')}"):
        make_roles(plain, RolesPlan(roles.prefix))
    roles.make()
    make_roles(plain, RolesPlan(roles.prefix))


def test_a_table_in_use_is_waited_for_no_longer_than_lock_timeout(roles, database_url, monkeypatch, sql):
    monkeypatch.setenv("VECTORKEEP_LOCK_TIMEOUT_S", "0.2")
    before = sql(RIGHTS)
    with psycopg.connect(database_url) as reader:
        reader.execute("SELECT FROM embedding_models")
        with pytest.raises(db.BusyError):
            roles.make()
    assert sql(RIGHTS) == before


def test_the_printed_sql_changes_nothing_and_makes_the_same(roles, database_url, sql):
    before = sql(RIGHTS)
    planned = roles_sql(database_url, RolesPlan(roles.prefix, tenants=True))
    assert sql(RIGHTS) == before
    assert sql("SELECT 1 FROM pg_roles WHERE rolname LIKE %s", roles.name("%")) == []
    for statement in planned.statements:
        sql(statement)
    by_hand = sql(RIGHTS)
    roles.make(tenants=True)
    assert sql(RIGHTS) == by_hand


def test_a_prefix_may_be_any_name(roles, database_url, sql):
    roles.prefix += ' we"ird; DROP'
    roles.make(tenants=True)
    assert len(sql("SELECT 1 FROM pg_roles WHERE rolname LIKE %s", f"{roles.prefix}\\_%")) == 4


@pytest.mark.parametrize("prefix", ["", "x" * 51, "é" * 26, "pg_mine"])
def test_a_prefix_that_makes_no_role_is_refused(prefix):
    with pytest.raises(db.ValidationError, match="role prefix"):
        RolesPlan(prefix)


@pytest.mark.every_server
def test_what_owners_migrate_belongs_to_their_role_and_is_granted(roles, database_url, admin, sql):
    roles.make()
    with psycopg.connect(roles.login("dba", "owner"), autocommit=True) as dba:
        url = roles.url(dba.info.user)
        downgrade(url, "0005", drop_rows=True)
        upgrade(url)
    assert {row[1] for row in sql(RIGHTS)} == {roles.name("owner")}
    held = "SELECT has_table_privilege(%s, 'tenant_workspaces', %s)"
    assert sql(held, roles.name("app"), "INSERT") == [(True,)]
    assert sql(held, roles.name("reader"), "SELECT") == [(True,)]
    assert sql(held, roles.name("tenant"), "SELECT") == [(False,)]
    if admin.info.server_version >= 17_00_00:
        assert sql(held, roles.name("app"), "MAINTAIN") == [(True,)]


def test_a_superuser_migrates_as_the_owner_and_is_itself_again(roles, database_url, sql):
    roles.make()
    downgrade(database_url, "0005", drop_rows=True)
    upgrade(database_url)
    assert {row[1] for row in sql(RIGHTS)} == {roles.name("owner")}
