"""`vectorkeep rebuild`."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import db
from db.config import Settings
from db.embedder import configured_embedder, embedder_by_name
from db.rebuild import rebuild as rebuild_store
from db.rebuild_forecast import forecast, forecast_rollback
from db.rebuild_plan import RebuildPlan
from db.rollback import roll_back

from .command import Cli
from .opening import redis_url
from .reading import Reader, displayable


def rebuild(
    cli: Cli,
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="SOURCE", help="Folders to ingest again. Default: none, all from the store."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(show_default=False, help="The source that the one folder is. Default: its path.")
    ] = None,
    workspace: Annotated[str | None, typer.Option(show_default=False, help="The workspace of the folders.")] = None,
    from_store: Annotated[
        bool, typer.Option("--from-store", help="All from the stored texts; what happens without a folder, too.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="Embed all texts by this model: wordllama or openai."),
    ] = None,
    min_overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Share of nearest neighbours that a new model must agree on.")
    ] = 0,
    min_recall: Annotated[
        float | None,
        typer.Option(min=0, max=1, show_default="hardly less than before", help="What the new indexes must find."),
    ] = None,
    swap_wait_s: Annotated[
        float, typer.Option("--swap-wait-s", min=0, help="Seconds to wait for the tables at the end.")
    ] = 60,
    rollback: Annotated[bool, typer.Option("--rollback", help="Bring back the tables of before.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --rollback: lose what was written since.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
) -> None:
    """Make the tables again and swap them in, without downtime.

    Ingestion is paused meanwhile; searches go on, in the old tables until the new ones take their place at once.
    Each folder is read again and becomes the source that 'ingest' makes of it; what is not in it any more is gone.
    All other rows are copied as they are. No text that the store or the vector cache has a vector of is embedded.

    With --model all texts are embedded anew, and the store moves to that model; programs must open it again.

    The old tables are kept until 'maintain' retires them; --rollback brings them back.
    """
    folders = _folders(sources or [], source)
    _check_options(folders, model, from_store=from_store, rollback=rollback, force=force)
    settings = _settings(cli)
    with _steps(cli) as on_progress:
        if rollback and dry_run:
            result: Any = forecast_rollback(settings)
        elif rollback:
            result = roll_back(settings, force=force, swap_wait_s=swap_wait_s, on_progress=on_progress)
        else:
            embedder = embedder_by_name(model) if model else configured_embedder() if folders else None
            plan = RebuildPlan(
                sources={name: partial(_items, path, name, workspace) for name, path in folders.items()},
                new_model=model is not None,
                min_overlap=min_overlap,
                min_recall=min_recall,
                swap_wait_s=swap_wait_s,
                on_progress=on_progress,
            )
            result = forecast(settings, plan, embedder) if dry_run else rebuild_store(settings, plan, embedder)
    _print(cli, result)


def _check_options(
    folders: Mapping[str, Path], model: str | None, *, from_store: bool, rollback: bool, force: bool
) -> None:
    """Raise BadParameter for options that contradict each other."""
    if from_store and folders:
        raise typer.BadParameter("takes no folders", param_hint="--from-store")
    if rollback and (folders or model):
        raise typer.BadParameter("takes no folders and no --model", param_hint="--rollback")
    if force and not rollback:
        raise typer.BadParameter("needs --rollback", param_hint="--force")


def _folders(paths: list[Path], source: str | None) -> dict[str, Path]:
    """The folders by the source that each is, as `ingest` names it."""
    for path in paths:
        if not path.is_dir():
            why = "does not exist" if not path.exists() else "is no folder, only a part of one's source"
            raise typer.BadParameter(f"{displayable(path)} {why}", param_hint="SOURCE")
    if source is not None and len(paths) != 1:
        raise typer.BadParameter("needs exactly one folder", param_hint="--source")
    return {source or displayable(path.resolve()): path for path in paths}


def _items(path: Path, source: str, workspace: str | None) -> Iterator[db.Item]:
    """All of a folder. Raises ValidationError at its end where a file could not be read: it would be gone."""
    reader = Reader(source, workspace)
    yield from reader.texts([path])
    if reader.failed:
        failed = "; ".join(f"{name}: {reason}" for name, reason in reader.failed[:5])
        raise db.ValidationError(f"{len(reader.failed)} files of {source!r} cannot be read: {failed}")


def _settings(cli: Cli) -> Settings:
    given: dict[str, Any] = {"redis_url": redis_url(cli.options)}
    if cli.options.database_url is not None:
        given |= {"database_url": cli.options.database_url, "maintenance_url": None}
    return Settings.load({name: value for name, value in given.items() if value is not None or name != "redis_url"})


@contextmanager
def _steps(cli: Cli) -> Iterator[Callable[[str, str | None], None]]:
    """A line that changes on a terminal, else a line on stderr for each step."""
    told: list[str] = []
    with cli.output.steps() as on_terminal:

        def on_progress(step: str, details: str | None) -> None:
            on_terminal(step, details)
            if not sys.stderr.isatty() and step not in told:
                told.append(step)
                cli.output.say(f"{step}: {details}" if details else step)

        yield on_progress


def _print(cli: Cli, result: Any) -> None:
    cli.output.document(result)
    fields: dict[str, Any] = {}
    for name, value in asdict(result).items():
        if isinstance(value, Mapping):
            fields |= {f"{name}.{key}": part for key, part in value.items()}
        elif name != "details":
            fields[name] = value
    cli.output.fields(fields)
    for sentence in getattr(result, "details", ()):
        cli.output.say(sentence)
