"""What embed_batch does where items are bad, or the embedder or the server fails."""

import numpy as np
import pytest

import db
from db import CallableEmbedder, DimensionError, ValidationError
from tests.integration.counting import DIMENSIONS, Counting, counts, items, vector_of


def test_bad_items_stop_no_others(embedding_store):
    given = [{"id": "a", "text": "t"}, {"id": "b", "text": ""}, {"id": "c", "text": "t", "embedding": [1]}, 7]
    result = embedding_store.embed_batch(given)
    assert counts(result) == {"inserted": 1, "failed": 3, "embedded": 1}
    assert dict(result.errors)["c"].startswith("unknown key 'embedding'")


def test_an_embedder_that_fails_half_way_leaves_the_batches_before_and_a_rerun_finishes(database_url, redis_url, sql):
    class Failing(Counting):
        def embed(self, texts):
            if len(self.asked) >= 30:
                raise RuntimeError("quota used up")
            return super().embed(texts)

    told = []
    with db.connect(database_url, redis_url, embedder=Failing()) as store:
        with pytest.raises(RuntimeError, match="quota used up"):
            store.embed_batch(iter(items(100)), batch_size=10, on_progress=lambda *t: told.append(t))
        assert sql("SELECT count(*) FROM embeddings WHERE embedding IS NOT NULL") == [(30,)]
        assert told == [(10, None), (20, None), (30, None)]
    with db.connect(database_url, redis_url, embedder=Counting()) as store:
        assert counts(store.embed_batch(items(100))) == {"inserted": 70, "skipped": 30, "embedded": 70}


@pytest.mark.parametrize(
    ("returned", "error", "reason"),
    [
        (lambda texts: np.zeros((len(texts) + 1, DIMENSIONS)), ValidationError, "for 5 texts"),
        (lambda texts: np.zeros((len(texts), 3)), DimensionError, "vectors of 3 dimensions, it declares 16"),
        (lambda texts: np.full((len(texts), DIMENSIONS), np.nan), ValidationError, "NaN or an infinity"),
        (lambda texts: [["x"] * DIMENSIONS] * len(texts), ValidationError, "no array of numbers"),
    ],
    ids=["number", "dimensions", "NaN", "strings"],
)
def test_an_embedder_that_returns_nonsense_is_an_error_and_nothing_of_it_is_kept(
    database_url, redis_url, sql, returned, error, reason
):
    embedder = CallableEmbedder(returned, "bad", DIMENSIONS)
    with db.connect(database_url, redis_url, embedder=embedder) as store, pytest.raises(error, match=reason):
        store.embed_batch(items(5))
    assert sql("SELECT (SELECT count(*) FROM embeddings), (SELECT count(*) FROM vector_cache)") == [(0, 0)]


def test_a_text_without_direction_fails_alone(database_url, redis_url):
    def zero_for_some(texts):
        return [np.zeros(DIMENSIONS) if "3" in text else vector_of(text) for text in texts]

    with db.connect(database_url, redis_url, embedder=CallableEmbedder(zero_for_some, "m", DIMENSIONS)) as store:
        result = store.embed_batch(items(10))
        assert (result.inserted, result.failed) == (9, 1)
        assert result.errors[0][0] == "00003"
        assert "all zeros" in result.errors[0][1]


def test_what_the_server_refuses_is_isolated(embedding_store, sql):
    sql("ALTER TABLE chunks ADD CHECK (text NOT LIKE '% 7')")
    result = embedding_store.embed_batch(items(20))
    assert (result.inserted, result.failed, [id_ for id_, _ in result.errors]) == (19, 1, ["00007"])


def test_a_document_deleted_while_only_its_metadata_was_to_change_is_embedded_after_all(database_url, redis_url, sql):
    """Its vector was found to stay a moment before it went: no row without a vector may come of that."""

    class Deleting(Counting):
        def embed(self, texts):
            if "new" in texts:
                store.delete(["00001"])
                sql("DELETE FROM vector_cache")
            return super().embed(texts)

    with db.connect(database_url, redis_url, embedder=Deleting()) as store:
        store.embed_batch(items(4))
        changed = [{**item, "metadata": {"n": -1}} for item in items(4)]
        result = store.embed_batch([*changed, {"id": "new", "text": "new"}])
    assert counts(result) == {"inserted": 2, "updated": 3, "embedded": 2}
    assert sql("SELECT id FROM embeddings WHERE embedding IS NULL OR metadata <> '{\"n\": -1}' ORDER BY id") == [
        ("new",)
    ]
