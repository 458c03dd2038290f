"""`vectorkeep maintain` that gets Ctrl-C or SIGTERM in the middle of a rebuild."""

import signal
import subprocess
import time

import psycopg
import pytest

import db
from tests.acceptance.conftest import ROOT, command

INVALID = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
BUILDING = "SELECT FROM pg_stat_progress_create_index WHERE datname = current_database()"


def wait_for(connection, statement):
    deadline = time.monotonic() + 30
    while not connection.execute(statement).fetchone()[0]:
        assert time.monotonic() < deadline, f"never so: {statement}"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_stops_in_order_and_leaves_no_invalid_index(env, database_url, number, code):
    with psycopg.connect(database_url, autocommit=True) as sql:
        sql.execute("ALTER TABLE embeddings SET (autovacuum_enabled = false)")
        with db.connect(database_url, False) as store:
            store.batch_upsert(
                {"id": f"{n}", "text": "t", "source_id": f"{n % 2}", "embedding": [1.0, n]} for n in range(2400)
            )
            store.delete_by_source_id("1")
            with store.pool.connection() as connection:
                connection.execute("SELECT pg_stat_force_next_flush()")
        with psycopg.connect(database_url) as held:
            held.execute("SELECT count(*) FROM embeddings")  # the rebuild waits for this transaction
            arguments = command("maintain", "--skip-cleanup")
            with subprocess.Popen(
                arguments, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:
                wait_for(sql, f"SELECT ({INVALID}) > 0")
                process.send_signal(number)
                wait_for(sql, f"SELECT NOT EXISTS ({BUILDING})")
                held.rollback()
                out, errors = process.communicate(timeout=30)
        assert process.returncode == code
        assert "Traceback" not in errors
        assert "rebuild stale indexes\tnot reached" in out
        assert sql.execute(INVALID).fetchone() == (0,)
