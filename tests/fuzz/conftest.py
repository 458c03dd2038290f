"""One store for all fuzz tests, and the report of what was tried on it.

Each input ends in one of two ways: refused with an error of ours that says what to do, or accepted and read back
equal. Anything else is a failure. VECTORKEEP_TEST_FUZZ=40 tries forty times as many (`make fuzz`).
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from psycopg import sql

import db
from tests.integration.counting import Counting
from tests.servers import database_at, execute, with_redis_database

DIMENSIONS = 8
TIMES = int(os.environ.get("VECTORKEEP_TEST_FUZZ", "1"))
_SAYS_WHAT_TO_DO = re.compile(r"expected|; ")
_reported: dict[str, Counter[str]] = {}


def examples(count: int) -> settings:
    """`count` examples of a test, or as many times more as were asked for."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        print_blob=True,
    )


class Report:
    """What became of the inputs of one test."""

    def __init__(self, area: str) -> None:
        self.area = area
        self.counts: Counter[str] = Counter()

    def tried(self, call: Callable[[], Any], *, valid: bool) -> Any:
        """What `call` returns where its input is `valid`; else it must be refused, and None is returned."""
        self.counts["tried"] += 1
        if valid:
            return call()
        try:
            result = call()
        except db.ValidationError as exc:
            return self.refused(str(exc))
        raise AssertionError(f"accepted, and is not valid: {result!r:.200}")

    def refused(self, message: str) -> None:
        assert _SAYS_WHAT_TO_DO.search(message), f"does not say what to do: {message}"
        assert "the database refuses" not in message, f"a constraint had to refuse it: {message}"
        assert len(message) < 1000, f"too long to be read: {message[:1000]}"
        assert "\0" not in message
        message.encode()
        self.counts["rejected"] += 1

    def rows_of(self, totals: Any) -> None:
        """Count what was refused of a run of `ingest`."""
        for _, reason in totals.errors:
            self.refused(f"{reason}; ")

    def accepted(self, count: int = 1) -> None:
        self.counts["accepted"] += count

    def rows(self, result: Any, valid: int, bad: int) -> None:
        """Count the rows of a batch: the bad ones are in `result.errors`, each with a reason."""
        self.counts["tried"] += valid + bad
        assert len(result.errors) == bad
        assert result.failed == bad
        for _, reason in result.errors:
            self.refused(reason)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    made = Report(request.node.path.stem.removeprefix("test_"))
    yield made
    counts = made.counts
    request.node.user_properties.append(("fuzz", {"area": made.area, **counts}))
    if not getattr(request.node, "fuzz_failed", False):
        assert counts["tried"] == counts["rejected"] + counts["accepted"], f"lost count: {counts}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    if outcome.get_result().failed:  # type: ignore[attr-defined]
        item.fuzz_failed = True  # type: ignore[attr-defined]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        for name, counts in report.user_properties:
            if name == "fuzz":
                counts = dict(counts)
                _reported.setdefault(counts.pop("area"), Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _reported:
        return
    terminalreporter.section("fuzzed inputs")
    for area, counts in [*sorted(_reported.items()), ("all", sum(_reported.values(), Counter()))]:
        figures = ", ".join(f"{counts[name]:,} {name}" for name in ("tried", "rejected", "accepted"))
        terminalreporter.write_line(f"{area}: {figures} and read back equal")


@pytest.fixture(scope="session")
def fuzz_databases(servers: Any, postgres_url: str, postgres_version: str) -> Iterator[Callable[[str], str]]:
    """`fuzz_databases(name)` makes a database at head, dropped at the end of the run. Returns its URL."""
    made = []

    def make(name: str) -> str:
        name = f"vk_fuzz_{os.getpid()}_{name}"
        template = servers.template(postgres_version)
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        execute(postgres_url, statement.format(sql.Identifier(name), sql.Identifier(template)))
        made.append(name)
        return database_at(postgres_url, name)

    yield make
    for name in made:
        execute(postgres_url, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def fuzz_url(fuzz_databases: Callable[[str], str]) -> str:
    return fuzz_databases("store")


@pytest.fixture(scope="session")
def fuzz_redis_url(servers: Any, worker_number: int) -> str:
    """Not that of the other tests of this worker, which empty theirs."""
    return with_redis_database(servers.redis_url(), 8 + worker_number)


# A loaded machine is no stopped Redis: what these tests store is large.
SETTINGS = {"maintenance_on_close": False, "redis_timeout_ms": 10_000, "redis_connect_timeout_ms": 10_000}


class Embedder(Counting):
    dimensions = DIMENSIONS

    def embed(self, texts: Any) -> Any:
        return super().embed(texts)[:, :DIMENSIONS]


@pytest.fixture(scope="session")
def session_store(fuzz_url: str, fuzz_redis_url: str) -> Iterator[db.VectorStore]:
    with db.connect(fuzz_url, fuzz_redis_url, embedder=Embedder("fuzz"), **SETTINGS) as opened:
        # The first write registers the model. Before it a store knows no distance, and finds nothing near any query.
        opened.embed_batch([db.Item("first", "text")])
        opened.delete(["first"])
        yield opened


@pytest.fixture(scope="session")
def beside(fuzz_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection that is not the store's."""
    with psycopg.connect(fuzz_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def store(session_store: db.VectorStore, beside: psycopg.Connection[Any]) -> db.VectorStore:
    """The one store of the run, empty."""
    beside.execute("DELETE FROM chunks; DELETE FROM embeddings")
    with session_store.transaction() as connection:
        session_store.record_write(connection, everything=True)
    return session_store
