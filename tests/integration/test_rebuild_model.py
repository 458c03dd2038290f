"""A store moved to another embedding model, and back: no vector of one model meets those of the other."""

import hashlib
from contextlib import nullcontext

import numpy as np
import pytest
from alembic import command

import db
from db import vectors
from db.config import Settings
from db.migrate import alembic_config
from db.opening import OpenParts
from db.pause import current_pause
from db.rebuild import rebuild
from db.rebuild_forecast import forecast_rollback
from db.rebuild_plan import RebuildPlan
from db.rebuild_runs import FAILED, SWAPPED, begin_run, end_run, retire_previous, unfinished_rebuild
from db.rollback import roll_back
from tests.integration.counting import Counting, items, vector_of

DOCUMENTS = "SELECT * FROM embeddings ORDER BY id"
CHUNKS = "SELECT * FROM chunks ORDER BY id"


class Other(Counting):
    """Another model, of other dimensions, whose vectors have nothing to do with the first one's."""

    dimensions = 12

    def __init__(self):
        super().__init__("other")

    def embed(self, texts):
        self.asked.extend(texts)
        return np.stack([self.vector_of(text) for text in texts])

    @staticmethod
    def vector_of(text):
        seed = int.from_bytes(hashlib.sha256(b"other" + text.encode()).digest()[:8], "big")
        return np.random.default_rng(seed).standard_normal(12).astype(np.float32)


LONG = " ".join(f"Sentence number {n} of a long text." for n in range(120))


@pytest.fixture
def settings(database_url, redis_url):
    return Settings.load({"database_url": database_url, "redis_url": redis_url})


@pytest.fixture
def filled(embedding_store):
    embedding_store.embed_batch([*items(40), {"id": "long", "text": LONG, "source_id": "s0"}])
    embedding_store.batch_upsert(
        [
            {"id": "bare", "text": "without a vector", "source_id": "mine"},
            {"id": "own", "text": "with a vector of its own", "embedding": [1.0] * 16, "chunks": [{"text": "a piece"}]},
            {"id": "gone", "text": "x", "source_id": "gone", "chunks": [{"text": "loose", "embedding": [2.0] * 16}]},
        ]
    )
    embedding_store.delete_by_source_id("gone", cascade=False)
    return embedding_store


def without_vectors(sql):
    return sql(
        "SELECT id, source_id, workspace, text, text_hash, content_hash, metadata, created_at, updated_at "
        "FROM embeddings ORDER BY id"
    ), sql(
        "SELECT id, document_id, origin_id, chunk_index, text, text_hash, metadata, created_at FROM chunks ORDER BY id"
    )


@pytest.mark.every_server
def test_all_vectors_are_made_anew_by_the_new_model(filled, settings, sql, database_url, redis_url):
    before = without_vectors(sql)
    other = Other()
    result = rebuild(settings, RebuildPlan(new_model=True), other)
    assert (result.model_id, result.dimensions, result.documents) == ("other", 12, 43)
    assert result.embedded == len(other.asked) == len(set(other.asked))
    assert without_vectors(sql) == before
    assert sql("SELECT model_id, dimensions FROM embedding_models WHERE active") == [("other", 12)]
    for table in ("embeddings", "chunks"):
        assert sql(f"SELECT DISTINCT vector_dims(embedding) FROM {table} WHERE embedding IS NOT NULL") == [(12,)]
    command.check(alembic_config(database_url))
    with db.connect(database_url, redis_url, embedder=other) as store:
        vectors_by_id = {d.id: d.embedding for d in store.get(["00003", "long", "own", "bare"])}
        assert vectors_by_id["00003"].tolist() == other.vector_of("text number 3").tolist()
        assert vectors_by_id["own"].tolist() == other.vector_of("with a vector of its own").tolist()
        assert vectors_by_id["bare"] is None
        [long] = store.get(["long"])
        pieces = [chunk.text for chunk in long.chunks]
        mean = vectors.weighted_mean([other.vector_of(t) for t in pieces], [len(t) for t in pieces])
        assert np.allclose(long.embedding, mean, atol=1e-6)
        assert [chunk.embedding for chunk in store.get(["own"])[0].chunks] == [None]
        assert sql("SELECT embedding IS NOT NULL FROM chunks WHERE document_id IS NULL") == [(True,)]
        assert store.search("text number 7", 1)[0].id == "00007"
        # What is ingested again by the new model is known as unchanged: all hashes fit.
        again = store.embed_batch([*items(40), {"id": "long", "text": LONG, "source_id": "s0"}])
        assert (again.skipped, again.embedded) == (41, 0)
        documents = [{"id": d.id, "text": d.text, "source_id": d.source_id, "metadata": d.metadata,
                      "embedding": d.embedding, "chunks": d.chunks} for d in store.get(["00003", "long"])]  # fmt: skip
        assert store.batch_upsert(documents).unchanged == 2


