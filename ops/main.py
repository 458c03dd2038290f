"""The command `vectorkeep`."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from . import exit_codes
from .benchmark import benchmark
from .cleanup import cleanup
from .command import command
from .delete_source import delete_source
from .demo import demo
from .doctor import doctor
from .ingest import ingest
from .maintain import maintain
from .migrate import migrate
from .pause import pause, resume
from .rebuild import rebuild
from .reset import reset
from .search import search
from .stats import stats

_EPILOG = f"\b\nExit codes:\n{exit_codes.table()}"

app = typer.Typer(
    name="vectorkeep",
    help="Keep documents, chunks and their vectors in PostgreSQL: ingest, search, clean, look after.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: it goes through pipes and pagers
    pretty_exceptions_enable=False,  # those show local variables, passwords among them
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"vectorkeep {version('vectorkeep')}")
        except PackageNotFoundError:  # a checkout that is not installed
            typer.echo("vectorkeep (not installed)")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


_VERBS: dict[str, Callable[..., exit_codes.ExitCode | None]] = {
    "migrate": migrate,
    "ingest": ingest,
    "search": search,
    "delete-source": delete_source,
    "cleanup": cleanup,
    "stats": stats,
    "maintain": maintain,
    "pause": pause,
    "resume": resume,
    "doctor": doctor,
    "rebuild": rebuild,
    "reset": reset,
    "demo": demo,
    "benchmark": benchmark,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(command(_verb))
