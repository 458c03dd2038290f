"""Scratch databases on the server under test: made with names of their own, dropped whatever happens."""

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

from psycopg import Connection, sql
from psycopg import errors as pg

import db
from db.config import Settings
from db.embedding_model import Model
from db.engine import connect_directly
from db.migrate import upgrade
from db.registry import register_model
from db.vector_index import build_memory_mb

from . import handwritten
from .handwritten import Handwritten
from .rows import Vectors

_STATEMENT_TIMEOUT_S = 600
_SESSIONS_END_WITHIN_S = 30
# A writer's, a reader's and that of the metrics: opened before anything is timed.
_CONNECTIONS = 3

# Nothing vacuums or analyzes in the middle of a measurement, on one side of it only.
_NO_AUTOVACUUM = "ALTER TABLE {} SET (autovacuum_enabled = off, toast.autovacuum_enabled = off)"
_FINGERPRINT = """
    SELECT count(*), sum(hashtextextended(concat_ws('|', id, source_id, workspace, text, text_hash, content_hash,
                         vector_hash, chunks_hash, model_id, metadata, sha256(vector_send(embedding))), 0)::numeric)
    FROM embeddings
"""
_INDEXES = "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'embeddings'::regclass AND indisvalid"
_WRITES = """
    SELECT n_tup_ins, n_tup_upd, n_tup_hot_upd, n_tup_del FROM pg_stat_user_tables WHERE relname = %s
"""
_OTHER_SESSIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


@dataclass(frozen=True)
class Writes:
    """Rows written to a table, as the server counts them."""

    inserted: int
    updated: int
    hot_updated: int
    deleted: int

    def since(self, earlier: "Writes") -> "Writes":
        return Writes(
            self.inserted - earlier.inserted,
            self.updated - earlier.updated,
            self.hot_updated - earlier.hot_updated,
            self.deleted - earlier.deleted,
        )


