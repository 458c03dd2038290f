"""A chunk whose text stays is not embedded again, even where the vector cache has retired its vector."""

import numpy as np
import pytest

import db

# Paragraphs of 60 characters, each a chunk.
PARAGRAPHS = [f"{letter} " + "word " * 11 + f"{letter}{letter}" for letter in "ABCDEF"]


class Counting:
    """An embedder whose vectors tell the text's letters, and that notes what it was asked."""

    def __init__(self, model_id="m", dimensions=8):
        self.model_id, self.dimensions, self.asked = model_id, dimensions, []

    def embed(self, texts):
        self.asked += texts
        return np.array([[ord(t[0]), len(t), *[1] * (self.dimensions - 2)] for t in texts], dtype=np.float32)


@pytest.fixture
def embedder():
    return Counting()


@pytest.fixture
def store(database_url, redis_url, embedder):
    with db.connect(database_url, redis_url, embedder=embedder, chunk_size=70, chunk_overlap=0) as opened:
        yield opened


def text_of(paragraphs):
    return "\n\n".join(paragraphs)


@pytest.fixture
def ingested(store, embedder, sql):
    """A store with one document of six chunks, its vector cache empty."""
    store.embed_batch([db.Item("d", text_of(PARAGRAPHS))])
    assert len(embedder.asked) == 6
    assert sql("DELETE FROM vector_cache RETURNING 1") == [(1,)] * 6
    embedder.asked.clear()
    return store


def test_only_the_chunk_that_changed_is_embedded_again(ingested, embedder, sql):
    before = dict(sql("SELECT text, embedding::text FROM chunks"))
    changed = [*PARAGRAPHS[:3], "X" + PARAGRAPHS[3][1:], *PARAGRAPHS[4:]]
    result = ingested.embed_batch([db.Item("d", text_of(changed))])
    assert (result.updated, result.embedded, result.cache_hits) == (1, 1, 5)
    assert [t.strip() for t in embedder.asked] == [changed[3]]
    after = dict(sql("SELECT text, embedding::text FROM chunks"))
    assert len(after) == 6
    assert {t: v for t, v in before.items() if t in after}.items() <= after.items()


def test_what_is_stored_is_what_a_fresh_store_would_hold(ingested, embedder, sql):
    columns = "SELECT chunk_index, text, embedding::text FROM chunks ORDER BY 1"
    changed = db.Item("d", text_of([PARAGRAPHS[5], *PARAGRAPHS[1:3]]))
    ingested.embed_batch([changed])
    patched = sql(columns)
    vector = sql("SELECT embedding::text FROM embeddings")
    ingested.delete(["d"])
    sql("DELETE FROM vector_cache")
    ingested.embed_batch([changed])
    assert (sql(columns), sql("SELECT embedding::text FROM embeddings")) == (patched, vector)


def test_chunks_of_other_documents_are_not_looked_through(ingested, embedder):
    result = ingested.embed_batch([db.Item("another", text_of(PARAGRAPHS))])
    assert (result.inserted, result.embedded, result.cache_hits) == (1, 6, 0)


def test_a_chunk_of_another_model_is_never_used(ingested, embedder, sql):
    sql("UPDATE embeddings SET model_id = 'another'")
    result = ingested.embed_batch([db.Item("d", text_of(PARAGRAPHS[:2]))])
    assert (result.embedded, result.cache_hits) == (2, 0)


def test_a_chunk_of_another_length_or_without_a_vector_is_never_used(ingested, embedder, sql):
    sql("DROP INDEX chunks_vector_idx")
    sql("UPDATE chunks SET embedding = '[1,2]' WHERE chunk_index = 0")
    sql("UPDATE chunks SET embedding = NULL WHERE chunk_index = 1")
    result = ingested.embed_batch([db.Item("d", text_of(PARAGRAPHS[:3]))])
    assert (result.embedded, result.cache_hits) == (2, 1)


def test_new_documents_cost_no_look_at_chunks(database_url, caplog):
    caplog.set_level("DEBUG", logger="vectorkeep")
    with db.connect(database_url, False, embedder=Counting(), debug=True) as watched:
        watched.embed_batch([db.Item("new", "text")])
        assert not [r for r in caplog.records if "chunks.text_hash = ANY" in r.getMessage()]
        watched.embed_batch([db.Item("new", "other text")])
        assert [r for r in caplog.records if "chunks.text_hash = ANY" in r.getMessage()]
