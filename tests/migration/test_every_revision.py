"""A store filled at each earlier revision, as the library fills it, arrives at head with its rows and answers."""

import numpy as np
import psycopg
import pytest
from alembic import command
from psycopg.sql import SQL, Identifier

import db
from db.migrate import alembic_config, head_revision, upgrade
from db.registry import register_model

pytestmark = pytest.mark.every_server

EARLIER = ["0001", "0002", "0003", "0004", "0005", "0006"]
WORDS = ("Grüße", " ", "日本語", "tab\tand\nline", "plain", "x" * 3000)
MODEL = {"model_id": "test-model", "dimensions": 8}
TABLES = """
    SELECT table_name::text, array_agg(column_name::text ORDER BY ordinal_position) FROM information_schema.columns
    WHERE table_schema = 'public' AND table_name NOT IN ('alembic_version', 'write_log_watermark')
    GROUP BY table_name ORDER BY table_name <> 'embeddings', table_name
"""
# What the second revision works out for the rows of the first.
DERIVED = {"embeddings": ["id", "workspace", "text_hash"], "chunks": ["id", "workspace", "text_hash"]}
VECTOR_INDEXES = "SELECT indexdef FROM pg_indexes WHERE indexname LIKE '%_vector_idx' ORDER BY 1"
INVALID = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
# What a program of the oldest revision can ask: an exact search over the columns that there always were.
NEAREST = """
    SELECT id, round((1 - (embedding <=> %(query)s::vector))::numeric, 5) FROM {}
    WHERE embedding IS NOT NULL ORDER BY embedding <=> %(query)s::vector, id LIMIT 7
"""
QUERIES = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)


def test_every_revision_is_filled():
    assert [f"{number:04}" for number in range(1, int(head_revision()))] == EARLIER, "a new revision belongs here"


def documents():
    random = np.random.default_rng(5)
    for number in range(60):
        vector = random.normal(size=8) * (1e-9 if number % 7 == 0 else 1)
        yield {
            "id": f"d{number} ü",
            "text": WORDS[number % len(WORDS)],
            "source_id": f"s{number % 3}",
            "metadata": {"n": number, "deep": {"list": [1, None, "ü"]}, "workspace": f"w{number % 2}"},
            "embedding": None if number % 10 == 9 else vector,
            "chunks": [{"text": f"piece {n}", "embedding": random.normal(size=8)} for n in range(number % 4)],
        }


@pytest.fixture
def filled(database_url):
    """A connection to a store at head: documents with and without vectors, detached chunks, rows in every table."""
    with db.connect(database_url, False, **MODEL) as store:
        assert store.batch_upsert(documents()).inserted == 60
        store.batch_upsert([{"id": "gone", "text": "t", "source_id": "gone", "chunks": [{"text": "of nobody"}]}])
        store.delete_by_source_id("gone", cascade=False)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("""
            INSERT INTO vector_cache VALUES (sha256('x'), 'test-model', '[1,2,3,4,5,6,7,8]');
            INSERT INTO maintenance_runs (operation, success, started_at) VALUES ('maintain', true, now());
            INSERT INTO query_samples (model_id, level, embedding) VALUES ('test-model', 'chunks', '[1,0,0,0,0,0,0,0]');
            INSERT INTO rebuild_runs (state, details) VALUES ('failed', '{"why": "a test"}');
            INSERT INTO recall_measurements (model_id, level, filtered, k, sample, recall, recall_low, recall_high,
                target, ef_search, indexed_ms_p50, exact_ms_p50, looked_up, unreachable, zero_vectors, rows)
            VALUES ('test-model', 'documents', false, 10, 9, 1, 0.9, 1, 0.95, 100, 1, 2, 3, 0, 0, 60);
            INSERT INTO tenant_workspaces VALUES ('somebody', 'w');
            INSERT INTO ingestion_pause (reason, owner, expires_at) VALUES ('over', 'a test', now())""")
        yield connection


def columns(connection):
    return dict(connection.execute(TABLES).fetchall())


def rows(connection, shape):
    """Every value of `shape`, table by table, as text."""
    return {
        table: sorted(str(row) for row in connection.execute(_all(table, names).as_string(connection)).fetchall())
        for table, names in shape.items()
    }


def _all(table, names):
    listed = SQL(", ").join(SQL("{}::text").format(Identifier(name)) for name in names)
    return SQL("SELECT {} FROM {}").format(listed, Identifier(table))


def copy_into(connection, source):
    """Fill `connection`'s tables, of whichever revision, with what `source` has in these columns."""
    for table, names in columns(connection).items():
        listed = SQL(", ").join(map(Identifier, names))
        taken = SQL("COPY (SELECT {} FROM {}) TO STDOUT").format(listed, Identifier(table))
        put = SQL("COPY {} ({}) FROM STDIN").format(Identifier(table), listed)
        with source.cursor().copy(taken) as data, connection.cursor().copy(put) as copy:
            for block in data:
                copy.write(block)
        if "id" in names and table not in ("embeddings", "chunks"):
            counted = SQL("SELECT setval(pg_get_serial_sequence({}, 'id'), max(id)) FROM {}")
            connection.execute(counted.format(table, Identifier(table)))


def nearest(connection, table):
    asked = [connection.execute(NEAREST.format(table), {"query": str(query.tolist())}) for query in QUERIES]
    return [[(id_, float(score)) for id_, score in answer] for answer in asked]


def found(store, level):
    results = [store.search(query, 7, level=level) for query in QUERIES]
    assert all(result.complete for result in results)
    return [[(hit.id, round(hit.score, 5)) for hit in result] for result in results]


@pytest.mark.parametrize("revision", EARLIER)
def test_rows_and_answers_are_those_of_before(empty_database_url, empty, filled, revision):
    upgrade(empty_database_url, revision)
    copy_into(empty, filled)
    if revision >= "0003":  # the registry came with it, and with a registered model its indexes
        for (definition,) in filled.execute(VECTOR_INDEXES).fetchall():
            empty.execute(definition)
    shape = columns(empty)
    before, answers = rows(empty, shape), [nearest(empty, table) for table in ("embeddings", "chunks")]
    assert all(before.values()), f"a table of revision {revision} was not filled"

    assert upgrade(empty_database_url) == (revision, head_revision())

    assert rows(empty, shape) == before
    assert empty.execute(INVALID).fetchall() == []
    command.check(alembic_config(empty_database_url))
    assert rows(empty, DERIVED) == rows(filled, DERIVED)
    if revision < "0003":  # there was no registry: which model made the vectors only a person knows
        register_model(empty_database_url, *MODEL.values(), "cosine")
    with db.connect(empty_database_url, False) as store:
        assert [found(store, "documents"), found(store, "chunks")] == answers
        again = store.batch_upsert(documents())
        # Without hashes of the whole each document counts as changed, once.
        assert (again.unchanged, again.updated, again.failed) == ((60, 0, 0) if revision >= "0002" else (0, 60, 0))