def test_a_store_that_is_open_refuses_the_other_models_vectors_until_it_is_opened_again(filled, settings, sql):
    query = vector_of("text number 7")
    with db.connect(settings.database_url, False) as plain:
        assert plain.search(query, 1)[0].id == filled.search(query, 1)[0].id == "00007"
        rebuild(settings, RebuildPlan(new_model=True), Other())
        moved = (
            r"model was 'counting' \(16 dimensions, cosine\) .* 'other' \(12 dimensions, cosine\) now.*open the store"
        )
        before = sql(DOCUMENTS)
        for store in (filled, plain):
            for level in ("documents", "chunks"):
                with pytest.raises(db.SchemaError, match=moved):
                    store.search(query, 1, level=level)
            with pytest.raises(db.SchemaError, match=moved):
                store.batch_upsert([{"id": "new", "text": "text", "embedding": query}])
            with pytest.raises(db.SchemaError, match=moved):
                store.delete(["00007"])
        with pytest.raises(db.SchemaError, match=moved):
            filled.embed_batch([{"id": "new", "text": "text"}])
        assert sql(DOCUMENTS) == before
        with db.connect(settings.database_url, False) as opened_again:
            assert opened_again.search(Other.vector_of("text number 7"), 1)[0].id == "00007"


def test_another_model_of_the_same_dimensions_is_noticed_too(filled, settings):
    """Nothing would fail: the answers would only be wrong."""
    query = vector_of("text number 7")
    filled.search(query)
    rebuild(settings, RebuildPlan(new_model=True), Counting("second"))
    with pytest.raises(db.SchemaError, match="'second'"):
        filled.search(query)
    with pytest.raises(db.SchemaError, match="'second'"):
        filled.search(query, consistency="bounded", k=3)
    with pytest.raises(db.SchemaError, match="'second'"):
        filled.batch_upsert([{"id": "new", "text": "text", "embedding": query}])


def test_a_write_prepared_before_the_swap_does_not_bring_its_vectors_in_after_it(filled, settings, sql):
    """Its vectors are of the old model, and the pause is over when it gets to write."""

    def documents():
        yield {"id": "first", "text": "text", "embedding": vector_of("first")}
        rebuild(settings, RebuildPlan(new_model=True), Counting("second"))

    with pytest.raises(db.SchemaError, match="'second'"):
        filled.batch_upsert(documents())
    assert sql("SELECT count(*) FROM embeddings WHERE id = 'first'") == [(0,)]


def test_neighbours_that_models_agree_on_are_reported_and_a_gate(filled, settings, sql, admin):
    before = sql(DOCUMENTS), sql(CHUNKS)
    with pytest.raises(db.ValidationError, match=r"agrees on 0\.\d+ of the nearest neighbours, expected at least 0\.9"):
        rebuild(settings, RebuildPlan(new_model=True, min_overlap=0.9), Other())
    assert (sql(DOCUMENTS), sql(CHUNKS)) == before
    assert sql("SELECT model_id FROM embedding_models WHERE active") == [("counting",)]
    assert unfinished_rebuild(admin) is None
    assert filled.search("text number 7", 1)[0].id == "00007"
    # 10 of 42 by chance.
    assert 0.1 < rebuild(settings, RebuildPlan(new_model=True), Other()).overlap < 0.45
    # The very same vectors under another name, but for the one that its caller brought along.
    assert rebuild(settings, RebuildPlan(new_model=True), Counting("second")).overlap < 0.45
    assert rebuild(settings, RebuildPlan(new_model=True), Counting("third")).overlap == 1


