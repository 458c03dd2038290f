"""`vectorkeep doctor`."""

from typing import Annotated, Any

import typer

from db import doctor as library
from db.config import Settings

from .command import Cli, Common
from .exit_codes import ExitCode
from .opening import redis_url


def doctor(
    cli: Cli,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is safe to mend while everybody works.")] = False,
) -> ExitCode | None:
    """Examine the store, its servers and its cache.

    Each check says ok, warn or fail, what it saw, and what to run. It works where no store can be opened, too.
    --fix never touches documents and chunks, and stops nobody. The exit code is 1 where a check fails.
    """
    with cli.output.steps() as on_check:
        findings = library.examine(Settings.load(settings_of(cli.options)), fix=fix, on_check=on_check)
    cli.output.document(findings)
    cli.output.rows(
        ("check", "status", "evidence", "remedy"),
        [(found.check, "fixed" if found.fixed else found.status, found.evidence, found.remedy) for found in findings],
    )
    counts = {status: sum(found.status == status for found in findings) for status in ("ok", "warn", "fail")}
    cli.output.say(", ".join(f"{count} {status}" for status, count in counts.items()))
    return ExitCode.PARTIAL if counts["fail"] else None


def settings_of(options: Common) -> dict[str, Any]:
    """The settings that the command line gives, for verbs that work where no store can be opened."""
    given = {"database_url": options.database_url, "redis_url": redis_url(options)}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.database_url is not None:
        settings["maintenance_url"] = None  # the environment's may be one to another database
    return settings