class Scratch:
    """The scratch databases of one run, on the server at `server_url`."""

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._prefix = f"vectorkeep_benchmark_{token_hex(4)}"
        self._count = 0
        self.checkpoints = True  # False from when the role was refused one

    @contextmanager
    def database(self, vectors: Vectors, *, autovacuum: bool = False) -> Iterator["ScratchDatabase"]:
        """An empty store for `vectors`, dropped at the end of the block."""
        name = self._new_name()
        with self._dropped_after(name):
            self._create(name, None)
            url = database_url(self._server_url, name)
            upgrade(url)
            register_model(url, vectors.model_id, vectors.dimensions, "cosine")
            with self._opened(name, vectors) as opened:
                for table in () if autovacuum else ("embeddings", "chunks"):
                    opened.connection.execute(sql.SQL(_NO_AUTOVACUUM).format(sql.Identifier(table)))
                yield opened

    @contextmanager
    def copy_of(self, original: "ScratchDatabase") -> Iterator["ScratchDatabase"]:
        """A copy of a database that only this run has open, dropped at the end of the block."""
        name = self._new_name()
        with self._dropped_after(name):
            original.connection.close()
            try:
                self._create(name, original.name)
            finally:
                original.connection = handwritten.connect(original.url)
            with self._opened(name, original.vectors) as opened:
                yield opened

    @contextmanager
    def _dropped_after(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as exc:
            # What an interruption caught while it connected is held open by the traceback, and until the server
            # gives up on it, after a minute, it keeps DROP DATABASE waiting.
            traceback.clear_frames(exc.__traceback__)
            raise
        finally:
            with self.server() as connection:
                connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    @contextmanager
    def _opened(self, name: str, vectors: Vectors) -> Iterator["ScratchDatabase"]:
        url = database_url(self._server_url, name)
        opened = ScratchDatabase(name, url, vectors, handwritten.connect(url), self)
        try:
            yield opened
        finally:
            opened.connection.close()

    def _new_name(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"

    def _create(self, name: str, template: str | None) -> None:
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {} STRATEGY file_copy").format(sql.Identifier(template))
        with self.server() as connection:
            try:
                connection.execute(statement)
            except pg.InsufficientPrivilege as exc:
                raise db.PermissionDeniedError(
                    f"the role {connection.info.user!r} may not create databases, and the benchmark works only in "
                    f"databases of its own; run ALTER ROLE {connection.info.user} CREATEDB, or use another role"
                ) from exc

    def server(self) -> Connection[Any]:
        """A new connection to the server that was named. Raises UnavailableError."""
        return connect_directly(self._server_url, Settings(database_url=self._server_url))


@dataclass
class ScratchDatabase:
    """One scratch database, and the connection of the hand-written side."""

    name: str
    url: str = field(repr=False)
    vectors: Vectors
    connection: Connection[Any] = field(repr=False)
    scratch: "Scratch" = field(repr=False)

    @property
    def by_hand(self) -> Handwritten:
        return Handwritten(self.connection, self.vectors.model_id)

    def store(self, embedder: db.Embedder | None = None) -> AbstractContextManager[db.VectorStore]:
        return open_store(self.url, self.vectors, embedder)

    def drop_vector_indexes(self) -> None:
        """Drop the vector indexes, of chunks too. A write with `bulk` False does not bring them back."""
        self.connection.execute("DROP INDEX IF EXISTS embeddings_vector_idx, chunks_vector_idx")

    def build_index(self, rows: int) -> None:
        """Build the documents' vector index by hand, in memory in which the graph of `rows` vectors fits."""
        model = Model(self.vectors.model_id, self.vectors.dimensions, "cosine")
        self.by_hand.build_index(model.dimensions, build_memory_mb(model, rows))

    def truncate(self) -> None:
        self.connection.execute("TRUNCATE embeddings, chunks, vector_cache, write_log")

    def save(self) -> None:
        """Remember the documents as they are, for `restore`."""
        self.connection.execute("CREATE TABLE saved AS TABLE embeddings")

    def restore(self) -> None:
        """Bring the table back to the documents saved, in order of id, without dead rows."""
        self.truncate()
        self.connection.execute("INSERT INTO embeddings SELECT * FROM saved ORDER BY id")

    def settle(self, *, vacuum: bool = True) -> None:
        """Leave the server nothing to do that would fall into the next measurement."""
        if vacuum:
            self.connection.execute("VACUUM (ANALYZE) embeddings, chunks")
        if self.scratch.checkpoints:
            try:
                self.connection.execute("CHECKPOINT")
            except pg.InsufficientPrivilege:
                self.scratch.checkpoints = False

    def fingerprint(self) -> tuple[Any, ...]:
        """All that `embeddings` holds but the times of writing, and its indexes: equal for equal tables."""
        [row] = self.connection.execute(_FINGERPRINT).fetchall()
        return (*row, sorted(self.connection.execute(_INDEXES).fetchall()))

    def writes(self, table: str = "embeddings") -> Writes:
        """What was written to `table` so far. All stores must be closed: a session tells at its end."""
        deadline = time.monotonic() + _SESSIONS_END_WITHIN_S
        while self._value(_OTHER_SESSIONS) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.connection.execute("SELECT pg_stat_force_next_flush()")
        [row] = self.connection.execute(_WRITES, (table,)).fetchall()
        return Writes(*row)

    def _value(self, statement: str) -> Any:
        [(value,)] = self.connection.execute(statement.encode()).fetchall()
        return value


@contextmanager
def _missing_index_not_told() -> Iterator[None]:
    """Tables without a vector index are measured here on purpose: that one is missing is no news."""

    def is_news(record: logging.LogRecord) -> bool:
        return record.getMessage() != "vector_index.missing"

    logger = logging.getLogger("vectorkeep")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


class ModelName(Protocol):
    """What a store is told of its vectors."""

    @property
    def model_id(self) -> str: ...

    @property
    def dimensions(self) -> int: ...


@contextmanager
def open_store(url: str, model: ModelName, embedder: db.Embedder | None = None) -> Iterator[db.VectorStore]:
    """A store without a cache, its connections open, whatever the environment says of other stores."""
    with (
        _missing_index_not_told(),
        db.connect(
            url,
            False,
            embedder=embedder,
            model_id=model.model_id,
            dimensions=model.dimensions,
            distance="cosine",
            statement_timeout_s=_STATEMENT_TIMEOUT_S,
            maintenance_url=None,
            chunk_size=1000,
            chunk_overlap=100,
            maintenance_on_close=False,
        ) as store,
    ):
        with ExitStack() as open_now:
            for _ in range(_CONNECTIONS):
                open_now.enter_context(store.pool.connection())
        yield store


def database_url(server_url: str, name: str) -> str:
    """`server_url` with another database."""
    parts = urlsplit(server_url)
    query = urlencode([(key, value) for key, value in parse_qsl(parts.query) if key != "dbname"])
    return f"postgresql://{parts.netloc}/{name}" + (f"?{query}" if query else "")
