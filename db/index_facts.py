"""What the server tells about a vector index and its table: the facts that the rules of health judge."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import numpy as np
from psycopg import Connection
from psycopg import errors as pg

from .embedding_model import Model
from .filters import Filter
from .models import vector_index_name
from .recall_history import PastMeasurement, newest_measurement
from .row_counts import RowCount, count_rows
from .search import TABLE_OF, Query, Searcher
from .types import BuildProgress, Level

T = TypeVar("T")

# A counter of 0 says something only after this long: a crash or a reset sets it to 0, too.
UNUSED_AFTER = timedelta(days=7)
# Fewer vectors than this the planner may well compare rather than walk the index.
PLANNED_ROWS = 10_000
# The phase of a build of which the role may see no more than its process.
UNSEEN = "not told"
# Of fewer pages asked for, the share that was found in memory says nothing.
_ENOUGH_PAGES = 10_000

# The index by its name in this snapshot: to_regclass knows newer ones, and what a REINDEX CONCURRENTLY has just given
# the name to is not valid yet in it.
_SERVER = """
    SELECT index.indexrelid IS NOT NULL, coalesce(index.indisvalid, false), coalesce(index.indisready, false),
           coalesce(pg_relation_size(index.indexrelid), 0),
           (SELECT opcname::text FROM pg_opclass WHERE oid = index.indclass[0]),
           coalesce(tables.n_live_tup, 0), coalesce(tables.n_dead_tup, 0),
           coalesce((tables.n_tup_del + tables.n_tup_upd - tables.n_tup_hot_upd)::float8
                    / nullif(tables.n_tup_del + tables.n_tup_upd, 0), 1),
           tables.n_tup_ins + tables.n_tup_upd - tables.n_tup_hot_upd + tables.n_tup_del,
           coalesce(indexes.idx_scan, 0), indexes.last_idx_scan,
           now() - greatest(pg_postmaster_start_time(), database.stats_reset),
           coalesce(pages.idx_blks_hit, 0), coalesce(pages.idx_blks_read, 0),
           pg_size_bytes(current_setting('shared_buffers'))
    FROM pg_class AS table_class
    LEFT JOIN (pg_index AS index JOIN pg_class AS index_class ON index_class.oid = index.indexrelid)
        ON index.indrelid = table_class.oid AND index_class.relname = %(index)s
    LEFT JOIN pg_stat_user_tables AS tables ON tables.relid = table_class.oid
    LEFT JOIN pg_stat_user_indexes AS indexes ON indexes.indexrelid = index.indexrelid
    LEFT JOIN pg_statio_user_indexes AS pages ON pages.indexrelid = index.indexrelid
    LEFT JOIN pg_stat_database AS database ON database.datname = current_database()
    WHERE table_class.oid = to_regclass(%(table)s)
"""
_BUILT = """
    SELECT rows, size_bytes, changes, created_at FROM index_builds WHERE index_name = %(index)s ORDER BY id DESC LIMIT 1
"""
# A rebuild makes a copy of another name; where the copy cannot be seen yet, its statement names it. What a role
# without pg_read_all_stats may not see of another's build is NULL: while the index is invalid it may be that one.
_BUILDING = """
    SELECT progress.phase, coalesce(progress.blocks_done, 0), coalesce(progress.blocks_total, 0),
           extract(epoch FROM clock_timestamp() - activity.query_start)::float8, progress.pid
    FROM pg_stat_progress_create_index AS progress JOIN pg_stat_activity AS activity USING (pid)
    LEFT JOIN pg_class AS class ON class.oid = progress.index_relid
    WHERE progress.datname = current_database()
      AND (progress.relid = to_regclass(%(table)s)
               AND position(%(index)s IN coalesce(class.relname, activity.query)) > 0
           OR progress.relid IS NULL
               AND EXISTS (SELECT FROM pg_index JOIN pg_class AS invalid ON invalid.oid = indexrelid
                           WHERE indrelid = to_regclass(%(table)s) AND relname = %(index)s AND NOT indisvalid))
    ORDER BY progress.relid LIMIT 1
