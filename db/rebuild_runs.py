"""The record of rebuilds, what an interrupted one leaves behind, and the tables that a finished one has replaced."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Connection
from psycopg.types.json import Jsonb

from .config import Distance
from .embedding_model import Model
from .errors import BusyError
from .locks import Purpose, advisory_lock, holds, is_held
from .shadow import SHADOW, TABLES, drop_schema, schema_exists
from .swap import PREVIOUS

# States in which nothing is under way. A run in any other whose process holds no lock was interrupted.
SWAPPED, ROLLED_BACK, RETIRED, FAILED, ABANDONED = "swapped", "rolled back", "retired", "failed", "abandoned"
_ENDED = [SWAPPED, ROLLED_BACK, RETIRED, FAILED, ABANDONED]

_BEGIN = "INSERT INTO rebuild_runs (state, model_id, details) VALUES ('begun', %s, %s) RETURNING id"
_ADVANCE = "UPDATE rebuild_runs SET state = %s, details = details || %s WHERE id = %s"
# A run that has ended stays what it is: of a swap that is committed nothing that fails later makes a failure.
_END = """
    UPDATE rebuild_runs SET state = %s, details = details || %s, finished_at = clock_timestamp()
    WHERE id = %s AND state <> ALL (%s)
"""
_UNFINISHED = "SELECT id, state, started_at FROM rebuild_runs WHERE state <> ALL (%s) ORDER BY id DESC LIMIT 1"
_ABANDON = """
    UPDATE rebuild_runs SET state = 'abandoned', finished_at = clock_timestamp(),
           details = details || jsonb_build_object('interrupted_in', state)
    WHERE state <> ALL (%s)
"""
_OIDS = "SELECT oid::bigint FROM unnest(%s::text[]) AS name, to_regclass(name) AS oid WHERE oid IS NOT NULL"
_LAST_SWAP = """
    SELECT id, finished_at, extract(epoch FROM clock_timestamp() - finished_at)::float8, details FROM rebuild_runs
    WHERE state IN ('swapped', 'rolled back') AND details -> 'previous_oids' = %s ORDER BY finished_at DESC LIMIT 1
"""
# Tables whose record is not there were replaced before the last run that is known ended, if any is.
_AGE_AT_LEAST = """
    SELECT coalesce(extract(epoch FROM clock_timestamp() - max(coalesce(finished_at, started_at))), 0)::float8
    FROM rebuild_runs
