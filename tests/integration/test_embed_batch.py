"""embed_batch: only what changed is embedded and written, and an interrupted run is finished by the next."""

import random

import numpy as np
import pytest

import db
from db import CallableEmbedder, Item, SchemaError, ValidationError, checked_batch, ingestion
from tests.integration.counting import Counting, counts, items, vector_of


def stored(sql):
    """All that is stored but for times."""
    return sql("""
        SELECT d.id, d.text, d.source_id, d.metadata, d.embedding::text, d.text_hash, d.content_hash, d.vector_hash,
               d.chunks_hash, d.model_id, c.id, c.text, c.embedding::text, c.metadata, c.source_id
        FROM embeddings AS d LEFT JOIN chunks AS c ON c.document_id = d.id ORDER BY d.id, c.chunk_index
    """)


# -- what is skipped -----------------------------------------------------------------------------------------


def test_a_run_with_some_changed_skips_exactly_the_others_and_equals_a_full_rewrite(embedding_store, embedder, sql):
    first = items(1200)
    assert counts(embedding_store.embed_batch(first)) == {"inserted": 1200, "embedded": 1200}
    choose = random.Random(7)
    changed = [dict(item) for item in first]
    for item in choose.sample(changed, 100):
        item["text"] += " changed"
    for item in choose.sample([i for i in changed if "changed" not in i["text"]], 60):
        item["metadata"] = {"n": "other"}
    asked = len(embedder.asked)
    result = embedding_store.embed_batch(changed, batch_size=333)
    assert counts(result) == {"updated": 160, "skipped": 1040, "embedded": 100}
    assert len(embedder.asked) - asked == 100
    incremental = stored(sql)
    embedding_store.delete([item["id"] for item in first])
    embedding_store.embed_batch(changed)
    assert incremental == stored(sql)
    assert len(incremental) == 1200


def test_an_equal_run_embeds_and_writes_nothing(embedding_store, embedder, sql):
    embedding_store.embed_batch(items(50))
    before = sql("SELECT id, xmin::text, ctid::text FROM embeddings ORDER BY id"), len(embedder.asked)
    result = embedding_store.embed_batch([Item(**item) for item in items(50)])
    assert counts(result) == {"skipped": 50}
    assert (sql("SELECT id, xmin::text, ctid::text FROM embeddings ORDER BY id"), len(embedder.asked)) == before


def test_other_metadata_or_source_alone_embeds_nothing_and_is_hot(database_url, redis_url, embedder, sql):
    with db.connect(database_url, redis_url, embedder=embedder, pool_max=2) as store:
        store.embed_batch(items(200))
        asked = len(embedder.asked)
        before = sql("SELECT id, embedding::text FROM embeddings ORDER BY id")
        changed = [{**item, "metadata": {"other": 1}} for item in items(200)[::10]]
        assert counts(store.embed_batch(changed)) == {"updated": 20}
        assert len(embedder.asked) == asked
        connections = [store.pool.getconn() for _ in range(2)]
        for connection in connections:
            connection.execute("SELECT pg_stat_force_next_flush()")
            store.pool.putconn(connection)
        assert sql("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'embeddings'") == [
            (20, 20)
        ]
        moved = [{**item, "source_id": "elsewhere"} for item in items(200)[:5]]
        assert counts(store.embed_batch(moved)) == {"updated": 5}
        assert len(embedder.asked) == asked
        assert sql("SELECT id, embedding::text FROM embeddings ORDER BY id") == before
        assert sql("SELECT count(*) FROM chunks WHERE source_id = 'elsewhere'") == [(5,)]


# -- texts, chunks and the vector cache ----------------------------------------------------------------------


def test_equal_texts_are_embedded_once(embedding_store, embedder):
    same = [{"id": f"{n}", "text": "the same"} for n in range(100)]
    assert counts(embedding_store.embed_batch(same)) == {"inserted": 100, "embedded": 1}
    assert embedder.asked == ["the same"]


def test_a_known_text_comes_from_the_vector_cache_even_after_deletion(embedding_store, embedder):
    embedding_store.embed_batch(items(20))
    embedding_store.delete([item["id"] for item in items(20)])
    result = embedding_store.embed_batch(items(25))
    assert counts(result) == {"inserted": 25, "cache_hits": 20, "embedded": 5}
    [document] = embedding_store.get(["00003"])
    assert document.embedding.tobytes() == vector_of("text number 3").tobytes()


def test_a_cached_vector_of_another_model_or_length_is_never_used(embedding_store, embedder, sql):
    embedding_store.embed_batch(items(10))
    embedding_store.delete([item["id"] for item in items(10)])
    sql("UPDATE vector_cache SET model_id = 'other' WHERE key IN (SELECT key FROM vector_cache ORDER BY key LIMIT 4)")
    sql("""
        UPDATE vector_cache SET embedding = '[1,2,3]'
        WHERE key IN (SELECT key FROM vector_cache ORDER BY key DESC LIMIT 3)
    """)
    assert counts(embedding_store.embed_batch(items(10))) == {"inserted": 10, "cache_hits": 3, "embedded": 7}
    assert sql("SELECT count(*) FROM vector_cache WHERE model_id = 'counting' AND vector_dims(embedding) = 16") == [
        (10,)
    ]


