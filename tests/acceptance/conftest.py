"""The command as a person or a cron job starts it: a process of its own, its output in pipes."""

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql

from tests.conftest import PATIENT

ROOT = Path(__file__).parents[2]
FORK_SERVER = Path(__file__).with_name("fork_server.py")


@dataclass
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout; anything beside it is an error."""
        return json.loads(self.out)

    @property
    def fields(self) -> dict[str, str]:
        return dict(line.split(": ", 1) for line in self.out.splitlines())

    @property
    def rows(self) -> list[list[str]]:
        return [line.split("\t") for line in self.out.splitlines()]


Run = Callable[..., Ran]


def environment(**settings: str) -> dict[str, str]:
    """This process's environment without its vectorkeep and PostgreSQL settings, with `settings`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VECTORKEEP_", "POSTGRES_", "PG"))}
    return kept | {"FORCE_COLOR": "1", "PYTHONUNBUFFERED": ""} | PATIENT | settings


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ops", *map(str, arguments)]


@functools.cache
def fork_server() -> str:
    """The socket of this worker's fork server."""
    folder = Path(tempfile.mkdtemp(prefix="vk-fork-"))
    path = folder / "socket"
    arguments = [sys.executable, "-m", "tests.acceptance.fork_server", str(path)]
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, start_new_session=True)

    def stop() -> None:
        os.killpg(process.pid, signal.SIGKILL)  # commands that no test waited for, too
        process.wait()
        shutil.rmtree(folder)

    atexit.register(stop)
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the fork server ended before it was ready"
        assert time.monotonic() < deadline, "the fork server never became ready"
        time.sleep(0.02)
    return str(path)


def forked(*arguments: str) -> list[str]:
    """As `command`, without its start-up time of about a second. What is about signals and start-up needs `command`."""
    return [sys.executable, "-IS", str(FORK_SERVER), fork_server(), *map(str, arguments)]


def run_command(*arguments: str, env: dict[str, str], stdin: str | bytes = "", timeout_s: float = 120) -> Ran:
    given = stdin.encode() if isinstance(stdin, str) else stdin
    ended = subprocess.run(
        forked(*arguments), cwd=ROOT, env=env, input=given, capture_output=True, timeout=timeout_s, check=False
    )
    ran = Ran(ended.returncode, ended.stdout.decode(), ended.stderr.decode())
    assert "Traceback" not in ran.err
    assert "\x1b" not in ran.out + ran.err, "escape codes in a pipe"
    return ran


@pytest.fixture
def env(database_url: str, redis_url: str, tmp_path: Path) -> dict[str, str]:
    """The environment that names this test's database."""
    return environment(
        VECTORKEEP_DATABASE_URL=database_url, VECTORKEEP_REDIS_URL=redis_url, VECTORKEEP_HOME=str(tmp_path / "home")
    )


@pytest.fixture
def vectorkeep(env: dict[str, str]) -> Run:
    """Runs the command on this test's database; fails where it does not end with `code`."""

    def run(*arguments: str, code: int | None = 0, stdin: str | bytes = "") -> Ran:
        ran = run_command(*arguments, env=env, stdin=stdin)
        assert code is None or ran.code == code, f"exit code {ran.code}: {ran.err}{ran.out}"
        return ran

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three documents of different kinds."""
    made = tmp_path / "handbook"
    (made / "animals").mkdir(parents=True)
    (made / "cats.md").write_text("# On cats\n\nCats sleep sixteen hours a day.\n")
    (made / "animals" / "owls.html").write_text(
        "<html><head><title>On owls</title><style>p {}</style></head>"
        "<body><p>Owls hunt at night, when it is dark.</p><script>var hidden</script></body></html>"
    )
    (made / "ships.txt").write_text("Ships sail across the ocean with cargo.")
    return made


SCRATCH = "SELECT count(*) FROM pg_database WHERE datdba = to_regrole(%s) AND datname LIKE 'vectorkeep_benchmark_%%'"


@pytest.fixture
def admin(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def role(admin: psycopg.Connection[Any]) -> Iterator[str]:
    """A superuser of this test's own: the scratch databases of others who test meanwhile are not its."""
    name = f"vk_bench_{os.getpid()}_{token_hex(4)}"
    admin.execute(sql.SQL("CREATE ROLE {} SUPERUSER LOGIN PASSWORD 'topsecret'").format(sql.Identifier(name)))
    yield name
    admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.fixture
def benchmark_env(
    env: dict[str, str], role: str, admin: psycopg.Connection[Any], database_url: str
) -> Iterator[dict[str, str]]:
    """The environment that names this test's database, as its own role. At the end nothing may have stayed."""
    parts = urlsplit(database_url)
    url = parts._replace(netloc=f"{role}:topsecret@{parts.netloc.rpartition('@')[2]}").geturl()
    yield env | {"VECTORKEEP_DATABASE_URL": url}
    assert admin.execute(SCRATCH, (role,)).fetchone() == (0,)
    assert admin.execute("SELECT count(*) FROM embeddings").fetchone() == (0,)
    assert admin.execute("SELECT count(*) FROM embedding_models").fetchone() == (0,)
