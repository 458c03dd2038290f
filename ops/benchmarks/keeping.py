"""Deleting, cleaning and scanning hashes in large tables: what grows with the table, and what must not.

The rows are made by the server, with short vectors: nothing that is measured here reads them. Sources are
of two sizes, so that either the same work or the same share of the table can be deleted.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

import db

from .memory import measure_memory
from .plan import Run, UnequalWork
from .report import Target, growth_figure, rate_figure
from .rows import SyntheticVectors, documents
from .scratch import ScratchDatabase

GROWTH_TARGET = Target(1.5, at_most=True)
_TIMES_AS_LARGE = 4
_DIMENSIONS = 64
_POOL = 1000

_FILL_DOCUMENTS = """
    INSERT INTO embeddings (id, source_id, text, text_hash, content_hash, vector_hash, model_id, embedding, metadata)
    SELECT id, source_id, text, sha256(convert_to(text, 'UTF8')),
           sha256(sha256(convert_to(text, 'UTF8')) || source_id::bytea || '\\x00' || metadata::bytea),
           sha256(id::bytea), %(model_id)s, embedding, metadata::jsonb
    FROM (SELECT 'row/' || lpad(n::text, 9, '0') AS id,
                 CASE WHEN n < %(in_small_sources)s THEN 'small-' || n / %(small)s ELSE 'large-' || n / %(large)s END
                 AS source_id,
                 format('%%s (%%s)', pool.text, n) AS text, pool.embedding, format('{"n":%%s}', n) AS metadata
          FROM generate_series(%(start)s, %(stop)s - 1) AS n JOIN pool ON pool.number = n %% %(pool)s) AS made
"""
_FILL_CHUNKS = """
    INSERT INTO chunks (id, document_id, chunk_index, source_id, text, text_hash, embedding)
    SELECT id || '#0', id, 0, source_id, text, text_hash, embedding
    FROM embeddings WHERE id BETWEEN 'row/' || lpad(%(start)s::text, 9, '0') AND 'row/' || lpad(%(stop)s::text, 9, '0')
"""
_POOL_TABLE = """
    CREATE TABLE pool AS
    SELECT row_number() OVER (ORDER BY id) - 1 AS number, left(text, 120) AS text, embedding
    FROM embeddings
"""
_MAKE_ORPHANS = """
    INSERT INTO chunks (id, document_id, origin_id, chunk_index, source_id, text, text_hash, embedding)
    SELECT 'orphan/' || n, NULL, 'gone/' || n, 0, 'gone', text, sha256(convert_to(text, 'UTF8')), embedding
    FROM generate_series(1, %(orphans)s) AS n JOIN pool ON pool.number = n %% %(pool)s
    ON CONFLICT DO NOTHING
"""
_READ = """
    SELECT relname, coalesce(seq_tup_read, 0),
           (SELECT coalesce(sum(idx_tup_read), 0)::bigint FROM pg_stat_user_indexes AS i WHERE i.relid = t.relid)
    FROM pg_stat_user_tables AS t WHERE relname IN ('chunks', 'embeddings') ORDER BY relname
