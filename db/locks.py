"""Locks: what the advisory ones are called, and how to wait for one without harming anybody."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from hashlib import sha256
from typing import Any

from psycopg import Connection
from psycopg import errors as pg

from .errors import BusyError

# First key of every advisory lock of ours ("vk"); the second is the purpose.
LOCK_CLASS = 0x766B
_POLL_S = 0.05
_STINT_S = 0.1

_HOLDER = """
    SELECT activity.pid, activity.application_name, activity.usename, activity.client_addr
    FROM pg_locks AS lock JOIN pg_stat_activity AS activity USING (pid)
    WHERE lock.locktype = 'advisory' AND lock.granted AND lock.objsubid = 2
      AND lock.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND lock.classid = %s::oid AND lock.objid = %s::oid
    LIMIT 1
"""


# The server says which session is this one: a pooler would tell a process id of its own.
_HOLDERS = """
    SELECT DISTINCT pid, pid = pg_backend_pid() FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 2
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND classid = %s::oid AND objid = ANY(%s::oid[])
    ORDER BY pid
"""


class Purpose(IntEnum):
    """What an advisory lock of ours protects."""

    WRITERS = 1  # shared by every write transaction, exclusive to whoever must keep them out
    REGISTRY = 2
    MAINTENANCE = 3
    INDEX_BUILD = 4
    BULK_LOAD = 5
    REBUILD = 6
    ROLES = 7


# A session that holds a pause of ingestion has the lock of this class and its own process id.
PAUSE_CLASS = 0x766D

# One source's sync: the class, and a hash of the source. Sources that share a hash wait for each other.
SYNC_CLASS = 0x766C


@contextmanager
def sync_lock(connection: Connection[Any], source_id: str, *, wait_s: float) -> Iterator[None]:
    """Hold the lock of one source's sync on `connection`. Raises BusyError that says who has it."""
    digest = int.from_bytes(sha256(source_id.encode()).digest()[:4], signed=True)
    with _locked(connection, (SYNC_CLASS, digest), f"the sync of source {source_id!r}", wait_s):
        yield


@contextmanager
def advisory_lock(connection: Connection[Any], purpose: Purpose, *, wait_s: float) -> Iterator[None]:
    """Hold the lock of `purpose` on `connection`. Raises BusyError that says who has it."""
    with _locked(connection, (LOCK_CLASS, int(purpose)), purpose.name.lower(), wait_s):
        yield


def is_held(connection: Connection[Any], *purposes: Purpose) -> bool:
    """Whether another session has one of the locks."""
    return bool(other_holders(connection, *purposes))


def other_holders(connection: Connection[Any], *purposes: Purpose) -> list[int]:
    """The process ids of the other sessions that have one of the locks."""
    return [pid for pid, own in _holders(connection, purposes) if not own]


def holds(connection: Connection[Any], purpose: Purpose) -> bool:
    """Whether this session has the lock."""
    return any(own for _, own in _holders(connection, [purpose]))


def _holders(connection: Connection[Any], purposes: Iterable[Purpose]) -> list[tuple[int, bool]]:
    return connection.execute(_HOLDERS, (LOCK_CLASS, list(map(int, purposes)))).fetchall()


@contextmanager
def _locked(connection: Connection[Any], key: tuple[int, int], name: str, wait_s: float) -> Iterator[None]:
    """Hold a session lock on `connection`, a direct one in autocommit. Raises BusyError after `wait_s`.

    It polls: a session that waits inside a statement holds a snapshot, and whoever has the lock and
    builds an index CONCURRENTLY would wait for that snapshot for ever.
    """
    deadline = time.monotonic() + wait_s
    while not _try_lock(connection, key):
        if time.monotonic() >= deadline:
            raise BusyError(
                f"{name} is locked by {_holder(connection, key)}; "
                f"gave up after {wait_s:g} s, try again when it has finished"
            )
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(%s, %s)", key)


def limit_lock_waits(connection: Connection[Any], timeout_s: float) -> None:
    """For the rest of the transaction, let no statement wait for a lock longer than `timeout_s`: LockNotAvailable."""
    connection.execute(f"SET LOCAL lock_timeout = {max(1, round(1000 * timeout_s))}")  # 0 would be no limit


def wait_for_writers(connection: Connection[Any], *, wait_s: float) -> None:
    """Return once every write transaction that runs now has ended. Raises BusyError after `wait_s`.

    Newer writers queue behind this for a moment at a time only: they shall be told at once that they are kept out.
    """
    key = (LOCK_CLASS, int(Purpose.WRITERS))
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with connection.transaction():
                limit_lock_waits(connection, _STINT_S)
                connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", key)
                return
        except pg.LockNotAvailable as exc:
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"a write of {_holder(connection, key)} has not ended within {wait_s:g} s; "
                    "try again when it has finished"
                ) from exc
        time.sleep(_POLL_S)


def _try_lock(connection: Connection[Any], key: tuple[int, int]) -> bool:
    row = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", key).fetchone()
    return bool(row and row[0])


def _holder(connection: Connection[Any], key: tuple[int, int]) -> str:
    """Who holds the lock, for a message to a person."""
    row = connection.execute(_HOLDER, (key[0], key[1] & 0xFFFFFFFF)).fetchone()
    if row is None:
        return "nobody any more"
    pid, application, user, address = row
    return f"process {pid} ({application or 'unnamed'}, user {user}, {address or 'local'})"