def test_a_long_text_is_chunked_and_its_vector_is_the_mean(embedding_store, embedder):
    text = " ".join(f"Sentence number {n} of a long text." for n in range(100))
    assert embedding_store.embed_batch([{"id": "long", "text": text}]).inserted == 1
    [document] = embedding_store.get(["long"])
    assert len(document.chunks) > 2
    for chunk in document.chunks:
        assert text[chunk.metadata["start"] : chunk.metadata["end"]] == chunk.text
        assert chunk.embedding.tobytes() == vector_of(chunk.text).tobytes()
    mean = np.average([c.embedding for c in document.chunks], axis=0, weights=[len(c.text) for c in document.chunks])
    assert document.embedding == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


def test_a_text_that_became_shorter_leaves_no_chunk_behind(embedding_store, sql):
    embedding_store.embed_batch([{"id": "a", "text": "A sentence of some length. " * 200}])
    assert sql("SELECT count(*) > 3 FROM chunks") == [(True,)]
    embedding_store.embed_batch([{"id": "a", "text": "Short."}])
    assert sql("SELECT text FROM chunks") == [("Short.",)]


# -- the same id again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 50])
@pytest.mark.parametrize("is_stored", [False, True], ids=["new", "stored"])
@pytest.mark.parametrize("texts", [["old", "new"], ["old", "other", "old"]], ids="-".join)
def test_a_vector_given_with_another_text_is_not_taken_for_the_texts_own(
    embedding_store, sql, batch_size, is_stored, texts
):
    if is_stored:
        embedding_store.batch_upsert([{"id": "a", "text": "stored", "embedding": vector_of("stored")}])
    versions = [{"id": "a", "text": text} for text in texts]
    versions[0]["embedding"] = vector_of("given")
    embedding_store.batch_upsert(versions, batch_size=batch_size)
    assert sql("SELECT text, model_id FROM embeddings") == [(texts[-1], None)]
    assert embedding_store.get(["a"])[0].embedding.tobytes() == vector_of("given").tobytes()
    assert counts(embedding_store.embed_batch(versions[-1:], batch_size=batch_size)) == {"updated": 1, "embedded": 1}
    assert embedding_store.get(["a"])[0].embedding.tobytes() == vector_of(texts[-1]).tobytes()


@pytest.mark.parametrize("batch_size", [1, 50])
def test_a_vector_given_with_the_same_text_stays_its_own(embedding_store, sql, batch_size):
    versions = [{"id": "a", "text": "x", "embedding": vector_of("x")}, {"id": "a", "text": "x", "metadata": {"n": 1}}]
    embedding_store.batch_upsert(versions, batch_size=batch_size)
    assert sql("SELECT text, model_id FROM embeddings") == [("x", "counting")]


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_the_last_one_of_an_id_wins_also_where_the_write_before_is_still_pending(embedding_store, sql, batch_size):
    versions = [{"id": f"{n % 2}", "text": f"version {n}", "metadata": {"v": n}} for n in range(12)]
    versions += [{"id": "0", "text": "version 10", "metadata": {"v": "last"}}]
    result = embedding_store.embed_batch(versions, batch_size=batch_size)
    assert (result.inserted, result.superseded, result.failed) == (2, 11, 0)
    zero, one = embedding_store.get(["0", "1"])
    assert (zero.text, zero.metadata, one.text) == ("version 10", {"v": "last"}, "version 11")
    assert zero.embedding.tobytes() == vector_of("version 10").tobytes()
    assert one.embedding.tobytes() == vector_of("version 11").tobytes()
    assert [c.text for c in zero.chunks] == ["version 10"]


def test_an_id_that_goes_back_to_an_earlier_text_has_that_texts_vector(embedding_store, sql):
    # The write of "y" takes its time: whoever looks meanwhile still finds "x", and would skip the last one.
    sql("CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.3); RETURN NEW; END $$")
    sql("CREATE TRIGGER slow BEFORE UPDATE ON embeddings FOR EACH ROW WHEN (NEW.text = 'y') EXECUTE FUNCTION slow()")
    versions = [{"id": "a", "text": text} for text in ("x", "y", "x")]
    assert counts(embedding_store.embed_batch(versions, batch_size=1))["superseded"] == 2
    [document] = embedding_store.get(["a"])
    assert (document.text, document.embedding.tobytes()) == ("x", vector_of("x").tobytes())


# -- models --------------------------------------------------------------------------------------------------


