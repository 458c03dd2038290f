"""Pauses of ingestion: one row in the database that every write looks at once it has the writers' lock.

A pause that a program takes is bound to a session of its own, which holds an advisory lock named after its own
process id: when that session is gone, so is the pause. One that `vectorkeep pause` takes outlives the command. Both
end when their time is up, or with `resume`.
"""

import getpass
import logging
import os
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import Connection, sql

from .documents import check_text
from .engine import Database
from .errors import BusyError, PausedError, ValidationError
from .locks import PAUSE_CLASS, wait_for_writers
from .values import shown

logger = logging.getLogger("vectorkeep")

MAX_TTL_S = 366 * 86_400.0
# Writes that were under way when the pause was taken are waited for this long.
_IN_FLIGHT_WAIT_S = 60.0

# Locks are looked at where there is a row, and only then.
_IN_FORCE = sql.SQL("""
    pause.expires_at > clock_timestamp() AND (pause.owner_pid IS NULL OR EXISTS (
        SELECT FROM pg_locks
        WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND pid = pause.owner_pid
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND classid = {}::oid AND objid = pause.owner_pid::oid))
""").format(PAUSE_CLASS)
_SELECT = sql.SQL("""
    SELECT reason, owner, owner_pid, paused_at, expires_at, {in_force} FROM ingestion_pause AS pause
""").format(in_force=_IN_FORCE)
# Who is paused already may change its own pause; so may any operator an operator's.
_TAKE = sql.SQL("""
    INSERT INTO ingestion_pause AS pause (reason, owner, owner_pid, owner_started_at, paused_at, expires_at)
    VALUES (%(reason)s, %(owner)s, %(pid)s,
            (SELECT backend_start FROM pg_stat_activity WHERE pid = %(pid)s),
            clock_timestamp(), clock_timestamp() + make_interval(secs => %(ttl_s)s))
    ON CONFLICT (singleton) DO UPDATE
    SET reason = EXCLUDED.reason, owner = EXCLUDED.owner, owner_pid = EXCLUDED.owner_pid,
        owner_started_at = EXCLUDED.owner_started_at, paused_at = EXCLUDED.paused_at, expires_at = EXCLUDED.expires_at
    WHERE pause.owner_pid IS NOT DISTINCT FROM EXCLUDED.owner_pid OR NOT ({in_force})
    RETURNING 1
""").format(in_force=_IN_FORCE)
_END = sql.SQL("DELETE FROM ingestion_pause AS pause RETURNING reason, owner, owner_pid, paused_at, expires_at, {}")
_END_OWN = "DELETE FROM ingestion_pause WHERE owner_pid IS NOT DISTINCT FROM %s"


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause as it is recorded. `in_force` False: its owner is gone or its time is up, and it stops nobody."""

    reason: str
    owner: str
    owner_pid: int | None
    paused_at: datetime
    expires_at: datetime
    in_force: bool = True

    def __str__(self) -> str:
        """Who, why, since when, until when."""
        ends = f"until {_shown(self.expires_at)}"
        if self.owner_pid is not None:
            ends += " or until its session ends"
        return f"by {self.owner} since {_shown(self.paused_at)} {ends}: {self.reason}"

    def error(self) -> PausedError:
        return PausedError(
            f"ingestion is paused {self}; 'vectorkeep resume' ends the pause, "
            "and a store opened with on_pause='wait' waits for its end"
        )


def recorded_pause(connection: Connection[Any]) -> Pause | None:
    """The pause on record, in force or not."""
    row = connection.execute(_SELECT).fetchone()
    return Pause(*row) if row else None


def current_pause(connection: Connection[Any]) -> Pause | None:
    """The pause that stops writes now."""
    pause = recorded_pause(connection)
    return pause if pause is not None and pause.in_force else None


def lapsed_pause(connection: Connection[Any]) -> Pause | None:
    """A pause on record that stops nobody any more: its owner died, or its time is up."""
    pause = recorded_pause(connection)
    return pause if pause is not None and not pause.in_force else None


def end_pause(connection: Connection[Any]) -> Pause | None:
    """End the pause, whoever took it. Returns what was on record."""
    row = connection.execute(_END.format(_IN_FORCE)).fetchone()
    if row is None:
        return None
    logger.info("ingestion.resumed", extra={"reason": row[0], "owner": row[1]})
    return Pause(*row)


def pause_for_operator(connection: Connection[Any], reason: str, *, ttl_s: float) -> Pause:
    """Pause ingestion for `ttl_s` seconds; it outlives `connection`. Again: the pause begins anew.

    Returns once the writes that were under way have ended. Raises BusyError where a program's pause is in force,
    or where a write does not end.
    """
    _check(reason, ttl_s)
    return _take(connection, reason, ttl_s, pid=None)


class SessionPause:
    """The pause of an open store: in force while this object holds its session."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._held = ExitStack()
        self._connection: Connection[Any] | None = None

    def begin(self, reason: str, *, ttl_s: float) -> Pause:
        """Pause ingestion, or change the pause that this object holds. Raises BusyError as `pause_for_operator`."""
        _check(reason, ttl_s)  # first: what is refused leaves the pause that is in force
        try:
            connection = self._session()
            pid = connection.info.backend_pid
            connection.execute("SELECT pg_advisory_lock(%s, %s)", (PAUSE_CLASS, pid))
            return _take(connection, reason, ttl_s, pid=pid)
        except BaseException:
            self.close()
            raise

    def _session(self) -> Connection[Any]:
        """The session that is held, or a new one where there is none or the server ended it."""
        if self._connection is not None:
            with suppress(psycopg.OperationalError):
                self._connection.execute("SELECT")
                return self._connection
        self._held.close()
        self._connection = self._held.enter_context(self._database.maintenance())
        return self._connection

    def end(self) -> None:
        """End the pause, whoever took it."""
        with self._database.connection() as connection:
            end_pause(connection)
        self.close()

    def close(self) -> None:
        """End the pause that this object holds, if it does."""
        connection, self._connection = self._connection, None
        try:
            if connection is not None and not connection.closed:
                connection.execute(_END_OWN, (connection.info.backend_pid,))
        except psycopg.Error as exc:  # with its session it ends all the same
            logger.debug("ingestion.pause_not_removed", extra={"reason": str(exc).strip()})
        finally:
            self._held.close()


