"""The exceptions of vectorkeep: one tree, and one place where drivers' errors become ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import psycopg_pool
import sqlalchemy.exc
from psycopg import errors as pg


class VectorKeepError(Exception):
    """Base of every error that vectorkeep raises on purpose."""


class ValidationError(VectorKeepError, ValueError):
    """An input is not acceptable, here or to a constraint or trigger of the database.

    The message tells the actual value, the expected one and the remedy.
    """


class DimensionError(ValidationError):
    """A vector has another number of dimensions than the store's model."""


class SchemaError(VectorKeepError):
    """The database's schema is not the one that this library works on."""


class UnavailableError(VectorKeepError):
    """A server cannot be reached, or cannot serve now. Trying again later may succeed."""


class ClosedError(VectorKeepError):
    """The store was closed before this call."""


class PausedError(VectorKeepError):
    """Ingestion is paused by an operator."""


class MeasurementError(VectorKeepError):
    """What was to be measured cannot be: the comparison would not be what it says it is."""


class BusyError(VectorKeepError):
    """Another process holds the lock that this needs. The message says who."""


class PermissionDeniedError(VectorKeepError):
    """The database role may not do this."""


class MaintenanceIncomplete(VectorKeepError):  # noqa: N818  (a published name)
    """The store was closed, but the maintenance that was due has not finished."""


# Another try may succeed without anybody's help: the connection was lost, the server is starting up,
# or two transactions got in each other's way.
TRANSIENT: tuple[type[psycopg.Error], ...] = (
    pg.SerializationFailure,
    pg.DeadlockDetected,
    pg.AdminShutdown,
    pg.CrashShutdown,
    pg.CannotConnectNow,
    pg.TooManyConnections,
    pg.IdleInTransactionSessionTimeout,
)


def is_transient(exc: BaseException) -> bool:
    """Whether a fresh transaction, perhaps on a fresh connection, may succeed where this one failed."""
    exc = _driver_error(exc)
    if isinstance(exc, TRANSIENT):
        return True
    # Class 08 is a connection that failed; libpq reports one lost in mid-statement without an SQLSTATE.
    return isinstance(exc, psycopg.OperationalError) and (
        (exc.sqlstate or "").startswith("08") or (type(exc) is psycopg.OperationalError and exc.sqlstate is None)
    )


def _driver_error(exc: BaseException) -> BaseException:
    if isinstance(exc, sqlalchemy.exc.DBAPIError) and exc.orig is not None:
        return exc.orig
    return exc


def breaks_a_rule(exc: psycopg.Error) -> bool:
    """Whether a constraint refused it, or what a trigger raised."""
    return (exc.sqlstate or "").startswith(("23", "P0"))


def words_of(exc: psycopg.Error) -> str:
    """What the server said, in one line: its message, and the detail where it gave one."""
    primary = exc.diag.message_primary or str(exc).strip()
    return f"{primary} ({exc.diag.message_detail})" if exc.diag.message_detail else primary


def from_driver(exc: BaseException) -> VectorKeepError | None:
    """The error of ours that a driver's error means to a caller, or None where it means a defect."""
    exc = _driver_error(exc)
    text = str(exc).strip()
    match exc:
        case pg.InsufficientPrivilege():
            return PermissionDeniedError(f"{text}; grant the role what it lacks, or use another role")
        case pg.UndefinedTable() | pg.UndefinedColumn() | pg.UndefinedFunction() | pg.UndefinedObject():
            return SchemaError(f"{text}; bring the schema to head with 'vectorkeep migrate'")
        case pg.QueryCanceled():
            return UnavailableError(f"{text}; if its time was over and that is expected, raise statement_timeout_s")
        case pg.LockNotAvailable():
            return BusyError(f"{text}; another session holds the lock, try again when it has finished")
        case psycopg_pool.PoolClosed():
            return ClosedError("the store was closed during this call")
        case psycopg_pool.PoolTimeout() | psycopg_pool.TooManyRequests():
            return UnavailableError(
                f"no database connection became free: {text}; call from fewer threads at once, or raise pool_max or "
                "pool_timeout_s; 'vectorkeep doctor' tells whether the server has connections left"
            )
        case psycopg.Error() if breaks_a_rule(exc):
            return ValidationError(
                f"the database refuses this: {words_of(exc)}; remove what stands in the way, "
                "or change that constraint or trigger"
            )
        case psycopg.OperationalError() | pg.InsufficientResources() | pg.ReadOnlySqlTransaction():
            return UnavailableError(f"the database cannot serve this now: {text}")
        case psycopg.Error() if (exc.sqlstate or "").startswith("XX"):
            return UnavailableError(f"the server failed within itself: {text}; see its log, run 'vectorkeep doctor'")
        case _ if is_transient(exc):
            return UnavailableError(f"the database cannot serve this now: {text}")
    return None


_OF_CALLER = "_vectorkeep_of_caller"


@contextmanager
def translated() -> Iterator[None]:
    """Raise the errors of psycopg, its pool and SQLAlchemy as ours, the cause chained."""
    try:
        yield
    except (psycopg.Error, sqlalchemy.exc.DBAPIError) as exc:
        ours = from_driver(exc)
        if ours is None or hasattr(exc, _OF_CALLER):
            raise
        raise ours from exc


@contextmanager
def of_caller() -> Iterator[None]:
    """Code of the caller's runs inside: what it raises stays as it is, an error of a driver of its own, too."""
    try:
        yield
    except (psycopg.Error, sqlalchemy.exc.DBAPIError) as exc:
        setattr(exc, _OF_CALLER, True)
        raise
