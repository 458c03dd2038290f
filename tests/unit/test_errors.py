"""Drivers' errors become ours in one place, and only transient ones are tried again."""

import psycopg
import psycopg_pool
import pytest
import sqlalchemy.exc
from psycopg import errors as pg

import db
from db.errors import (
    BusyError,
    ClosedError,
    PermissionDeniedError,
    SchemaError,
    UnavailableError,
    ValidationError,
    VectorKeepError,
    from_driver,
    is_transient,
    translated,
)

OURS = [
    (pg.InsufficientPrivilege("permission denied for table x"), PermissionDeniedError, "grant the role"),
    (pg.UndefinedTable("no embeddings"), SchemaError, "vectorkeep migrate"),
    (pg.UndefinedColumn("no column"), SchemaError, "vectorkeep migrate"),
    (pg.QueryCanceled("statement timeout"), UnavailableError, "raise statement_timeout_s"),
    (pg.LockNotAvailable("lock timeout"), BusyError, "try again"),
    (psycopg_pool.PoolTimeout("30 s"), UnavailableError, "no database connection became free"),
    (psycopg_pool.TooManyRequests("queue"), UnavailableError, "no database connection became free"),
    (psycopg_pool.PoolClosed("closed"), ClosedError, "closed"),
    (psycopg.OperationalError("lost"), UnavailableError, "cannot serve"),
    (pg.AdminShutdown("bye"), UnavailableError, "cannot serve"),
    (pg.DiskFull("no space"), UnavailableError, "cannot serve"),
    (pg.ReadOnlySqlTransaction("standby"), UnavailableError, "cannot serve"),
    (pg.InternalError_("could not write to log file"), UnavailableError, "vectorkeep doctor"),
    (pg.DataCorrupted("invalid page"), UnavailableError, "vectorkeep doctor"),
    (pg.DeadlockDetected("deadlock"), UnavailableError, "cannot serve"),
    (pg.UniqueViolation("twice"), ValidationError, "the database refuses this"),
    (pg.ExclusionViolation("overlap"), ValidationError, "or change that constraint"),
    (pg.RaiseException("not today"), ValidationError, "or change that constraint or trigger"),
    (pg.AssertFailure("never"), ValidationError, "the database refuses this"),
]


@pytest.mark.parametrize(("error", "ours", "remedy"), OURS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("wrapped", [False, True], ids=["psycopg", "sqlalchemy"])
def test_a_drivers_error_is_raised_as_ours_with_its_cause(error, ours, remedy, wrapped):
    raised = sqlalchemy.exc.DBAPIError("SELECT", {}, error) if wrapped else error
    with pytest.raises(ours, match=remedy) as caught, translated():
        raise raised
    assert caught.value.__cause__ is raised
    assert str(error) in str(caught.value) or ours is ClosedError


@pytest.mark.parametrize("error", [pg.SyntaxError("x"), pg.DivisionByZero("x"), ValueError("x")])
def test_an_error_that_means_a_defect_stays_what_it_is(error):
    assert from_driver(error) is None
    with pytest.raises(type(error)), translated():
        raise error


def test_our_own_errors_pass_through():
    error = SchemaError("old")
    with pytest.raises(SchemaError) as caught, translated():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        pg.SerializationFailure(), pg.DeadlockDetected(), pg.AdminShutdown(), pg.CrashShutdown(), pg.CannotConnectNow(),
        pg.ConnectionFailure(), pg.TooManyConnections(), pg.IdleInTransactionSessionTimeout(),
        psycopg.OperationalError("server closed the connection unexpectedly"),
        sqlalchemy.exc.OperationalError("SELECT", {}, pg.DeadlockDetected()),
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_what_another_try_may_mend_is_transient(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        pg.QueryCanceled(), pg.LockNotAvailable(), pg.UniqueViolation(), pg.InsufficientPrivilege(), pg.DiskFull(),
        psycopg_pool.PoolTimeout(), psycopg_pool.PoolClosed(), psycopg.InterfaceError(), ValueError(),
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_what_another_try_cannot_mend_is_not_transient(error):
    assert not is_transient(error)


def test_every_public_error_has_one_base_and_tells_what_it_is():
    public = [getattr(db, name) for name in db.__all__]
    errors = [value for value in public if isinstance(value, type) and issubclass(value, BaseException)]
    assert len(errors) == 11
    assert all(issubclass(error, VectorKeepError) and error.__doc__ for error in errors)


def test_a_validation_error_is_a_value_error():
    assert issubclass(ValidationError, ValueError)
    assert issubclass(db.DimensionError, ValidationError)
