"""A run under load: a scratch database filled, processes let loose on it, looked at, and everything taken away."""

from collections.abc import Callable
from typing import Any

from psycopg import Connection

from ..scratch import Scratch
from .material import Material
from .plan import LoadPlan
from .process import open_store
from .report import LoadReport
from .samples import watch
from .workers import collect, started

_SERVER_CONNECTIONS = """
    SELECT sum(CASE name WHEN 'max_connections' THEN setting::int ELSE -setting::int END) FROM pg_settings
    WHERE name IN ('max_connections', 'superuser_reserved_connections', 'reserved_connections')
"""


def run_under_load(scratch: Scratch, plan: LoadPlan, say: Callable[[str], None]) -> LoadReport:
    """Let `plan` run in a scratch database, with autovacuum and a live vector index, as a store in use has them.

    Raises UnavailableError where a process cannot begin. However it ends, database and processes are gone then.
    """
    vectors = plan.vectors()
    with scratch.database(vectors, autovacuum=True) as database:
        say(f"filling a scratch database with {plan.rows:,} documents")
        material = Material(vectors)
        with open_store(database.url, plan, material) as store:
            store.batch_upsert(material.shared_documents(plan.rows))
        database.settle()
        say(f"opening a store in each of {plan.processes} processes")
        with started(database.url, plan) as workers:
            say(f"{plan.processes} × ({plan.writers} writers, {plan.readers} readers) for {plan.seconds:g} s")
            for worker in workers:
                worker.go()
            samples = watch(plan, workers, database.connection, say)
            results, deaths = collect(workers)
        described = f"{vectors.dimensions} dimensions: {vectors.described}"
        return LoadReport(plan, described, results, deaths, samples, _server_connections(database.connection))


def _server_connections(connection: Connection[Any]) -> int:
    """How many sessions of ordinary roles the server takes."""
    [(count,)] = connection.execute(_SERVER_CONNECTIONS).fetchall()
    return int(count)