"""
# Ours, the unique ones and the older ones are kept; another of the same kind over the same keys is needless. What is
# not valid may be under construction; if not, it is no duplicate but broken.
_DUPLICATES = """
    SELECT needless.indexrelid::regclass::text
    FROM pg_index AS kept JOIN pg_class AS kept_class ON kept_class.oid = kept.indexrelid
    JOIN pg_index AS needless ON needless.indrelid = kept.indrelid AND needless.indexrelid <> kept.indexrelid
    JOIN pg_class AS needless_class ON needless_class.oid = needless.indexrelid
    WHERE kept.indrelid = to_regclass(%(table)s) AND kept.indisvalid AND kept_class.relam = needless_class.relam
      AND (kept.indkey::text, kept.indclass::text, kept.indcollation::text, kept.indoption::text)
          = (needless.indkey::text, needless.indclass::text, needless.indcollation::text, needless.indoption::text)
      AND pg_get_expr(kept.indexprs, kept.indrelid)
          IS NOT DISTINCT FROM pg_get_expr(needless.indexprs, needless.indrelid)
      AND pg_get_expr(kept.indpred, kept.indrelid) IS NOT DISTINCT FROM pg_get_expr(needless.indpred, needless.indrelid)
      AND NOT needless.indisunique AND needless.indisvalid AND needless_class.relname <> %(index)s
      AND (kept.indisunique OR kept_class.relname = %(index)s OR kept.indexrelid < needless.indexrelid)
    GROUP BY needless.indexrelid ORDER BY needless.indexrelid
"""
_UNINDEXED_KEYS = """
    SELECT attname::text
    FROM pg_constraint JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
    WHERE contype = 'f' AND conrelid = to_regclass(%(table)s)
      AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = conrelid AND indkey[0] = conkey[1]
                                             AND indisvalid AND indpred IS NULL)
    ORDER BY attname
"""


@dataclass(frozen=True, slots=True)
class Server:
    """What the catalogs and the counters say, in the order of `_SERVER`."""

    exists: bool
    valid: bool
    ready: bool
    size_bytes: int
    operator_class: str | None
    live_rows: int
    dead_rows: int
    indexed_share: float  # of the dead rows, those that the index holds too: HOT updates never reach it
    changes: int | None
    scans: int
    last_scan: datetime | None
    counted_for: timedelta | None
    pages_hit: int
    pages_read: int
    shared_buffers_bytes: int


@dataclass(frozen=True, slots=True)
class Built:
    """The last build that is on record."""

    rows: int
    size_bytes: int
    changes: int | None
    at: datetime


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the rules look at."""

    table: str
    index: str
    model: Model
    server: Server
    vectors: int
    without_vector: int
    built: Built | None
    building: BuildProgress | None
    planned: bool | None
    planned_generic: bool | None
    duplicates: list[str]
    unindexed_keys: list[str]
    recall: PastMeasurement | None
    estimated: bool = False  # vectors and without_vector are the server's estimate

    @property
    def valid(self) -> bool:
        return self.server.valid and self.server.ready

    @property
    def expected_class(self) -> str:
        return "halfvec_l2_ops" if self.model.distance == "l2" else "halfvec_ip_ops"

    @property
    def dead_share(self) -> float:
        """Of the rows of the table, those that are dead."""
        return self.server.dead_rows / max(1, self.server.dead_rows + self.server.live_rows)

    @property
    def stale_share(self) -> float:
        """Dead rows that the index still holds, as a share of all it holds."""
        dead = self.server.dead_rows * self.server.indexed_share
        return dead / (self.vectors + dead) if self.valid and self.vectors + dead else 0.0

    @property
    def used(self) -> bool | None:
        """Whether searches use the index; None while a counter of 0 says nothing."""
        server = self.server
        if not self.valid or server.scans > 0 or server.last_scan is not None:
            return self.valid
        if server.counted_for is None:
            return None
        existed = server.counted_for if self.built is None else datetime.now(UTC) - self.built.at
        return None if min(server.counted_for, existed) < UNUSED_AFTER else False

    @property
    def bytes_per_row(self) -> float | None:
        return self.server.size_bytes / self.vectors if self.valid and self.vectors else None

    @property
    def bytes_per_row_built(self) -> float | None:
        return self.built.size_bytes / self.built.rows if self.built and self.built.rows else None

    @property
    def bloat(self) -> float | None:
        now, then = self.bytes_per_row, self.bytes_per_row_built
        return now / then if now and then else None

    @property
    def changes_since_build(self) -> int | None:
        """None also where the counter is lower than it must have been: a crash or a reset began it anew."""
        if self.built is None or self.built.changes is None or self.server.changes is None:
            return None
        # Sessions tell what they wrote some seconds later: the rows that were built over were written before.
        changes = self.server.changes - max(self.built.changes, self.built.rows)
        return changes if changes >= 0 else None

    @property
    def hit_rate(self) -> float | None:
        """Of the index pages that were asked for, those found in shared_buffers; None of too few."""
        pages = self.server.pages_hit + self.server.pages_read
        return self.server.pages_hit / pages if pages >= _ENOUGH_PAGES else None

    @property
    def shared_buffers_share(self) -> float:
        return self.server.size_bytes / self.server.shared_buffers_bytes