def test_recall_is_a_gate(filled, settings, sql, monkeypatch):
    with pytest.raises(db.ValidationError, match=r"find 1\.000 of the nearest rows, expected at least 1\.010"):
        rebuild(settings, RebuildPlan(min_recall=1.01))
    measured = iter([0.9, 0.7])
    monkeypatch.setattr("db.rebuild.measured_recall", lambda *_: next(measured))
    with pytest.raises(db.ValidationError, match=r"find 0\.700 of the nearest rows, expected at least 0\.850"):
        rebuild(settings, RebuildPlan())
    assert sql("SELECT state FROM rebuild_runs") == [("failed",), ("failed",)]


def test_a_source_may_be_read_again_by_the_new_model(filled, settings, sql):
    other = Other()
    of_source = [item for item in items(40) if item["source_id"] == "s1"][:3]
    result = rebuild(settings, RebuildPlan(sources={"s1": lambda: of_source}, new_model=True), other)
    assert (result.ingested, result.copied) == (3, 43 - 13)
    # Each text is counted once: embedded where the model was asked for it, spared where it had been asked before.
    assert result.embedded == len(other.asked) == len(set(other.asked))
    again = Other()
    result = rebuild(settings, RebuildPlan(sources={"s1": lambda: of_source}, new_model=True), again)
    assert (result.embedded, result.cache_hits) == (0, len(set(other.asked)))
    assert again.asked == []
    assert sql("SELECT DISTINCT model_id FROM embeddings WHERE embedding IS NOT NULL") == [("other",)]


def test_an_embedder_of_another_model_is_refused_unless_that_is_meant(filled, settings):
    with pytest.raises(db.SchemaError, match="vectorkeep rebuild --model"):
        rebuild(settings, RebuildPlan(sources={"s1": lambda: items(2)}), Other())
    with pytest.raises(db.ValidationError, match="an embedder is needed"):
        rebuild(settings, RebuildPlan(new_model=True))


def test_a_row_that_cannot_be_embedded_stops_it(filled, settings, sql):
    sql("UPDATE embeddings SET text = '' WHERE id = 'own'")
    with pytest.raises(db.ValidationError, match="an empty text"):
        rebuild(settings, RebuildPlan(new_model=True), Other())


# -- back again ----------------------------------------------------------------------------------------


@pytest.mark.every_server
def test_a_rollback_brings_back_tables_and_model_and_can_be_undone(filled, settings, sql, database_url):
    before = sql(DOCUMENTS), sql(CHUNKS)
    rebuild(settings, RebuildPlan(new_model=True), Other())
    moved = sql(DOCUMENTS), sql(CHUNKS)
    ahead = forecast_rollback(settings)
    assert (ahead.model_id, ahead.lost.any, ahead.previous_bytes > 0) == ("counting", False, True)
    result = roll_back(settings)
    assert (result.model_id, result.documents) == ("counting", 43)
    assert (sql(DOCUMENTS), sql(CHUNKS)) == before
    command.check(alembic_config(database_url))
    assert filled.search("text number 7", 1)[0].id == "00007"  # the store that was open all the time
    roll_back(settings)
    assert (sql(DOCUMENTS), sql(CHUNKS)) == moved
    assert sql("SELECT model_id FROM embedding_models WHERE active") == [("other",)]
    command.check(alembic_config(database_url))


def test_a_rollback_would_lose_what_was_written_since_and_says_so(filled, settings, sql):
    rebuild(settings, RebuildPlan())
    filled.batch_upsert([{"id": "new", "text": "text"}, {"id": "00001", "text": "changed", "source_id": "s1"}])
    filled.delete(["00002"])
    lost = r"2 write transactions since the swap: 2 documents and 0 chunks written, \+0 documents and -1 chunks in all"
    with pytest.raises(db.ValidationError, match=lost + ".*--force"):
        roll_back(settings)
    assert sql("SELECT count(*) FROM embeddings WHERE id = 'new'") == [(1,)]
    assert filled.batch_upsert([{"id": "later", "text": "not paused any more"}]).inserted == 1
    roll_back(settings, force=True)
    assert sql("SELECT count(*) FROM embeddings WHERE id IN ('new', '00002', 'later')") == [(1,)]
    roll_back(settings)
    assert sql("SELECT count(*) FROM embeddings WHERE id IN ('new', '00002', 'later')") == [(2,)]


