"""`vectorkeep pause` and `vectorkeep resume`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from psycopg import Connection

from db.config import Settings
from db.engine import connect_directly
from db.pause import MAX_TTL_S, Pause, end_pause, pause_for_operator

from .command import Cli
from .opening import target_url


def pause(
    cli: Cli,
    reason: Annotated[str, typer.Argument(metavar="REASON", help="Why, for whoever is kept waiting.")],
    ttl_s: Annotated[
        float, typer.Option("--ttl-s", min=0.1, max=MAX_TTL_S, help="Seconds after which it ends by itself.")
    ] = 3600,
) -> None:
    """Pause ingestion: nobody writes to the store, everybody may search.

    Waits for the writes that are under way. Writers wait or fail, as their setting on_pause says. The pause outlives
    this command: it ends with 'vectorkeep resume' or by itself. Run again, it begins anew.
    """
    with _connection(cli) as connection:
        taken = pause_for_operator(connection, reason, ttl_s=ttl_s)
    cli.output.document({"paused": True, **asdict(taken)})
    cli.output.fields(_fields(taken))


def resume(cli: Cli) -> None:
    """End the pause of ingestion, whoever took it.

    Where nothing is paused it says so, and that is no failure.
    """
    with _connection(cli) as connection:
        ended = end_pause(connection)
    cli.output.document({"resumed": ended is not None, "pause": asdict(ended) if ended else None})
    if ended is None:
        cli.output.say("ingestion was not paused")
    else:
        cli.output.fields(_fields(ended))
        if not ended.in_force:
            cli.output.say("that pause had ended already: its owner is gone, or its time was up")


@contextmanager
def _connection(cli: Cli) -> Iterator[Connection[Any]]:
    with target_url(cli.options) as url, connect_directly(url, Settings(database_url=url)) as connection:
        yield connection


def _fields(pause: Pause) -> dict[str, Any]:
    return {
        "reason": pause.reason,
        "owner": pause.owner,
        "paused_at": pause.paused_at.isoformat(),
        "expires_at": pause.expires_at.isoformat(),
    }
