"""The servers that the tests run against, and a fresh database for each test.

Real ones always. The backend is, in this order: VECTORKEEP_TEST_DATABASE_URL and VECTORKEEP_TEST_REDIS_URL;
containers, where a Docker engine answers; the embedded servers. Containers come in two versions of
PostgreSQL: tests marked `every_server` run on both, the others on the newer one, and
VECTORKEEP_TEST_POSTGRES=18,16 runs all of them on both.
"""

import importlib.metadata
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psycopg
import pytest
import redis
from psycopg import sql

from tests.servers import (
    Containers,
    Embedded,
    Given,
    Servers,
    database_at,
    docker_answers,
    make_servers,
    with_redis_database,
)

SHARED_MEMORY = Path("/dev/shm")
ROOM = 4 * 1024**3
# A loaded machine is no stopped server: for tests that are about answers, not about time.
PATIENT = {
    "VECTORKEEP_CONNECT_TIMEOUT_S": "30",
    "VECTORKEEP_REDIS_CONNECT_TIMEOUT_MS": "10000",
    "VECTORKEEP_REDIS_TIMEOUT_MS": "10000",
}
# A slow example is no failure either, and each run tries the same ones: `make fuzz` looks for others.
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")

SERVERS = pytest.StashKey[Servers]()
STARTING = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_server: runs on each version of PostgreSQL that there is")
    # pytest-alembic 0.13 fails to collect its tests under pytest 9.2 where it looks for them by itself;
    # tests/migration imports them, so nothing is to be looked for.
    config.option.pytest_alembic_tests_path = "none"
    worker = getattr(config, "workerinput", None)
    if worker is None:
        docker = docker_answers()
        in_memory = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > ROOM
        root = Path(tempfile.mkdtemp(prefix="vk-", dir=SHARED_MEMORY if in_memory else None))
        root.chmod(0o711)  # as root the embedded servers run as a user that has to pass through
    else:  # the controller has decided
        docker_answers()
        docker, root = worker["docker"], Path(worker["servers_root"])
    config.stash[SERVERS] = make_servers(root, docker=docker)
    # Begun in the background of a script, a process ignores Ctrl-C, and so would the commands that the tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A developer's own settings must not reach the tests.
    for name in [name for name in os.environ if name.startswith("VECTORKEEP_")]:
        if not name.startswith("VECTORKEEP_TEST_"):
            del os.environ[name]
    os.environ.update(PATIENT)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    servers = node.config.stash[SERVERS]
    others = servers.others if isinstance(servers, Given) else servers
    node.workerinput["servers_root"] = str(servers.root)
    node.workerinput["docker"] = isinstance(others, Containers)


def pytest_report_header(config: pytest.Config) -> str:
    servers = config.stash[SERVERS]
    versions = ", ".join(f"pg{version}" for version in servers.versions if version)
    names = {
        "containers": f"containers (testcontainers {importlib.metadata.version('testcontainers')}; {versions})",
        "embedded": "the embedded servers",
        "given": "the servers of VECTORKEEP_TEST_DATABASE_URL and VECTORKEEP_TEST_REDIS_URL",
    }
    return f"servers: {names[servers.kind]}"


@pytest.hookimpl(trylast=True)  # after the shuffling
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The first start of an image takes up to a minute: meanwhile come the tests that need no server.

    They are started by a process of its own: a test may watch the threads of this one, or replace `time.sleep`.
    """
    items.sort(key=_needs_servers)
    servers, first = config.stash[SERVERS], os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if isinstance(servers, Containers) and first and any(map(_needs_servers, items)) and not config.option.collectonly:
        # Where it fails, the first test that needs a server tries again, and says why.
        command = [sys.executable, "-m", "tests.servers", str(servers.root)]
        config.stash[STARTING] = subprocess.Popen(command, cwd=config.rootpath, stderr=subprocess.DEVNULL)


def _needs_servers(item: pytest.Item) -> bool:
    return "servers" in getattr(item, "fixturenames", ())


def pytest_unconfigure(config: pytest.Config) -> None:
    servers = config.stash.get(SERVERS, None)
    if servers is None:
        return
    if (starting := config.stash.get(STARTING, None)) is not None:
        starting.wait()  # what it starts is stopped below
    if hasattr(config, "workerinput"):
        if isinstance(servers, Embedded):
            servers.stop()  # this worker's own use
        return
    servers.stop()
    shutil.rmtree(servers.root, ignore_errors=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "postgres_version" not in metafunc.fixturenames:
        return
    available = metafunc.config.stash[SERVERS].versions
    wanted = os.environ.get("VECTORKEEP_TEST_POSTGRES", "")
    versions = [version for version in available if version in wanted.split(",")] or list(available[:1])
    if metafunc.definition.get_closest_marker("every_server") and not wanted:
        versions = list(available)
    if versions != [""]:
        ids = [f"pg{version}" for version in versions]
        metafunc.parametrize("postgres_version", versions, ids=ids, indirect=True, scope="session")


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Servers:
    return request.config.stash[SERVERS]


@pytest.fixture(scope="session")
def postgres_version(request: pytest.FixtureRequest) -> str:
    """The version of PostgreSQL under test, "" where the backend has only one."""
    return getattr(request, "param", "")


@pytest.fixture(scope="session")
def postgres_url(servers: Servers, postgres_version: str) -> str:
    """The server under test, as a role that may create databases."""
    return servers.postgres_url(postgres_version)


MakeDatabase = Callable[[str | None], str]
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def admin_session(postgres_url: str) -> Iterator[psycopg.Connection[Any]]:
    """One connection for all databases that are made and dropped: thousands of them would take a minute."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def make_database(postgres_url: str, admin_session: psycopg.Connection[Any]) -> Iterator[MakeDatabase]:
    """Make a database, empty or a copy of the given one, dropped after the test. Returns its URL."""
    made: list[str] = []

    def make(template: str | None = None) -> str:
        name = f"vk_{os.getpid()}_{next(_numbers)}"
        admin_session.execute(  # half the time of writing each block of it to the log of changes
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(
                sql.Identifier(name), sql.Identifier(template or "template1")
            )
        )
        made.append(name)
        return database_at(postgres_url, name)

    yield make
    for name in made:
        admin_session.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def database_url(make_database: MakeDatabase, servers: Servers, postgres_version: str) -> str:
    """A database of this test's own, its schema at head."""
    return make_database(servers.template(postgres_version))


@pytest.fixture
def empty_database_url(make_database: MakeDatabase) -> str:
    """A database of this test's own, without a schema."""
    return make_database(None)


@pytest.fixture
def redis_url(servers: Servers, worker_number: int) -> str:
    """A Redis database of this worker's own, empty."""
    url = with_redis_database(servers.redis_url(), worker_number)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture(scope="session")
def worker_number() -> int:
    """0 without xdist, else 0 for gw0, 1 for gw1 and so on."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


@pytest.fixture
def store(database_url: str, redis_url: str) -> Iterator[Any]:
    """An open store of a model with 8 dimensions."""
    import db

    with db.connect(database_url, redis_url, model_id="test-model", dimensions=8) as opened:
        yield opened


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are about time: the timeouts that users have."""
    for name in PATIENT:
        monkeypatch.delenv(name)


@pytest.fixture
def until() -> Callable[..., None]:
    """`until(condition)` polls until it is true, and fails the test where it never is."""

    def wait(condition: Callable[[], Any], *, within_s: float = 30) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, "this never came true"
            time.sleep(0.02)

    return wait
