"""Migrations are tested on every version of PostgreSQL that the backend has."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy

from db.config import Settings
from db.migrate import alembic_config as make_config
from db.migration_session import direct_engine
from tests.servers import psql_program

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_alembic() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """The `alembic` command in the checkout, its database named by the environment."""

    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


@pytest.fixture
def psql() -> str:
    return psql_program()


@pytest.fixture
def alembic_config():
    return make_config()


@pytest.fixture
def alembic_engine(empty_database_url: str) -> Iterator[sqlalchemy.Engine]:
    engine = direct_engine(empty_database_url, Settings())
    yield engine
    engine.dispose()


@pytest.fixture
def empty(empty_database_url: str) -> Iterator["psycopg.Connection"]:
    """A connection in autocommit to the empty database."""
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        yield connection
