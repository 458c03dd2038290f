"""Whose answer it is: two roles, equal questions, and nobody is ever served what another one may see."""

from urllib.parse import urlsplit

import pytest
from psycopg.sql import SQL, Identifier, Literal

import db
from db.engine import StoreConnection

QUERY = [1.0, 0, 0, 0, 0, 0, 0, 0]
TENANTS = ("red", "blue")


@pytest.fixture
def roles(database_url, admin):
    """URLs of two plain roles that read everything there is, by tenant."""
    base = urlsplit(database_url)
    name = base.path.strip("/")
    made = {tenant: f"{name}_{tenant}" for tenant in TENANTS}
    for role in made.values():
        admin.execute(SQL("CREATE ROLE {} LOGIN PASSWORD 'secret'").format(Identifier(role)))
        admin.execute(SQL("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}").format(Identifier(role)))
    address = base.netloc.rpartition("@")[2]
    yield {tenant: base._replace(netloc=f"{role}:secret@{address}").geturl() for tenant, role in made.items()}
    for role in made.values():
        admin.execute(SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(Identifier(role)))


@pytest.fixture
def tenants(store, admin, roles, redis_url):
    """Stores of two tenants, each with a row of its own that row security shows to it alone."""
    store.batch_upsert(
        [{"id": t, "text": t, "source_id": "s", "embedding": QUERY, "metadata": {"workspace": t}} for t in TENANTS]
    )
    admin.execute("ALTER TABLE embeddings ENABLE ROW LEVEL SECURITY")
    admin.execute("CREATE POLICY own ON embeddings USING (current_user LIKE '%\\_' || workspace)")
    stores = {t: db.connect(url, redis_url, maintenance_on_close=False) for t, url in roles.items()}
    yield stores
    for opened in stores.values():
        opened.close()


@pytest.fixture
def silent(database_url):
    """A store that never tells Redis of its writes."""
    with db.connect(database_url, False) as opened:
        yield opened


def search(store):
    result = store.search(QUERY, 5, source_id="s")
    return result.cached, sorted(hit.id for hit in result)


@pytest.mark.every_server
def test_a_plain_role_may_ask_what_it_is_connected_to(roles, database_url):
    with StoreConnection.connect(database_url) as superuser, StoreConnection.connect(roles["red"]) as plain:
        superuser.identify()
        plain.identify()
        assert plain.identity.cacheable
        assert plain.identity.store == superuser.identity.store
        assert plain.identity.life != superuser.identity.life


@pytest.mark.every_server
def test_equal_questions_of_two_roles_have_answers_of_their_own(store, tenants):
    assert search(store) == (False, ["blue", "red"])
    assert search(tenants["red"]) == (False, ["red"])
    assert search(tenants["blue"]) == (False, ["blue"])
    assert search(tenants["red"]) == (True, ["red"])
    assert search(tenants["blue"]) == (True, ["blue"])
    assert search(store) == (True, ["blue", "red"])


def test_a_write_ends_the_answers_of_every_role(store, tenants):
    for _ in range(2):
        assert [search(tenants[t])[1] for t in TENANTS] == [[t] for t in TENANTS]
    store.delete(["red"])
    assert search(tenants["red"]) == (False, [])
    assert search(tenants["blue"]) == (False, ["blue"])


def test_a_role_set_on_a_pooled_connection_shares_nothing(database_url, redis_url, tenants, roles):
    with db.connect(database_url, redis_url, pool_max=1) as store:
        everybody, red = ["blue", "red"], Literal(urlsplit(roles["red"]).username)
        for statement, seen in (("RESET ROLE", everybody), (SQL("SET ROLE {}").format(red), ["red"])) * 3:
            with store.pool.connection() as connection:
                connection.execute(statement)
            assert [search(store)[1] for _ in range(3)] == [seen] * 3


@pytest.mark.parametrize(
    "hidden",
    [
        "REVOKE SELECT ON write_log FROM {}",
        "REVOKE SELECT ON write_log_watermark FROM {}",
        "ALTER TABLE write_log ENABLE ROW LEVEL SECURITY",
    ],
)
@pytest.mark.parametrize("when", ["before it connects", "while it is connected"])
def test_a_role_that_cannot_read_the_log_is_answered_by_the_database(silent, admin, tenants, roles, hidden, when):
    red = tenants["red"]
    if when == "while it is connected":
        search(red)
        assert search(red) == (True, ["red"])
    admin.execute(SQL(hidden).format(Identifier(urlsplit(roles["red"]).username)))
    if when == "before it connects":
        red.pool.drain()
    for version in ("one", "two"):
        silent.batch_upsert([{"id": "red", "text": version, "source_id": "s", "metadata": {"workspace": "red"}}])
        for _ in range(3):
            assert red.search(QUERY, 5, source_id="s")[0].text == version
            if when == "before it connects":
                assert search(red) == (False, ["red"])


def test_switching_row_security_on_ends_what_was_seen_without_it(admin, tenants):
    red = tenants["red"]
    admin.execute("ALTER TABLE embeddings DISABLE ROW LEVEL SECURITY")
    assert [search(red) for _ in range(6)][-1] == (True, ["blue", "red"])  # each connection finds out for itself
    admin.execute("ALTER TABLE embeddings ENABLE ROW LEVEL SECURITY")
    assert [search(red)[1] for _ in range(3)] == [["red"]] * 3


def test_a_role_that_may_not_read_the_rows_any_more_is_served_none(admin, tenants, roles):
    red = tenants["red"]
    search(red)
    assert search(red) == (True, ["red"])
    admin.execute(SQL("REVOKE SELECT ON embeddings FROM {}").format(Identifier(urlsplit(roles["red"]).username)))
    with pytest.raises(db.PermissionDeniedError):
        search(red)


def test_the_password_of_a_role_is_nowhere_in_redis(store, tenants, roles):
    for opened in tenants.values():
        search(opened)
    client = store.cache_client
    kept = b"".join(key + client.get(key) for key in client.scan_iter("vectorkeep:*"))
    assert b"red" in kept
    assert b"secret" not in kept


def test_a_half_restored_store_keeps_no_answers(store, admin):
    store.batch_upsert([{"id": "x", "text": "t", "source_id": "s", "embedding": QUERY}])
    admin.execute("ALTER TABLE chunks RENAME CONSTRAINT chunks_pkey TO aside")
    store.pool.drain()
    assert [search(store) for _ in range(3)] == [(False, ["x"])] * 3
    admin.execute("ALTER TABLE chunks RENAME CONSTRAINT aside TO chunks_pkey")
    assert [search(store) for _ in range(6)][-1] == (True, ["x"])