@pytest.mark.parametrize("alteration", ["ADD COLUMN team text", "ALTER COLUMN source_id TYPE varchar"])
def test_a_rollback_does_not_take_back_what_became_of_the_columns(filled, settings, sql, alteration):
    rebuild(settings, RebuildPlan())
    sql(f"ALTER TABLE embeddings {alteration}")
    with pytest.raises(db.SchemaError, match=r"other columns than the live ones: embeddings\.(team|source_id); alter"):
        roll_back(settings, force=True)
    assert filled.batch_upsert([{"id": "later", "text": "not paused any more"}]).inserted == 1
    sql(f"ALTER TABLE vectorkeep_previous.embeddings {alteration}")
    assert roll_back(settings, force=True).documents == 43


def test_cached_answers_end_with_a_rollback(filled, settings, embedder, until):
    rebuild(settings, RebuildPlan(sources={"s1": lambda: [{"id": "00001", "text": "other words"}]}), embedder)
    query = vector_of("text number 1")
    until(lambda: filled.search(query, 1).cached)  # each pooled connection learns first that the tables are others
    roll_back(settings)
    assert [(hit.id, hit.text) for hit in filled.search(query, 1)] == [("00001", "text number 1")]


def test_without_previous_tables_there_is_nothing_to_roll_back(filled, settings):
    for attempt in (roll_back, forecast_rollback):
        with pytest.raises(db.BusyError, match="no previous tables"):
            attempt(settings)


# -- what fails once the swap is committed -------------------------------------------------------------

RUNS = "SELECT state FROM rebuild_runs ORDER BY id"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_what_fails_after_the_swap_does_not_make_a_failure_of_it(filled, settings, sql, admin, monkeypatch, failure):
    """Else a rollback would take the record before for that of the tables, and search one model's with the other."""
    before = sql(DOCUMENTS)
    rebuild(settings, RebuildPlan(new_model=True), Other())
    second = sql(DOCUMENTS)

    def failing(self, logged):
        deliver(self, logged)
        raise failure

    deliver = OpenParts.after_commit
    monkeypatch.setattr(OpenParts, "after_commit", failing)
    with pytest.raises(KeyboardInterrupt) if failure is KeyboardInterrupt else nullcontext():
        rebuild(settings, RebuildPlan(new_model=True), Counting("third"))
    assert sql(RUNS) == [("swapped",)] * 2
    assert unfinished_rebuild(admin) is None
    assert current_pause(admin) is None
    with pytest.raises(KeyboardInterrupt) if failure is KeyboardInterrupt else nullcontext():
        roll_back(settings)
    assert sql(RUNS) == [("swapped",), ("swapped",), ("rolled back",)]
    assert sql(DOCUMENTS) == second != before
    assert sql("SELECT model_id FROM embedding_models WHERE active") == [("other",)]


def test_previous_tables_of_which_there_is_no_record_are_kept_and_not_rolled_back_to(filled, settings, sql, admin):
    rebuild(settings, RebuildPlan())
    rebuild(settings, RebuildPlan(new_model=True), Other())
    sql("UPDATE rebuild_runs SET state = 'failed' WHERE model_id = 'other'")
    with pytest.raises(db.BusyError, match="no record in rebuild_runs is of the tables in vectorkeep_previous"):
        roll_back(settings, force=True)
    assert sql("SELECT model_id FROM embedding_models WHERE active") == [("other",)]
    sql("DELETE FROM rebuild_runs")
    assert retire_previous(admin, 3600) == 0
    assert retire_previous(admin, 0) > 0


def test_a_run_that_has_ended_stays_what_it_is(admin, sql):
    run_id = begin_run(admin, None, {})
    end_run(admin, run_id, SWAPPED)
    end_run(admin, run_id, FAILED, reason="late")
    assert sql(RUNS) == [("swapped",)]
