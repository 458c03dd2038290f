"""What all verbs share: their common options, how errors are told, and how the command ends."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import Parameter, Signature, signature
from types import FrameType
from typing import Annotated, Any, Concatenate, NoReturn, ParamSpec, TextIO

import typer

from db.config import Settings, redacted

from .exit_codes import ExitCode, as_error_of_ours, exit_code_of
from .output import Output, OutputClosed, OutputFailed, log_to_stderr

P = ParamSpec("P")

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="PostgreSQL to work on. Default: VECTORKEEP_DATABASE_URL, else POSTGRES_HOST and its like, "
        "else the embedded server. Prefer the environment for a URL with a password: others see command lines.",
        show_default=False,
    ),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Redis or Valkey for cached searches, 'none' for no cache. Default: VECTORKEEP_REDIS_URL.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no messages, only errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say on stderr what is done.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show where an error came from, and log all steps. Also: VECTORKEEP_DEBUG=1."),
]


@dataclass(frozen=True)
class Common:
    """The options of every command."""

    # URLs hold passwords: no repr shows them.
    database_url: DatabaseUrl = field(default=None, repr=False)
    redis_url: RedisUrl = field(default=None, repr=False)
    json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False
    debug: Debug = False


@dataclass(frozen=True)
class Cli:
    """What a verb works with."""

    options: Common
    output: Output


def command(verb: Callable[Concatenate[Cli, P], ExitCode | None]) -> Callable[..., None]:
    """A command of `verb(cli, ...)`: the common options added, its errors told and turned into exit codes."""
    common = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in signature(Common, eval_str=True).parameters.values()]
    own = list(signature(verb, eval_str=True).parameters.values())[1:]

    def run(**given: Any) -> None:
        options = Common(**{p.name: given.pop(p.name) for p in common})
        raise typer.Exit(_run(options, lambda cli: verb(cli, **given)))  # type: ignore[call-arg]

    parameters = [*(p.replace(kind=Parameter.KEYWORD_ONLY) for p in own), *common]
    run.__doc__, run.__name__ = verb.__doc__, verb.__name__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run


def need_terminal() -> None:
    """Raise BadParameter where nobody can be asked."""
    if not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask on; give --yes", param_hint="--yes")


def _run(options: Common, work: Callable[[Cli], ExitCode | None]) -> ExitCode:
    _have_all_streams()
    debug = options.debug or os.environ.get("VECTORKEEP_DEBUG", "").lower() in ("1", "true", "yes", "on")
    log_to_stderr(_level(options, debug))
    _be_forgiving_about_encodings()
    signal.signal(signal.SIGTERM, _end_in_order)
    output = Output(json=options.json, quiet=options.quiet)
    try:
        return work(Cli(options, output)) or ExitCode.OK
    except OutputClosed:
        return _close_stdout(ExitCode.BROKEN_PIPE)
    except OutputFailed as exc:
        output.complain(str(exc))
        return _close_stdout(ExitCode.PARTIAL)
    except KeyboardInterrupt:
        output.complain("interrupted")
        return _fail(output, "Interrupted", "interrupted", ExitCode.INTERRUPTED)
    except SystemExit as exc:
        if exc.code == ExitCode.TERMINATED:
            _fail(output, "Terminated", "ended by SIGTERM", ExitCode.TERMINATED)
        raise
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise  # typer tells these
    except Exception as exc:  # noqa: BLE001  (the outermost place: told, never swallowed)
        if debug:
            traceback.print_exc()
        return _tell(exc, options, output)
    finally:
        _let_go_of_stderr()


def _tell(exc: Exception, options: Common, output: Output) -> ExitCode:
    """Say what went wrong: a line on stderr, and with --json the document on stdout."""
    error = as_error_of_ours(exc)
    if error is not None:
        code, message, kind = exit_code_of(error), str(error), type(error).__name__
        if code == ExitCode.UNAVAILABLE:
            [place, *_] = getattr(error, "__notes__", None) or [_location(options)]
            message += f"; tried {place}, see --database-url"
    else:
        code, kind = ExitCode.DEFECT, type(exc).__name__
        message = f"defect: {kind}: {exc}; please report it with what --debug shows"
    message = " ".join(message.split()).encode(errors="backslashreplace").decode()  # paths may be no UTF-8
    output.complain(message)
    return _fail(output, kind, message, code)


def _fail(output: Output, kind: str, message: str, code: ExitCode) -> ExitCode:
    """Print the document of an error, unless the command has printed one. Returns `code`."""
    try:
        if not output.told:
            output.document({"error": {"kind": kind, "message": message, "exit_code": int(code)}})
    except (OutputClosed, OutputFailed):
        _close_stdout(code)
    return code


def _location(options: Common) -> str:
    """Where the command works, without a password."""
    given = {} if options.database_url is None else {"database_url": options.database_url}
    settings = Settings.load(given)
    url = settings.postgres_url()
    return redacted(url) if url else f"the embedded server in {settings.home}"


def _close_stdout(code: ExitCode) -> ExitCode:
    _discard(sys.stdout)
    return code


def _let_go_of_stderr() -> None:
    """That nobody reads the messages is no failure."""
    try:
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Else the interpreter would complain when it flushes the stream at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _have_all_streams() -> None:
    """A stream that the caller closed is None: what is written goes nowhere then, and nothing is read."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115  (it stays open as long as the process)


def _end_in_order(_number: int, _frame: FrameType | None) -> NoReturn:
    """Let `with` blocks end on SIGTERM, so that embedded servers stop with the last command."""
    raise SystemExit(ExitCode.TERMINATED)


def _level(options: Common, debug: bool) -> int:
    if debug:
        return logging.DEBUG
    if options.verbose:
        return logging.INFO
    return logging.ERROR if options.quiet else logging.WARNING


def _be_forgiving_about_encodings() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
