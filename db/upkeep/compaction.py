"""VACUUM where dead rows ask for it, and the prediction of what it costs beside a rebuild of the index.

VACUUM repairs an HNSW graph element by element: each that has a dead neighbour looks for new ones, which costs
as much as an insertion. With 2m = 32 neighbours in the lowest layer, already 2 % of dead rows touch half of all
elements. A rebuild inserts all of them, but in memory and in parallel. So the index is rebuilt first, as
pgvector's authors advise, and VACUUM then finds nothing dead in it.
"""

from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from ..types import IndexReport
from ..vacuum import vacuum as vacuum_table
from .run import NotPermitted, Run, Skipped

# A table is vacuumed past this share of dead rows, and not for a handful of them.
_DEAD_SHARE = 0.1
_DEAD_ROWS = 1000
# Neighbours in the lowest layer of an HNSW graph, 2m.
_NEIGHBOURS = 32
# Of a build that is not on record, seconds a row; and how much longer an insertion into a finished graph takes.
_BUILD_S = 0.0003
_INSERT_FACTOR = 8

VACUUMED_TABLES = ("embeddings", "chunks", "vector_cache", "write_log", "performance_metrics")

_DEAD = "SELECT n_live_tup, n_dead_tup FROM pg_stat_user_tables WHERE relid = to_regclass(%s)"
_SIZE = "SELECT pg_total_relation_size(to_regclass(%s))"
_BUILD_RATE = """
    SELECT duration_ms / 1000 / rows FROM index_builds
    WHERE index_name = %s AND rows >= 1000 ORDER BY id DESC LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What VACUUM of an index costs as it is, and what a rebuild does, in seconds."""

    vacuum_s: float
    rebuild_s: float

    @property
    def rebuild_is_cheaper(self) -> bool:
        return self.rebuild_s < self.vacuum_s

    def __str__(self) -> str:
        return f"VACUUM of it about {self.vacuum_s:.1f} s, a rebuild {self.rebuild_s:.1f} s"


def predict(connection: Connection[Any], report: IndexReport) -> Prediction:
    """From the rate of the last build, the rows, and the share of them that is dead."""
    row = connection.execute(_BUILD_RATE, (report.name,)).fetchone()
    build_s = row[0] if row else _BUILD_S
    touched = 1 - (1 - report.stale_percent / 100) ** _NEIGHBOURS
    return Prediction(
        vacuum_s=report.indexed_rows * touched * build_s * _INSERT_FACTOR,
        rebuild_s=report.indexed_rows * build_s,
    )


def asks_for_vacuum(run: Run, table: str) -> bool:
    live, dead = run.row(_DEAD, table) or (0, 0)
    return bool(dead >= max(_DEAD_ROWS, _DEAD_SHARE * (live + dead)))


def vacuum(run: Run, table: str) -> str:
    """VACUUM (ANALYZE) where enough rows are dead."""
    live, dead = run.row(_DEAD, table) or (0, 0)
    if not asks_for_vacuum(run, table):
        raise Skipped(f"{dead} dead rows of {live + dead} do not ask for it")
    if run.plan.dry_run:
        raise Skipped(f"dry run: would vacuum away {dead} dead rows")
    [before] = run.row(_SIZE, table) or (0,)
    if warnings := vacuum_table(run.connection, table):
        raise NotPermitted("; ".join(warnings))
    [after] = run.row(_SIZE, table) or (0,)
    run.bytes_removed += max(0, before - after)
    return f"vacuumed {dead} dead rows away"
