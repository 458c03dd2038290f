"""What tests of a store look at it with: a connection of their own, and a way to wait without guessing."""

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

import db
from tests.integration.counting import Counting

Rows = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def admin(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection in autocommit that is not the store's."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def sql(admin: psycopg.Connection[Any]) -> Rows:
    """`sql(statement, *values)` runs a statement beside the store and returns its rows."""

    def run(statement: str, *values: Any) -> list[tuple[Any, ...]]:
        cursor = admin.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []

    return run


@pytest.fixture
def url_as(database_url: str) -> Callable[[str, str], str]:
    """`url_as(role, password)` is the test's database as that role, over the network or a socket."""

    def url(role: str, password: str) -> str:
        parts = urlsplit(database_url)
        return parts._replace(netloc=f"{role}:{password}@{parts.netloc.rpartition('@')[2]}").geturl()

    return url


@pytest.fixture
def embedder():
    return Counting()


@pytest.fixture
def embedding_store(database_url, redis_url, embedder):
    with db.connect(database_url, redis_url, embedder=embedder) as store:
        yield store
