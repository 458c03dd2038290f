"""What a check is, and what it works with."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

import redis
from psycopg import Connection

from .. import embedded, migrate, redis_client, registry
from ..config import Settings
from ..embedding_model import Model
from ..engine import Database
from ..errors import UnavailableError, ValidationError
from ..query_cache import QueryCache
from ..types import FindingStatus

# A check must end, also on a large table and behind another session's lock.
_LOOK_AT_MOST_S = 20
_WAIT_AT_MOST_S = 2
_REDIS_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Past these a check speaks up. Seconds, days and bytes as the names say."""

    idle_transaction_s: float = 600
    blocked_s: float = 10
    long_transaction_s: float = 3600
    prepared_transaction_s: float = 600
    idle_lock_s: float = 3600
    undelivered_s: float = 30
    maintenance_days: float = 7
    slot_bytes: int = 1024**3
    disk_free_bytes: int = 1024**3
    disk_free_share: float = 0.1
    connections_share: float = 0.9
    dead_rows: int = 1000
    dead_share: float = 0.5


class Needs(IntEnum):
    """What must be there before a check can look."""

    NOTHING = 0
    SERVER = 1
    SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Found:
    """What a check saw. `mend` does what is safe, and returns in words what it did.

    `subject` tells what it is about, so that a second look can tell whether it is still so.
    """

    status: FindingStatus
    evidence: str
    remedy: str = ""
    subject: str = ""
    mend: Callable[[], str] | None = None


def ok(evidence: str) -> Found:
    return Found("ok", evidence)


def warn(evidence: str, remedy: str, *, subject: str = "", mend: Callable[[], str] | None = None) -> Found:
    return Found("warn", evidence, remedy, subject, mend)


def fail(evidence: str, remedy: str, *, subject: str = "", mend: Callable[[], str] | None = None) -> Found:
    return Found("fail", evidence, remedy, subject, mend)


Look = Callable[["Examination"], Iterable[Found]]


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name, what it looks at, what `--fix` does about it, and the evidence where all is well."""

    name: str
    needs: Needs
    about: str
    fix: str
    fine: str
    look: Look


def check(name: str, needs: Needs, about: str, *, fix: str = "", fine: str = "") -> Callable[[Look], Check]:
    """Make a function that yields what it found a check. Where it yields nothing, `fine` is the evidence."""
    return lambda look: Check(name, needs, about, fix, fine, look)


class Examination:
    """One store being looked at, which may be one that cannot be opened."""

    def __init__(self, settings: Settings, limits: Limits, database: Database | None = None) -> None:
        self.settings = settings
        self.limits = limits
        self.opened_store = database
        self.trouble = ""  # why the database cannot be looked at
        self.schema_trouble = ""
        self.redis_trouble = ""
        self._database: Database | None = None
        self._redis_url = settings.redis_url or None
        self._connection: Connection[Any] | None = None
        self._redis: redis.Redis | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self) -> None:
        """Start the embedded servers where those are meant. Raises what a store raises that cannot be opened."""
        url = self.settings.postgres_url()
        if url is None:
            servers = embedded.acquire(self.settings.home, settings=self.settings.embedded_settings)
            self._stack.callback(servers.release)
            url = servers.database_url
            if self.settings.redis_url is None:
                self._redis_url = servers.redis_url
        # Of its own, also where a store is open: the store's may be what is exhausted.
        self._database = Database(url, self.settings)
        self._stack.callback(self._database.close)
        self._database.open()
        self.connection.execute("SELECT 1")

    def can(self, needs: Needs) -> bool:
        if needs is Needs.NOTHING:
            return True
        return not self.trouble and (needs is Needs.SERVER or not self.schema_trouble)

    @property
    def database(self) -> Database:
        if self._database is None:
            raise UnavailableError("the database was not opened")
        return self._database

    @property
    def connection(self) -> Connection[Any]:
        """A direct connection to look with. Made anew where the last one was lost."""
        if self._connection is None or self._connection.closed:
            self._connection = self._stack.enter_context(self.database.maintenance())
            self._connection.execute(f"SET statement_timeout = '{_LOOK_AT_MOST_S}s'")
            self._connection.execute(f"SET lock_timeout = '{_WAIT_AT_MOST_S}s'")
        return self._connection

    def rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.connection.execute(statement.encode(), values or None).fetchall()

    def value(self, statement: str, *values: Any) -> Any:
        """The one value that `statement` gives."""
        [(value,)] = self.rows(statement, *values)
        return value

    @contextmanager
    def mending(self) -> Iterator[Connection[Any]]:
        """A connection to mend with: its timeouts off, for index builds and validations."""
        with self.database.maintenance() as connection:
            yield connection

    @property
    def model(self) -> Model | None:
        return registry.active_model(self.connection)

    @property
    def sees_all_sessions(self) -> bool:
        return bool(self.value("SELECT pg_has_role('pg_read_all_stats', 'USAGE')"))

    @property
    def redis(self) -> redis.Redis | None:
        """A client of the cache's server that waits longer than a search would; None where there is no cache."""
        if self._redis is None and self._redis_url is not None and not self.redis_trouble:
            try:
                self._redis = redis_client.connect(
                    self._redis_url, timeout_s=_REDIS_PATIENCE_S, connect_timeout_s=_REDIS_PATIENCE_S
                )
            except ValidationError as exc:
                self.redis_trouble = str(exc)
                return None
            self._stack.callback(self._redis.close)
        return self._redis

    @property
    def cache(self) -> QueryCache | None:
        """The store's cache over that client."""
        return None if self.redis is None else QueryCache(self.database, self.redis, self.settings)

    def look_at_schema(self) -> None:
        """Note whether the schema is one that checks can read. Raises SchemaError where not."""
        self.schema_trouble = "the schema is not at head"
        migrate.require_head(self.connection)
        self.schema_trouble = ""


def age(seconds: float) -> str:
    """`seconds` as a person says it."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1024**2:.0f} MB"
