"""`vectorkeep reset`."""

from functools import partial
from typing import Annotated

import typer

from db import reset as library
from db.config import Settings

from .command import Cli, need_terminal
from .doctor import settings_of
from .exit_codes import ExitCode


def reset(
    cli: Cli,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for the database's name.")] = False,
    force: Annotated[bool, typer.Option("--force", help="End the other sessions that use the store.")] = False,
) -> ExitCode | None:
    """Delete everything that is stored, and begin anew.

    Names what will go, with counts, and asks for the database's name to be typed; without a terminal to ask on, --yes
    is needed. Drops the tables that the migrations made and no others, and migrates again; embedded servers are
    stopped, and their folder and logs deleted. Refuses while other sessions have the store open or use its tables,
    unless forced.
    """
    if not yes:
        need_terminal()
    settings = Settings.load(settings_of(cli.options))
    plan = library.plan_reset(settings, force=force)
    _announce(cli, plan, asking=not yes)
    if not yes and cli.output.ask(f"Type {plan.database} to delete all of it:") != plan.database:
        cli.output.complain("that is not the database's name; nothing was deleted")
        return ExitCode.PARTIAL
    result = library.reset(settings, force=force)
    cli.output.document(result)
    cli.output.fields(
        {
            "database": result.database,
            "rows_deleted": sum(result.rows.values()),
            "sessions_ended": result.sessions_ended,
            "cached_keys_removed": result.cached_keys_removed,
            "revision": result.revision or "none",
        }
    )
    for sentence in result.details:
        cli.output.say(sentence)
    return None


def _announce(cli: Cli, plan: library.ResetPlan, *, asking: bool) -> None:
    """What will go, on stderr: it is there before the answer is, and with --quiet where one is asked for."""
    say = partial(cli.output.say, always=asking)
    say(f"This deletes from the database {plan.database} ({plan.location}), for good:")
    for table, rows in plan.rows.items():
        say(f"  {table}: {rows} rows")
    if plan.columns:
        say(f"  columns that vectorkeep did not make: {', '.join(plan.columns)}")
    if plan.sessions:
        say(f"  and ends {', '.join(plan.sessions)}")
    if plan.folder is not None:
        say(f"  the folder {plan.folder}, with all of it, and the logs beside it")
