"""Migrations that are killed at the end of each step: run again they arrive, and no row is lost."""

import subprocess

import psycopg
import pytest
from alembic import command as alembic

from db.migrate import alembic_config, current_revision, head_revision, upgrade
from tests.acceptance.conftest import ROOT, environment, forked

REVISIONS = ["0001", "0002", "0003", "0004", "0005", "0006", "0007"]
ROWS = """
    INSERT INTO embeddings (id, source_id, text, embedding) VALUES ('a', 's', 'text', '[1,2,3]'), ('b', 's', '', NULL);
    INSERT INTO chunks (id, document_id, chunk_index, text, embedding) VALUES ('a#0', 'a', 0, 'text', '[1,2,3]')
"""
STORED = (
    "SELECT id, source_id, text, embedding::text FROM embeddings ORDER BY id",
    "SELECT id, document_id, chunk_index, text, embedding::text FROM chunks ORDER BY id",
)


def migrate(url, fault=""):
    env = environment(VECTORKEEP_DATABASE_URL=url, VECTORKEEP_REDIS_URL="off", VECTORKEEP_FAULT=fault)
    return subprocess.run(
        forked("migrate"), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip


def test_every_revision_is_killed():
    assert REVISIONS[-1] == head_revision(), "a new revision belongs into this list"


@pytest.mark.parametrize("revision", REVISIONS)
def test_killed_at_the_end_of_a_step_it_is_run_again(empty_database_url, revision):
    url = empty_database_url
    with psycopg.connect(url, autocommit=True) as connection:
        if revision != "0001":
            upgrade(url, "0001")
            connection.execute(ROWS)
        before = [connection.execute(query).fetchall() for query in STORED] if revision != "0001" else None
        killed = migrate(url, fault=f"migrate.{revision}:kill")
        assert killed.returncode == -9, killed.stderr
        assert (current_revision(connection) or "0000") < revision
        again = migrate(url)
        assert again.returncode == 0, again.stderr
        assert current_revision(connection) == head_revision()
        assert before is None or [connection.execute(query).fetchall() for query in STORED] == before
    alembic.check(alembic_config(url))
