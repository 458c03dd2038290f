"""What a command prints: results on stdout, everything else on stderr.

Results are tables on a terminal, `key: value` and tab-separated lines in a pipe, one JSON document with
`--json`. A verb says what it has in all three forms; each form ignores what is not for it.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import db

Advance = Callable[[int, int | None], None]

_RULERS = re.compile(r"[=*~^#_`+.-]{4,}")
_NO_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class OutputClosed(Exception):  # noqa: N818  (not an error: the reader has seen enough)
    """Whoever reads stdout went away."""


class OutputFailed(Exception):  # noqa: N818  (told by the command, whatever it was about to do)
    """What stdout is cannot be written to: a full disk, for one."""


class _Messages(Console):
    """The console of stderr: that nobody reads it any more ends no work."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Output:
    """The two streams of one command."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.on_terminal = sys.stdout.isatty()
        # Whatever FORCE_COLOR says: a pipe gets no escape codes.
        self._stdout = Console(file=sys.stdout, force_terminal=self.on_terminal)
        self._stderr = _Messages(file=sys.stderr, force_terminal=sys.stderr.isatty())
        self.told = False  # whether the document was printed

    # -- results ---------------------------------------------------------------------------------------

    def document(self, value: Any) -> None:
        """The whole result, as the one JSON document, in UTF-8 whatever the locale is."""
        if self.json:
            self.told = True
            self._write((to_json(value, indented=self.on_terminal) + "\n").encode())

    def fields(self, fields: Mapping[str, Any]) -> None:
        """Names with one value each."""
        if self.json:
            return
        if not self.on_terminal:
            self._write("".join(f"{name}: {shown(value)}\n" for name, value in fields.items()))
            return
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in fields.items():
            table.add_row(Text(name, style="bold"), Text(shown(value)))
        self._stdout.print(table)

    def rows(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows of equal kind. In a pipe they are tab-separated, without a header."""
        if self.json:
            return
        if not self.on_terminal:
            self._write("".join("\t".join(shown(value) for value in row) + "\n" for row in rows))
            return
        table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            table.add_column(column, no_wrap=number == 0)
        for row in rows:
            table.add_row(*(Text(shown(value)) for value in row))
        self._stdout.print(table)

    def line(self, text: str, style: str = "") -> None:
        """One line of prose that is itself the result."""
        if self.json:
            return
        if self.on_terminal:
            self._stdout.print(Text(text, style=style))
        else:
            self._write(text + "\n")

    def _write(self, text: str | bytes) -> None:
        try:
            if isinstance(text, bytes):
                sys.stdout.buffer.write(text)
            else:
                sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError as exc:
            raise OutputClosed from exc
        except OSError as exc:
            raise OutputFailed(f"cannot write to stdout: {exc.strerror or exc}") from exc

    # -- everything else -------------------------------------------------------------------------------

    def say(self, text: str, *, always: bool = False) -> None:
        """A message for a person; with --quiet only where `always`."""
        if always or not self.quiet:
            self._stderr.print(Text(printable(text)), soft_wrap=True)

    def complain(self, text: str) -> None:
        """What went wrong, on one line; also with --quiet."""
        self._stderr.print(Text(f"vectorkeep: {printable(text)}"), soft_wrap=True)

    def ask(self, question: str) -> str:
        """What a person answers on the terminal; "" at its end. Also with --quiet."""
        self._stderr.print(Text(printable(question)), soft_wrap=True, end=" ")
        return sys.stdin.readline().strip()

    @contextmanager
    def progress(self, what: str, total: int | None = None) -> Iterator[Advance]:
        """A bar while something runs, on a terminal only. Yields `on_progress(processed, total)`."""
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
        visible = self._stderr.is_terminal and not self.quiet
        bar = Progress(*columns, TimeElapsedColumn(), console=self._stderr, transient=True, disable=not visible)
        with bar:
            task = bar.add_task(what, total=total)
            yield lambda done, of: bar.update(task, completed=done, total=total if of is None else of)

    @contextmanager
    def steps(self) -> Iterator[Callable[[str, str | None], None]]:
        """The name of the running step, on a terminal only. Yields `on_progress(step, details)`."""
        visible = self._stderr.is_terminal and not self.quiet
        line = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._stderr,
            transient=True,
            disable=not visible,
        )
        with line:
            task = line.add_task("starting", total=None)
            yield lambda step, details: line.update(task, description=f"{step}: {details}" if details else step)


def to_json(value: Any, *, indented: bool = False) -> str:
    option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | (orjson.OPT_INDENT_2 if indented else 0)
    return orjson.dumps(value, option=option, default=_plain).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def shown(value: Any) -> str:
    """`value` on one line, fit for a terminal and for one field of a tab-separated line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value) or "-"
    return printable(str(value)) or "-"


def printable(text: str) -> str:
    """`text` without control characters: neither a tab nor an escape sequence of a document gets through."""
    return "".join(c if c.isprintable() else " " for c in text)


def excerpt(text: str, length: int = 100) -> str:
    """The beginning of `text` on one line, at most `length` characters, without underlines and rulers."""
    line = " ".join(_RULERS.sub("", printable(text[: 4 * length])).split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


class _EventFormatter(logging.Formatter):
    """`vectorkeep: warning: upsert.finished inserted=3`: the event, then its fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: value for name, value in vars(record).items() if name not in _NO_FIELDS}
        told = " ".join([record.getMessage(), *(f"{name}={value}" for name, value in fields.items())])
        line = f"vectorkeep: {record.levelname.lower()}: {printable(told)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_EventFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("vectorkeep", db.__name__):
        logging.getLogger(name).setLevel(level)
    # The pool tells of each connection that an interrupted command leaves behind.
    logging.getLogger("psycopg.pool").setLevel(level if level == logging.DEBUG else logging.ERROR)
