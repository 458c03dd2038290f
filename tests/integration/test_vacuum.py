"""vacuum(): what PostgreSQL warns about is told from what it did not permit."""

import logging

import psycopg
import pytest

from db.vacuum import vacuum

DEAD = "SELECT relname, n_dead_tup FROM pg_stat_user_tables WHERE relname IN ('embeddings', 'chunks') ORDER BY 1"


@pytest.fixture
def dead(sql):
    """One dead row in each of two tables."""
    for table in ("embeddings", "chunks"):
        sql(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    sql("INSERT INTO embeddings (id, text) VALUES ('a', 't'), ('b', 't')")
    sql("INSERT INTO chunks (id, document_id, chunk_index, text) VALUES ('a#0', 'a', 0, 't')")
    sql("DELETE FROM embeddings WHERE id = 'a'")
    sql("SELECT pg_stat_force_next_flush()")
    assert sql(DEAD) == [("chunks", 1), ("embeddings", 1)]


@pytest.mark.usefixtures("dead")
def test_a_warning_about_something_else_is_logged_and_the_table_is_vacuumed(admin, sql, caplog, until):
    sql("""
        CREATE FUNCTION talks(id text) RETURNS text IMMUTABLE LANGUAGE plpgsql
        AS $$ BEGIN RAISE WARNING 'something else'; RETURN id; END $$
    """)
    sql("CREATE INDEX talking ON embeddings (talks(id))")
    with caplog.at_level(logging.WARNING, "vectorkeep"):
        until(lambda: vacuum(admin, "embeddings", "chunks") == [] and sql(DEAD) == [("chunks", 0), ("embeddings", 0)])
    assert {record.reason for record in caplog.records} == {"something else"}


@pytest.mark.every_server
@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize("right", ["owner of one table", "MAINTAIN", "owner of the database"])
def test_what_a_role_may_not_vacuum_is_told_and_the_rest_is_vacuumed(database_url, url_as, admin, sql, until, right):
    if right == "MAINTAIN" and admin.info.server_version < 170000:
        pytest.skip("PostgreSQL 16 has no such right")
    [(database,)] = sql("SELECT current_database()")
    role = f"{database}_worker"
    sql(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    grant = {
        "owner of one table": f"ALTER TABLE chunks OWNER TO {role}",
        "MAINTAIN": f"GRANT MAINTAIN ON chunks TO {role}",
        "owner of the database": f"ALTER DATABASE {database} OWNER TO {role}",
    }
    told, dead = ["permission denied to vacuum embeddings"], 1
    if right == "owner of the database":
        told, dead = [], 0
    sql(grant[right])
    try:
        with psycopg.connect(url_as(role, "pw"), autocommit=True) as worker:
            until(lambda: vacuum(worker, "embeddings", "chunks") == told and dict(sql(DEAD))["chunks"] == 0)
            assert vacuum(worker, "embeddings") == told
            assert sql(DEAD) == [("chunks", 0), ("embeddings", dead)]
    finally:
        sql(f"ALTER DATABASE {database} OWNER TO CURRENT_USER")
        sql(f"REASSIGN OWNED BY {role} TO CURRENT_USER")
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")