def test_another_model_or_length_than_the_stores_is_refused_before_anything_is_embedded(embedding_store):
    embedding_store.embed_batch(items(2))
    other = Counting("other")
    shorter = CallableEmbedder(lambda texts: [[1.0]] * len(texts), "counting", 1)
    for wrong in (other, shorter):
        with pytest.raises(SchemaError, match="vectors of two models cannot be compared"):
            embedding_store.embed_batch(items(2, "new"), embedder=wrong)
    assert other.asked == []


def test_a_store_without_an_embedder_says_so(store):
    with pytest.raises(ValidationError, match="the store has no embedder"):
        store.embed_batch(items(1))


def test_documents_without_a_vector_of_the_model_are_embedded(embedding_store, sql):
    embedding_store.batch_upsert([{"id": "00000", "text": "text number 0", "metadata": {"n": 0}, "source_id": "s0"}])
    assert counts(embedding_store.embed_batch(items(1))) == {"updated": 1, "embedded": 1}
    assert sql("SELECT model_id FROM embeddings") == [("counting",)]


def test_a_text_changed_without_its_vector_is_embedded_by_the_next_run(embedding_store):
    embedding_store.embed_batch([{"id": "a", "text": "old"}])
    assert embedding_store.batch_upsert([{"id": "a", "text": "new"}]).updated == 1
    assert embedding_store.get(["a"])[0].embedding.tobytes() == vector_of("old").tobytes()
    assert counts(embedding_store.embed_batch([{"id": "a", "text": "new"}])) == {"updated": 1, "embedded": 1}
    [document] = embedding_store.get(["a"])
    assert document.embedding.tobytes() == vector_of("new").tobytes()
    assert [c.text for c in document.chunks] == ["new"]
    assert counts(embedding_store.embed_batch([{"id": "a", "text": "new"}])) == {"skipped": 1}


def test_a_text_that_another_writer_changed_meanwhile_gets_a_vector_of_its_own(
    embedding_store, database_url, redis_url, monkeypatch
):
    """One run found that only metadata changed; before it writes, another has put another text and vector there."""
    embedding_store.embed_batch([{"id": "a", "text": "one"}])
    mine = [{"id": "a", "text": "one", "metadata": {"by": "me"}}]
    find_changed = ingestion.changed_items

    def and_then_another_writes(connection, *given):
        changed = find_changed(connection, *given)
        monkeypatch.undo()
        with db.connect(database_url, redis_url, embedder=Counting()) as other:
            other.embed_batch([{"id": "a", "text": "two"}])
        return changed

    monkeypatch.setattr(ingestion, "changed_items", and_then_another_writes)
    assert counts(embedding_store.embed_batch(mine)) == {"updated": 1, "cache_hits": 1}
    [document] = embedding_store.get(["a"])
    assert (document.text, document.embedding.tobytes()) == ("one", vector_of("one").tobytes())
    assert [c.text for c in document.chunks] == ["one"]
    assert counts(embedding_store.embed_batch(mine)) == {"skipped": 1}


@pytest.mark.parametrize("run", [1, 2, 100])
def test_an_id_that_comes_again_is_compared_by_its_last_text(embedding_store, monkeypatch, run):
    """The server compares one run of a batch while the next is checked: the earlier text was compared, too."""
    monkeypatch.setattr(checked_batch, "_RUN", run)
    embedding_store.embed_batch([{"id": "a", "text": "one"}, {"id": "b", "text": "one"}, {"id": "c", "text": "one"}])
    given = [("a", "two"), ("b", "one"), ("c", "one"), ("a", "one"), ("b", "two"), ("d", "one"), ("d", "two")]
    result = embedding_store.embed_batch([{"id": id_, "text": text} for id_, text in given])
    assert (result.skipped, result.updated, result.inserted, result.superseded) == (2, 1, 1, 3)
    assert result.cache_hits == 0, "nothing is looked up for a text that is stored"
    assert [d.text for d in embedding_store.get(["a", "b", "c", "d"])] == ["one", "two", "one", "two"]


def test_a_query_text_finds_what_was_embedded_from_it(embedding_store, embedder):
    embedding_store.embed_batch(items(30))
    asked = len(embedder.asked)
    assert embedding_store.search("text number 17", 1)[0].id == "00017"
    assert embedding_store.embed("text number 17").tobytes() == vector_of("text number 17").tobytes()
    assert len(embedder.asked) == asked


@pytest.mark.parametrize("call", ["embed_batch", "batch_upsert", "sync"])
def test_long_texts_travel_in_short_batches(embedding_store, monkeypatch, call):
    monkeypatch.setattr("db.tally.MAX_BATCH_CHARACTERS", 1000)
    given = [{"id": f"{n}", "text": f"{n} " * 200} for n in range(8)]
    done = []
    how = {"source_id": "s"} if call == "sync" else {}
    getattr(embedding_store, call)(given, on_progress=lambda processed, _: done.append(processed), **how)
    assert done == [3, 6, 8]
