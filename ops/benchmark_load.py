"""`vectorkeep benchmark --load`: how a store bears many callers at once, for a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from db import embedded
from db.config import Settings, redacted

from .benchmarks.load.plan import LoadPlan
from .benchmarks.load.report import MEMORY_COLUMNS, OPERATION_COLUMNS, LoadReport
from .benchmarks.load.run import run_under_load
from .benchmarks.machine import described, machine
from .benchmarks.scratch import Scratch
from .command import Cli, Common
from .exit_codes import ExitCode
from .opening import redis_url, target_url

_PROCESSES, _WRITERS, _READERS, _SECONDS = 2, 2, 4, 60


def measure_load(
    cli: Cli,
    processes: int | None,
    writers: int | None,
    readers: int | None,
    seconds: int | None,
    rows: int,
    dimensions: int | None,
) -> ExitCode | None:
    """Run a load and print what it came to. Calls that fail stop nothing; they are counted, and told at the end."""
    writers, readers = (_WRITERS if writers is None else writers), (_READERS if readers is None else readers)
    if writers + readers == 0:
        raise typer.BadParameter("nobody would do anything; give at least one writer or reader", param_hint="--readers")
    with _servers(cli.options) as (url, cache):
        plan = LoadPlan(processes or _PROCESSES, writers, readers, seconds or _SECONDS, rows, dimensions, cache)
        scratch = Scratch(url)
        with scratch.server() as connection:
            where = machine(connection)
        report = run_under_load(scratch, plan, cli.output.say)
    _print(cli, report, where)
    return ExitCode.PARTIAL if report.errors() else None


@contextmanager
def _servers(options: Common) -> Iterator[tuple[str, str | None]]:
    """The URLs of the database's server, and of the cache's; None where there is none."""
    given = {} if options.database_url is None else {"database_url": options.database_url}
    cache = redis_url(options)
    settings = Settings.load(given if cache is None else {**given, "redis_url": cache})
    with target_url(options) as url:
        if settings.redis_url is not None or settings.postgres_url() is not None:
            yield url, settings.redis_url or None
            return
        servers = embedded.acquire(settings.home, settings=settings.embedded_settings)
        try:
            yield url, servers.redis_url
        finally:
            servers.release()


def _print(cli: Cli, report: LoadReport, where: dict[str, object]) -> None:
    plan, output = report.plan, cli.output
    cache = redacted(plan.redis_url) if plan.redis_url else None
    given = {
        "processes": plan.processes,
        "writers": plan.writers,
        "readers": plan.readers,
        "seconds": plan.seconds,
        "rows": plan.rows,
        "cache": cache,
    }
    output.document({"machine": where, "vectors": [report.vectors], "load": given, **report.as_json()})
    output.rows(OPERATION_COLUMNS, [_shown(row) for row in report.operations()])
    for error in report.errors():
        output.line(f"{error['count']} × {error['kind']}: {error['example']}")
    output.rows(MEMORY_COLUMNS, [_shown(row) for row in report.processes()])
    pool = ", ".join(f"{name} {value:,}" for name, value in report.pool().items())
    for verdict in report.verdicts():
        output.line(str(verdict))
    output.line(f"pool: {pool}")
    output.line(f"cache: {cache or 'none is configured; see --redis-url'}")
    output.line(described(where))
    output.line(report.vectors)
    output.line(
        f"{plan.processes} processes, each {plan.writers} writers and {plan.readers} readers over one store, "
        f"{report.seconds:.0f} s beside {plan.rows:,} documents"
    )


def _shown(row: dict[str, Any]) -> list[str]:
    """The values of a row of figures, counts in full and the rest with one digit."""
    return [
        f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        for value in row.values()
    ]