def _check(reason: Any, ttl_s: Any) -> None:
    check_text(reason, "reason")
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float) or not 0 < ttl_s <= MAX_TTL_S:
        raise ValidationError(f"ttl_s is {shown(ttl_s)}; expected seconds, more than 0 and at most {MAX_TTL_S:.0f}")


def _take(connection: Connection[Any], reason: str, ttl_s: float, *, pid: int | None) -> Pause:
    given = {"reason": reason, "owner": _owner(), "pid": pid, "ttl_s": ttl_s}
    if connection.execute(_TAKE, given).fetchone() is None:
        other = recorded_pause(connection) or "by a process that has resumed meanwhile"
        raise BusyError(f"ingestion is paused already {other}; 'vectorkeep resume' ends that pause")
    # Committed, and only then waited: who gets the writers' lock from now on sees the pause.
    try:
        wait_for_writers(connection, wait_s=_IN_FLIGHT_WAIT_S)
    except BaseException:
        connection.execute(_END_OWN, (pid,))
        raise
    pause = recorded_pause(connection)
    if pause is None:
        raise BusyError("ingestion was resumed by another process while this one waited for writes in flight")
    logger.info("ingestion.paused", extra={"reason": reason, "owner": pause.owner, "ttl_s": ttl_s})
    return pause


def _owner() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()} (process {os.getpid()})"


def _shown(time_: datetime) -> str:
    return time_.astimezone().isoformat(sep=" ", timespec="seconds")