"""


@dataclass(frozen=True)
class Large:
    """Two databases of the same kind, one four times as large as the other."""

    small: ScratchDatabase
    large: ScratchDatabase
    small_rows: int

    @property
    def large_rows(self) -> int:
        return _TIMES_AS_LARGE * self.small_rows

    @property
    def small_source(self) -> int:
        """Documents in each of the first sources: 1 % of the small database."""
        return max(self.small_rows // 100, 1)

    @property
    def large_source(self) -> int:
        """Documents in each of the other sources: 1 % of the large database."""
        return _TIMES_AS_LARGE * self.small_source

    def fill(self, database: ScratchDatabase, start: int, stop: int) -> None:
        values = {
            "model_id": database.vectors.model_id,
            "start": start,
            "stop": stop,
            "small": self.small_source,
            "large": self.large_source,
            "in_small_sources": self.small_rows,
            "pool": min(_POOL, self.small_rows),
        }
        database.connection.execute(_FILL_DOCUMENTS, values)
        database.connection.execute(_FILL_CHUNKS, values)


def measure_large(run: Run, names: Collection[str]) -> None:
    """The measures of `names`: delete-source, cleanup, memory."""
    with _large(run) as databases:
        if "delete-source" in names:
            run.say("delete-source")
            _delete_source(run, databases)
        if "cleanup" in names:
            run.say("cleanup")
            _cleanup(run, databases)
        if "memory" in names:
            run.say("memory")
            _fill_up(databases, run.rows * 45 // 2)
            measure_memory(run, databases.large, run.rows * 45 // 2)


@contextmanager
def _large(run: Run) -> Iterator[Large]:
    vectors = SyntheticVectors(_DIMENSIONS)
    small_rows = 5 * run.rows
    with run.scratch.database(vectors) as large:
        large.drop_vector_indexes()
        large.by_hand.copy(documents(vectors, 0, min(_POOL, small_rows)))
        large.connection.execute(_POOL_TABLE)
        large.truncate()
        run.say(f"making {small_rows:,} rows, and {_TIMES_AS_LARGE * small_rows:,}")
        Large(large, large, small_rows).fill(large, 0, small_rows)
        with run.scratch.copy_of(large) as small:
            databases = Large(small, large, small_rows)
            databases.fill(large, small_rows, databases.large_rows)
            for database in (small, large):
                database.settle()
            yield databases


def _delete_source(run: Run, databases: Large) -> None:
    small, large, large_share = (
        f"{databases.small_source:,} of {databases.small_rows:,} rows",
        f"{databases.small_source:,} of {databases.large_rows:,} rows",
        f"{databases.large_source:,} of {databases.large_rows:,} rows",
    )
    first_large_source = databases.small_rows // databases.large_source + 1
    with databases.small.store() as in_small, databases.large.store() as in_large:
        times = run.compete(
            [databases.small, databases.large],
            {
                small: lambda n: _delete(in_small, f"small-{n}", databases.small_source),
                large: lambda n: _delete(in_large, f"small-{n}", databases.small_source),
                large_share: lambda n: _delete(in_large, f"large-{first_large_source + n}", databases.large_source),
            },
            vacuum=False,
        )
    notes = ["each document with one chunk; the indexes on id, source, workspace and creation, no vector index"]
    run.add(
        growth_figure(
            "delete-source",
            f"delete one source, {large}",
            times,
            large=large,
            small=small,
            target=GROWTH_TARGET,
            notes=notes,
        ),
        growth_figure(
            "delete-source",
            f"delete one source of 1 %, {large_share}, for each row",
            times,
            large=large_share,
            small=small,
            work=_TIMES_AS_LARGE,
            target=GROWTH_TARGET,
            notes=notes,
        ),
    )


def _delete(store: db.VectorStore, source_id: str, documents: int) -> None:
    result = store.delete_by_source_id(source_id)
    if (result.deleted, result.chunks_removed) != (documents, documents):
        raise UnequalWork(f"{source_id} has {documents} documents of a chunk each, but the result is {result}")


def _cleanup(run: Run, databases: Large) -> None:
    orphans = max(databases.small_rows // 10, 1)
    _count_orphans(run, databases, 0)
    for database in (databases.small, databases.large):
        _make_orphans(database, orphans)
    _count_orphans(run, databases, orphans)
    _remove_orphans(run, databases, orphans)


def _count_orphans(run: Run, databases: Large, orphans: int) -> None:
    for database in (databases.small, databases.large):
        database.settle()
    small, large = f"{databases.small_rows:,} rows", f"{databases.large_rows:,} rows"
    with databases.small.store() as in_small, databases.large.store() as in_large:
        times = run.compete(
            [databases.small, databases.large],
            {
                small: lambda _round: _dry_run(in_small, orphans),
                large: lambda _round: _dry_run(in_large, orphans),
            },
            vacuum=False,
        )
    name = f"dry-run cleanup, {orphans:,} orphans, {large}"
    notes = [f"what one dry run reads in {large}: {_read_by_dry_run(databases.large, orphans)}"]
    run.add(
        growth_figure("cleanup", name, times, large=large, small=small),
        growth_figure(
            "cleanup",
            f"{name}, for each row looked at",
            times,
            large=large,
            small=small,
            work=_TIMES_AS_LARGE,
            target=GROWTH_TARGET,
            notes=notes,
        ),
    )


def _dry_run(store: db.VectorStore, orphans: int) -> None:
    result = store.cleanup_orphaned(dry_run=True)
    if (result.orphaned_chunks, result.orphaned_embeddings) != (orphans, 0):
        raise UnequalWork(f"there are {orphans} orphaned chunks, but the result is {result}")


def _read_by_dry_run(database: ScratchDatabase, orphans: int) -> str:
    """What the server's own counters say that one dry run read of each table."""
    database.writes()  # waits for sessions to end: they tell what they read at their end
    before = dict(_read(database.connection))
    with database.store() as store:
        _dry_run(store, orphans)
    database.writes()
    return "; ".join(
        f"{table}: {rows - before[table][0]:,} rows in sequence, {entries - before[table][1]:,} entries of indexes"
        for table, (rows, entries) in _read(database.connection)
    )


def _read(connection: Connection[Any]) -> list[tuple[str, tuple[int, int]]]:
    return [(table, (rows, entries)) for table, rows, entries in connection.execute(_READ).fetchall()]


def _make_orphans(database: ScratchDatabase, orphans: int) -> None:
    [(pool,)] = database.connection.execute("SELECT count(*) FROM pool").fetchall()
    database.connection.execute(_MAKE_ORPHANS, {"orphans": orphans, "pool": pool})


def _remove_orphans(run: Run, databases: Large, orphans: int) -> None:
    small, large = f"{databases.small_rows:,} rows", f"{databases.large_rows:,} rows"
    by_hand = "DELETE and VACUUM by hand"

    def prepare(side: str) -> None:
        _make_orphans(databases.large if side == large else databases.small, orphans)

    with databases.small.store() as in_small, databases.large.store() as in_large:
        times = run.compete(
            [databases.small, databases.large],
            {
                small: lambda _round: _remove(in_small, orphans),
                large: lambda _round: _remove(in_large, orphans),
                by_hand: lambda _round: databases.small.by_hand.remove_orphans(),
            },
            prepare=prepare,
            vacuum=False,
        )
    name = f"cleanup of {orphans:,} orphans"
    run.add(
        rate_figure("cleanup", f"{name}, {small}, vacuum included", times, orphans, side=small, other=by_hand),
        growth_figure("cleanup", f"{name}, {large}, vacuum included", times, large=large, small=small),
    )


def _remove(store: db.VectorStore, orphans: int) -> None:
    result = store.cleanup_orphaned()
    if (result.orphaned_chunks, result.vacuumed) != (orphans, True):
        raise UnequalWork(f"there are {orphans} orphaned chunks to be removed, but the result is {result}")


def _fill_up(databases: Large, rows: int) -> None:
    """Bring the large database to `rows` documents, those deleted before made up for."""
    [(stored,)] = databases.large.connection.execute("SELECT count(*) FROM embeddings").fetchall()
    databases.fill(databases.large, databases.large_rows, databases.large_rows + rows - stored)
    databases.large.settle()
