"""Rolling a rebuild back: the tables that it replaced and the live ones exchange their places once more."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import Connection
from psycopg.sql import SQL, Identifier

from .config import Settings
from .errors import SchemaError, ValidationError
from .pause import MAX_TTL_S
from .rebuild import rebuild_session
from .rebuild_runs import (
    FAILED,
    ROLLED_BACK,
    PreviousTables,
    begin_run,
    clear_remains_locked,
    end_run,
    model_to,
    previous_oids,
    require_previous,
)
from .shadow import SHADOW, TABLES, create_schema, definitions_of, drop_schema, home_of
from .shadow_fill import count_kept, count_rows
from .swap import PREVIOUS, Exchange, Swap
from .types import StepProgress

_LAST_WRITE = "SELECT coalesce(max(id), 0) FROM write_log"
# As long as the swap's own row is there, none after it is pruned; then the sequence knows how many there were at most.
_LOGGED = """
    SELECT CASE WHEN EXISTS (SELECT FROM write_log WHERE id = %(swap)s)
                THEN (SELECT count(*) FROM write_log WHERE id > %(swap)s)
                ELSE pg_sequence_last_value(pg_get_serial_sequence('write_log', 'id')::regclass) - %(swap)s END
"""
# Of another name or type in one of the two, as after a migration.
_OTHER_COLUMNS = """
    SELECT relname || '.' || attname
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    WHERE attnum > 0 AND NOT attisdropped
      AND attrelid IN (SELECT unnest(ARRAY[to_regclass(name), to_regclass(%(previous)s || '.' || name)])
                       FROM unnest(%(tables)s::text[]) AS name)
    GROUP BY relname, attname, atttypid, atttypmod HAVING count(*) < 2
    ORDER BY 1
"""
_WRITTEN_SINCE = """
    SELECT (SELECT count(*) FROM embeddings WHERE updated_at > %(since)s),
           (SELECT count(*) FROM chunks WHERE created_at > %(since)s)
"""


@dataclass(frozen=True, slots=True)
class Changes:
    """What was written since the swap, and would be lost with the live tables.

    writes: transactions, at most. documents, chunks: rows written since. more_documents, more_chunks: how many more
    rows there are than then, below zero where rows were deleted.
    """

    writes: int
    documents: int
    chunks: int
    more_documents: int
    more_chunks: int

    @property
    def any(self) -> bool:
        return any((self.writes, self.documents, self.chunks, self.more_documents, self.more_chunks))

    def __str__(self) -> str:
        return (
            f"{self.writes} write transactions since the swap: {self.documents} documents and {self.chunks} chunks "
            f"written, {self.more_documents:+d} documents and {self.more_chunks:+d} chunks in all"
        )


@dataclass(frozen=True, slots=True)
class RollbackResult:
    """What was brought back. lost: what had been written since the swap; it is in the tables that are now aside."""

    documents: int
    chunks: int
    model_id: str | None
    lost: Changes
    swap_ms: float


def changes_since_swap(connection: Connection[Any], previous: PreviousTables) -> Changes:
    """What a rollback to `previous` would lose."""
    [(documents, chunks)] = connection.execute(_WRITTEN_SINCE, {"since": previous.swapped_at}).fetchall()
    [(writes,)] = connection.execute(_LOGGED, {"swap": int(previous.details["log_id"])}).fetchall()
    more = {table: count_kept(connection, table, []) - int(previous.details[table]) for table in TABLES}
    return Changes(writes, documents, chunks, more["embeddings"], more["chunks"])


def roll_back(
    settings: Settings, *, force: bool = False, swap_wait_s: float = 60, on_progress: StepProgress | None = None
) -> RollbackResult:
    """Bring back the tables that the last rebuild replaced; a rollback of a rollback undoes it.

    Raises ValidationError where something was written since and `force` is False, SchemaError where the live tables got
    other columns since, BusyError where there is nothing to bring back or the tables' locks are not to be had. The
    store is then as it was.
    """
    with rebuild_session(settings) as (parts, lead):
        home, owner = home_of(lead)
        clear_remains_locked(lead)
        pause = parts.pause.begin("a rebuild is rolled back", ttl_s=MAX_TTL_S)
        previous = require_previous(lead)
        _require_equal_columns(lead)
        lost = changes_since_swap(lead, previous)
        if lost.any and not force:
            raise ValidationError(f"a rollback would lose what was written: {lost}; --force does it all the same")
        run_id = begin_run(lead, previous.model, {"rolls_back": previous.run_id})
        [(last_write,)] = lead.execute(_LAST_WRITE).fetchall()
        assert pause.owner_pid is not None
        what = Exchange(home, definitions_of(lead), parts.model.registered, previous.model, last_write, pause.owner_pid)
        if on_progress is not None:
            on_progress("swapping", "waits for the searches under way")
        swap = Swap(parts, lead, what)
        try:
            create_schema(lead, SHADOW, owner)
            return _Rollback(lead, swap, run_id, lost).run(swap_wait_s)
        except BaseException as exc:
            with suppress(psycopg.Error):
                if not swap.done:
                    end_run(lead, run_id, FAILED, reason=f"{type(exc).__name__}: {exc}"[:500])
            raise
        finally:
            with suppress(psycopg.Error):
                drop_schema(lead, SHADOW)


def _require_equal_columns(connection: Connection[Any]) -> None:
    names = {"previous": PREVIOUS, "tables": list(TABLES)}
    if others := [name for (name,) in connection.execute(_OTHER_COLUMNS, names)]:
        raise SchemaError(
            f"the tables in {PREVIOUS} have other columns than the live ones: {', '.join(dict.fromkeys(others))}; "
            "alter them alike first, or rebuild from the live tables instead"
        )


@dataclass
class _Rollback:
    lead: Connection[Any]
    swap: Swap
    run_id: int
    lost: Changes

    def run(self, swap_wait_s: float) -> RollbackResult:
        # Before the exchange: nobody writes to these tables, and while it lasts every search waits.
        self.counts = {table: count_rows(self.lead, PREVIOUS, table) for table in TABLES}
        self.swap.run(wait_s=swap_wait_s, prepare=self._bring_forth, conclude=self._conclude)
        model = self.swap.what.after
        return RollbackResult(
            self.counts["embeddings"], self.counts["chunks"], model.model_id if model else None, self.lost, self.swap.ms
        )

    def _bring_forth(self) -> None:
        """In the transaction of the exchange: the previous tables go where it looks for the new ones."""
        for table in TABLES:
            self.lead.execute(
                SQL("ALTER TABLE {} SET SCHEMA {}").format(Identifier(PREVIOUS, table), Identifier(SHADOW))
            )

    def _conclude(self) -> None:
        [(log_id,)] = self.lead.execute(_LAST_WRITE).fetchall()
        end_run(
            self.lead,
            self.run_id,
            ROLLED_BACK,
            log_id=log_id,
            previous_model=model_to(self.swap.what.before),
            previous_oids=previous_oids(self.lead),
            **self.counts,
        )
