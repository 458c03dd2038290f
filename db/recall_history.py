"""What was measured before: kept for `recall`'s place in index health, and to know when to measure again."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Connection

from .embedding_model import Model
from .models import vector_index_name
from .search import TABLE_OF
from .types import Level, RecallReport

# What piled up since is compared with these: the planner's estimate of the rows, the counter of changes.
_RECORD = """
    INSERT INTO recall_measurements (
        model_id, level, filtered, k, sample, recall, recall_low, recall_high, target, ef_search,
        recommended_ef_search, indexed_ms_p50, exact_ms_p50, looked_up, unreachable, zero_vectors, rows, changes)
    SELECT %(model_id)s, %(level)s, %(filtered)s, %(k)s, %(sample)s, %(recall)s, %(low)s, %(high)s, %(target)s,
           %(ef_search)s, %(recommended)s, %(indexed_ms)s, %(exact_ms)s, %(looked_up)s, %(unreachable)s,
           %(zero_vectors)s, greatest(reltuples, 0)::bigint,
           (SELECT n_tup_ins + n_tup_upd - n_tup_hot_upd + n_tup_del
            FROM pg_stat_user_tables WHERE relid = pg_class.oid)
    FROM pg_class WHERE oid = to_regclass(%(table)s)
"""
# Searches without a filter, through the index as it is now.
_NEWEST = """
    SELECT recall, recall_low, recall_high, target, ef_search, created_at, looked_up, unreachable, zero_vectors, rows,
           changes, recommended_ef_search
    FROM recall_measurements
    WHERE model_id = %(model_id)s AND level = %(level)s AND NOT filtered
      AND created_at > coalesce(
          (SELECT max(created_at) FROM index_builds WHERE index_name = %(index)s), '-infinity')
    ORDER BY id DESC LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class PastMeasurement:
    """The newest measurement of an index since it was built."""

    recall: float
    low: float
    high: float
    target: float
    ef_search: int
    measured_at: datetime
    looked_up: int
    unreachable: int
    zero_vectors: int
    rows: int
    changes: int | None
    recommended_ef_search: int | None = None


def record_measurement(connection: Connection[Any], model: Model, report: RecallReport, *, filtered: bool) -> None:
    """Keep `report`. Raises what psycopg raises where the role may not."""
    connection.execute(
        _RECORD,
        {
            "model_id": model.model_id,
            "level": report.level,
            "table": TABLE_OF[report.level],
            "filtered": filtered,
            "k": report.k,
            "sample": report.sample,
            "recall": report.recall,
            "low": report.interval[0],
            "high": report.interval[1],
            "target": report.target,
            "ef_search": report.ef_search,
            "recommended": report.recommended_ef_search,
            "indexed_ms": report.indexed_ms_p50,
            "exact_ms": report.exact_ms_p50,
            "looked_up": report.looked_up,
            "unreachable": report.unreachable,
            "zero_vectors": report.zero_vectors,
        },
    )


def newest_measurement(connection: Connection[Any], model_id: str, level: Level) -> PastMeasurement | None:
    index = vector_index_name(TABLE_OF[level])
    row = connection.execute(_NEWEST, {"model_id": model_id, "level": level, "index": index}).fetchone()
    return PastMeasurement(*row) if row else None
