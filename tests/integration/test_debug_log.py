"""What VECTORKEEP_DEBUG logs: every statement that a cursor runs, the rows of a COPY and a server-side cursor too."""

import logging

import pytest

import db


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.DEBUG, "vectorkeep")

    def beginning_with(words):
        return [r for r in caplog.records if r.getMessage().partition("ms: ")[2].startswith(words)]

    return beginning_with


def test_every_statement_is_logged_with_its_time(database_url, logged):
    with db.connect(database_url, False, model_id="test-model", dimensions=8, debug=True) as store:
        store.batch_upsert([{"id": "a", "text": "t", "embedding": [1.0] * 8}])
        assert [stored.id for stored in store.iter_hashes()] == ["a"]
        with store.pool.connection() as connection:
            connection.execute(b"SELECT 1 AS bytes")
            connection.cursor().executemany("SELECT %s::int AS many", [(1,), (2,)])
    for words in ("COPY", "SELECT id, source_id, text_hash", "SELECT 1 AS bytes", "SELECT %s::int AS many"):
        assert len(logged(words)) == 1, words


def test_without_it_none_is(database_url, logged):
    with db.connect(database_url, False, model_id="test-model", dimensions=8) as store:
        store.batch_upsert([{"id": "a", "text": "t", "embedding": [1.0] * 8}])
    assert not logged("COPY")
    assert not logged("INSERT")
