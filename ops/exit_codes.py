"""Exit codes that scripts can use. This is the one table; `vectorkeep --help` prints it."""

from enum import IntEnum

import db
from db.errors import from_driver


class ExitCode(IntEnum):
    """How a command ended. Each member's `meaning` is what the help says."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> "ExitCode":
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "done"
    PARTIAL = 1, "finished, but something failed on the way (documents, files, steps), or you said no"
    USAGE = 2, "the command line is wrong"
    UNAVAILABLE = 3, "the database cannot be reached, or cannot serve now"
    SCHEMA = 4, "the schema or the model is another one than expected; see 'vectorkeep migrate'"
    PERMISSION = 5, "the database role may not do this"
    INVALID = 6, "an input or a setting is not acceptable"
    BUSY = 7, "another process holds what this needs, or ingestion is paused; try again later"
    DEFECT = 70, "a defect of vectorkeep; --debug shows where"
    INTERRUPTED = 130, "interrupted with Ctrl-C"
    BROKEN_PIPE = 141, "the reader of the output went away"
    TERMINATED = 143, "ended by SIGTERM"


def as_error_of_ours(exc: Exception) -> db.VectorKeepError | None:
    """`exc` as the error to show, or None where it is a defect."""
    return exc if isinstance(exc, db.VectorKeepError) else from_driver(exc)


def exit_code_of(error: db.VectorKeepError) -> ExitCode:
    match error:
        case db.UnavailableError() | db.MeasurementError():
            return ExitCode.UNAVAILABLE
        case db.SchemaError():
            return ExitCode.SCHEMA
        case db.PermissionDeniedError():
            return ExitCode.PERMISSION
        case db.ValidationError():
            return ExitCode.INVALID
        case db.BusyError() | db.PausedError():
            return ExitCode.BUSY
        case db.MaintenanceIncomplete():
            return ExitCode.PARTIAL
    return ExitCode.DEFECT


def table() -> str:
    """The exit codes, a line each."""
    return "\n".join(f"{code.value:>5}  {code.meaning}" for code in ExitCode)