def gather(connection: Connection[Any], model: Model, level: Level, known: dict[str, RowCount]) -> Facts:
    """The facts of the vector index of `level`. Counts of tables that are `known` are not taken again."""
    table = TABLE_OF[level]
    names = {"table": table, "index": vector_index_name(table)}
    [server] = connection.execute(_SERVER, names).fetchall()
    count = count_rows(connection, table, known)
    built = _permitted(lambda: connection.execute(_BUILT, names).fetchone())
    facts = Server(*server)
    plans = facts.valid and facts.ready and count.vectors > PLANNED_ROWS
    return Facts(
        table=table,
        index=names["index"],
        model=model,
        server=facts,
        vectors=count.vectors,
        without_vector=count.rows - count.vectors,
        built=Built(*built) if built else None,
        building=build_progress(connection, table),
        planned=_is_planned(connection, model, level, generic=False) if plans else None,
        planned_generic=_is_planned(connection, model, level, generic=True) if plans else None,
        duplicates=[name for (name,) in connection.execute(_DUPLICATES, names).fetchall()],
        unindexed_keys=[name for (name,) in connection.execute(_UNINDEXED_KEYS, names).fetchall()],
        recall=_permitted(lambda: newest_measurement(connection, model.model_id, level)),
        estimated=count.estimated,
    )


def _permitted(fetch: Callable[[], T]) -> T | None:
    """What is on record; None where the role may not read the record: the rest is told all the same."""
    try:
        return fetch()
    except pg.InsufficientPrivilege:
        return None


def build_progress(connection: Connection[Any], table: str) -> BuildProgress | None:
    """How far the build of the vector index of `table` is that runs now; None where none runs.

    Its phase is UNSEEN where another role builds, and this one may not see what: it may be another index.
    """
    row = connection.execute(_BUILDING, {"table": table, "index": vector_index_name(table)}).fetchone()
    if row is None:
        return None
    phase, done, total, elapsed_s, pid = row
    share = done / total if total else 0.0
    eta_s = elapsed_s * (1 - share) / share if share and elapsed_s is not None else None
    return BuildProgress(phase or UNSEEN, round(100 * share, 1) if total else None, eta_s, pid)


def _is_planned(connection: Connection[Any], model: Model, level: Level, *, generic: bool) -> bool:
    """Whether a search of the store, of any vector, is planned to use the index."""
    vector = np.zeros(model.dimensions, dtype=np.float32)
    vector[0] = 1
    query = Query(vector, 10, level, Filter(), model.ef_search or 100, False)
    return vector_index_name(TABLE_OF[level]) in Searcher().scan_planned(connection, query, model, generic=generic)