"""
_RETIRE = "UPDATE rebuild_runs SET state = 'retired' WHERE state IN ('swapped', 'rolled back')"
_SCHEMA_SIZE = """
    SELECT count(*), coalesce(sum(pg_total_relation_size(pg_class.oid)), 0)::bigint
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = %s AND relkind = 'r' AND relname = ANY (%s)
"""


@dataclass(frozen=True, slots=True)
class UnfinishedRebuild:
    """What an interrupted rebuild left. state: how far it came; None where there are only tables of it."""

    state: str | None
    started_at: datetime | None
    shadow_bytes: int

    def __str__(self) -> str:
        began = "" if self.started_at is None else f", begun {self.started_at.astimezone():%Y-%m-%d %H:%M}"
        return f"interrupted in {self.state or 'tidying up'!r}{began}, {self.shadow_bytes:,} bytes of shadow tables"


@dataclass(frozen=True, slots=True)
class PreviousTables:
    """The tables that the last swap replaced, and what it recorded.

    run_id: None where no record is of these very tables; they are then at least `age_s` old, and cannot be told to be
    of any model.
    """

    run_id: int | None
    swapped_at: datetime | None
    age_s: float
    bytes: int
    details: dict[str, Any]

    @property
    def model(self) -> Model | None:
        """The model of their vectors."""
        return model_from(self.details.get("previous_model"))


def begin_run(connection: Connection[Any], model: Model | None, details: dict[str, Any]) -> int:
    [(run_id,)] = connection.execute(_BEGIN, (model and model.model_id, Jsonb(details))).fetchall()
    return int(run_id)


def advance_run(connection: Connection[Any], run_id: int, state: str, **details: Any) -> None:
    connection.execute(_ADVANCE, (state, Jsonb(details), run_id))


def end_run(connection: Connection[Any], run_id: int, state: str, **details: Any) -> None:
    """Record that the run ended in `state`; one that has ended already is left as it is."""
    connection.execute(_END, (state, Jsonb(details), run_id, _ENDED))


def previous_oids(connection: Connection[Any]) -> list[int]:
    """What tells the previous tables from any others that stood in their place."""
    rows = connection.execute(_OIDS, ([f"{PREVIOUS}.{table}" for table in TABLES],))
    return [oid for (oid,) in rows]


def unfinished_rebuild(connection: Connection[Any]) -> UnfinishedRebuild | None:
    """What is left of an interrupted rebuild, or None; one that still runs is no finding."""
    if is_held(connection, Purpose.REBUILD) or holds(connection, Purpose.REBUILD):
        return None
    run = connection.execute(_UNFINISHED, (_ENDED,)).fetchone()
    if run is None and not schema_exists(connection, SHADOW):
        return None
    _, size = _tables_in(connection, SHADOW)
    return UnfinishedRebuild(run[1] if run else None, run[2] if run else None, size)


def require_lock(connection: Connection[Any]) -> None:
    """Raise BusyError unless `connection` holds the lock of rebuilds; psycopg.OperationalError where it is lost."""
    if not holds(connection, Purpose.REBUILD):
        raise BusyError("this rebuild holds its lock no more, and another may have begun; run it again")


def clear_remains(connection: Connection[Any]) -> UnfinishedRebuild | None:
    """Drop what an interrupted rebuild left; the live tables are not touched. Returns what there was.

    `connection` is a maintenance one, of the tables' owner. Raises BusyError where a rebuild runs.
    """
    with advisory_lock(connection, Purpose.REBUILD, wait_s=0):
        return clear_remains_locked(connection)


def clear_remains_locked(connection: Connection[Any]) -> UnfinishedRebuild | None:
    """`clear_remains` where this session holds the lock of rebuilds already."""
    _, size = _tables_in(connection, SHADOW)
    run = connection.execute(_UNFINISHED, (_ENDED,)).fetchone()
    dropped = drop_schema(connection, SHADOW)
    connection.execute(_ABANDON, (_ENDED,))
    if run is None and not dropped:
        return None
    return UnfinishedRebuild(run[1] if run else None, run[2] if run else None, size)


def previous_tables(connection: Connection[Any]) -> PreviousTables | None:
    """The tables that the last rebuild, or rollback, replaced; None where they are retired."""
    count, size = _tables_in(connection, PREVIOUS)
    if count < len(TABLES):
        return None
    row = connection.execute(_LAST_SWAP, (Jsonb(previous_oids(connection)),)).fetchone()
    if row is None:  # its record was removed, or the tables came from elsewhere
        [(age_s,)] = connection.execute(_AGE_AT_LEAST).fetchall()
        return PreviousTables(None, None, age_s, size, {})
    return PreviousTables(row[0], row[1], row[2], size, row[3])


def retire_previous(connection: Connection[Any], older_than_s: float) -> int:
    """Drop the tables that a rebuild replaced more than `older_than_s` ago. Returns the bytes that this freed.

    Afterwards nothing can be rolled back. Raises BusyError where a rebuild runs.
    """
    previous = previous_tables(connection)
    if previous is None or previous.age_s < older_than_s:
        return 0
    with advisory_lock(connection, Purpose.REBUILD, wait_s=0):
        drop_schema(connection, PREVIOUS)
        connection.execute(_RETIRE)
    return previous.bytes


def require_previous(connection: Connection[Any]) -> PreviousTables:
    """The tables to roll back to. Raises BusyError where there are none to be had."""
    previous = previous_tables(connection)
    if previous is None:
        raise BusyError("there are no previous tables to roll back to: nothing was rebuilt, or they are retired")
    if previous.run_id is None:
        raise BusyError(
            f"no record in rebuild_runs is of the tables in {PREVIOUS}, so what model they are of is not known; "
            "they cannot be rolled back to"
        )
    return previous


def model_to(model: Model | None) -> dict[str, Any] | None:
    """`model` as the record of a run holds it."""
    if model is None:
        return None
    return {"model_id": model.model_id, "dimensions": model.dimensions, "distance": model.distance}


def model_from(recorded: dict[str, Any] | None) -> Model | None:
    if recorded is None:
        return None
    distance: Distance = recorded["distance"]
    return Model(recorded["model_id"], recorded["dimensions"], distance)


def _tables_in(connection: Connection[Any], schema: str) -> tuple[int, int]:
    [(count, size)] = connection.execute(_SCHEMA_SIZE, (schema, list(TABLES))).fetchall()
    return int(count), int(size)
