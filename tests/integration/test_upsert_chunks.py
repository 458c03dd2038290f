"""Documents and their chunks: written together, moved together, and what a deletion detached found again."""

from datetime import UTC, datetime

import pytest

from db import Document, DocumentChunk

from .upserts import counts, doc, vector


def texts(store, id_):
    [document] = store.get([id_])
    return [chunk.text for chunk in document.chunks]


OLD = datetime(2001, 2, 3, tzinfo=UTC)
THREE = [{"text": "zero"}, {"text": "one", "embedding": vector(1)}, {"text": "two", "metadata": {"page": 2}}]


def test_chunks_read_back_in_order_with_their_ids(store):
    assert counts(store.batch_upsert([doc("a", chunks=THREE)])) == {"inserted": 1}
    [document] = store.get(["a"])
    assert [(c.id, c.index, c.text, dict(c.metadata)) for c in document.chunks] == [
        ("a#0", 0, "zero", {}),
        ("a#1", 1, "one", {}),
        ("a#2", 2, "two", {"page": 2}),
    ]
    assert [c.embedding is None for c in document.chunks] == [True, False, True]


def test_equal_chunks_change_nothing_and_absent_ones_stay(store):
    store.batch_upsert([doc("a", chunks=THREE)])
    assert counts(store.batch_upsert([doc("a", chunks=[DocumentChunk(**c) for c in THREE])])) == {"unchanged": 1}
    assert counts(store.batch_upsert([doc("a", chunks=None)])) == {"unchanged": 1}
    assert counts(store.batch_upsert([doc("a", "other")])) == {"updated": 1}
    assert texts(store, "a") == ["zero", "one", "two"]


def test_no_chunks_given_removes_them(store, sql):
    store.batch_upsert([doc("a", chunks=THREE), doc("b", chunks=THREE)])
    assert counts(store.batch_upsert([doc("a", chunks=())])) == {"updated": 1}
    assert texts(store, "a") == []
    assert counts(store.batch_upsert([doc("a", chunks=())])) == {"unchanged": 1}
    assert sql("SELECT count(*) FROM chunks WHERE document_id = 'b'") == [(3,)]


@pytest.mark.parametrize(
    "chunks",
    [
        THREE[:1],
        [*THREE, {"text": "three"}],
        [THREE[2], THREE[0]],
        [{"text": "zero"}, {"text": "one", "embedding": vector(2)}, {"text": "two", "metadata": {"page": 2}}],
        [{"text": "zero"}, {"text": "one"}, {"text": "two", "metadata": {"page": 3}}],
        [{"text": "zero"}, {"text": "ONE", "embedding": vector(1)}, {"text": "two"}],
    ],
    ids=["fewer", "more", "reordered", "other vector", "vector and metadata", "other text"],
)
def test_other_chunks_replace_the_stored_ones(store, chunks):
    store.batch_upsert([doc("a", chunks=THREE), doc("b", chunks=THREE)])
    assert counts(store.batch_upsert([doc("a", chunks=chunks), doc("b")])) == {"updated": 1, "unchanged": 1}
    stored = store.get(["a"])[0].chunks
    assert [(c.text, dict(c.metadata)) for c in stored] == [(c["text"], c.get("metadata", {})) for c in chunks]
    given = [c.get("embedding") for c in chunks]
    assert [None if c.embedding is None else c.embedding.tolist() for c in stored] == given
    assert texts(store, "b") == ["zero", "one", "two"]


def test_chunks_that_stay_equal_are_not_rewritten(store, sql):
    store.batch_upsert([doc("a", chunks=THREE)])
    before = dict(sql("SELECT id, xmin::text FROM chunks"))
    store.batch_upsert([doc("a", chunks=[*THREE[:2], {"text": "new"}])])
    after = dict(sql("SELECT id, xmin::text FROM chunks"))
    assert {id_ for id_ in before if after[id_] != before[id_]} == {"a#2"}


def test_chunks_move_with_their_document_and_every_place_is_logged(store, sql):
    metadata = {"workspace": "w1"}
    store.batch_upsert([doc("a", chunks=THREE, source_id="s1", metadata=metadata), doc("b", chunks=THREE)])
    store.batch_upsert([doc("a", source_id="s2", metadata={"workspace": "w2"})])
    assert sql("SELECT DISTINCT source_id, workspace FROM chunks WHERE document_id = 'a'") == [("s2", "w2")]
    assert sql("SELECT DISTINCT source_id, workspace FROM chunks WHERE document_id = 'b'") == [("batch", None)]
    [(tags,)] = sql("SELECT tags FROM write_log ORDER BY id DESC LIMIT 1")
    assert set(tags) == {"store", "source:s1", "source:s2", "workspace:w1", "workspace:w2"}
    store.batch_upsert([doc("a", chunks=THREE[:2], source_id="s3")])
    assert sql("SELECT DISTINCT source_id, workspace FROM chunks WHERE document_id = 'a'") == [("s3", None)]


# -- detached chunks -----------------------------------------------------------------------------------------


@pytest.fixture
def detached(store, sql):
    """A store in which the chunks of the deleted document `a` of source `old` are left."""
    store.batch_upsert([doc("a", chunks=THREE, source_id="old", metadata={"workspace": "w"})])
    store.delete_by_source_id("old", cascade=False)
    assert sql("SELECT DISTINCT document_id, origin_id FROM chunks") == [(None, "a")]
    return store


def test_a_document_that_comes_back_takes_its_detached_chunks_back(detached, sql):
    assert counts(detached.batch_upsert([doc("a", source_id="new")])) == {"inserted": 1}
    assert texts(detached, "a") == ["zero", "one", "two"]
    assert sql("SELECT DISTINCT source_id, workspace FROM chunks") == [("new", None)]


@pytest.mark.parametrize("chunks", [None, (), [{"text": "fresh"}]])
def test_what_happens_to_detached_chunks_is_logged_where_they_were(detached, sql, chunks):
    detached.batch_upsert([doc("a", source_id="new", chunks=chunks)])
    [(tags,)] = sql("SELECT tags FROM write_log ORDER BY id DESC LIMIT 1")
    assert set(tags) == {"store", "source:old", "source:new", "workspace:w"}


def test_a_cached_search_of_the_old_source_does_not_survive_the_taking_back(detached):
    search = {"k": 5, "level": "chunks", "source_id": "old"}
    assert [hit.id for hit in detached.search(vector(1), **search)] == ["a#1"]
    assert detached.search(vector(1), **search).cached
    detached.batch_upsert([doc("a", source_id="new")])
    assert [hit.id for hit in detached.search(vector(1), **search)] == []


def test_a_chunk_that_stands_at_another_place_than_its_id_says_is_made_anew(store, sql):
    store.batch_upsert([doc("a", chunks=[{"text": "one"}, {"text": "two"}])])
    sql("UPDATE chunks SET chunk_index = 7 WHERE id = 'a#1'")
    store.batch_upsert([doc("a", chunks=[{"text": "one", "metadata": {"n": 1}}, {"text": "two"}])])
    stored = sql("SELECT id, chunk_index, text, metadata FROM chunks ORDER BY id")
    assert stored == [("a#0", 0, "one", {"n": 1}), ("a#1", 1, "two", {})]


@pytest.mark.parametrize("chunks", [(), [{"text": "fresh"}]])
def test_detached_chunks_give_way_to_those_that_are_given(detached, sql, chunks):
    assert counts(detached.batch_upsert([doc("a", chunks=chunks)])) == {"inserted": 1}
    assert texts(detached, "a") == [c["text"] for c in chunks]
    assert sql("SELECT count(*) FROM chunks") == [(len(chunks),)]


def test_chunks_that_were_taken_back_can_be_removed(detached):
    detached.batch_upsert([doc("a")])
    assert counts(detached.batch_upsert([doc("a", chunks=())])) == {"updated": 1}
    assert texts(detached, "a") == []
    assert counts(detached.batch_upsert([doc("a", chunks=())])) == {"unchanged": 1}


@pytest.fixture
def left(store, sql):
    """A store with chunks of a document `a` that is gone, from before there was a key between them."""
    store.batch_upsert([doc("a", chunks=THREE, source_id="old", metadata={"workspace": "w"})])
    sql("ALTER TABLE chunks DROP CONSTRAINT chunks_document_id_fkey")
    sql("DELETE FROM embeddings")
    sql("""ALTER TABLE chunks ADD CONSTRAINT chunks_document_id_fkey
           FOREIGN KEY (document_id) REFERENCES embeddings (id) NOT VALID""")
    return store


@pytest.mark.parametrize("among", [(), ("b",)])
@pytest.mark.parametrize(("chunks", "after"), [((), []), ([{"text": "fresh"}], ["fresh"]), (None, None)])
def test_chunks_left_by_a_document_from_before_the_key_are_replaced_or_taken_back(left, sql, chunks, after, among):
    after = [chunk["text"] for chunk in THREE] if after is None else after
    given = [doc("a", chunks=chunks, source_id="new"), *(doc(id_, chunks=THREE) for id_ in among)]
    assert counts(left.batch_upsert(given)) == {"inserted": len(given)}
    assert texts(left, "a") == after
    assert (
        sql("SELECT DISTINCT source_id, workspace FROM chunks WHERE document_id = 'a'") == [("new", None)][: len(after)]
    )
    [(tags,)] = sql("SELECT tags FROM write_log ORDER BY id DESC LIMIT 1")
    assert {"source:old", "source:new", "workspace:w"} <= set(tags)
    assert counts(left.batch_upsert(given)) == {"unchanged": len(given)}
    assert sql("SELECT count(*) FROM chunks WHERE document_id = 'a'") == [(len(after),)]


def test_detached_chunks_of_other_documents_are_left_alone(detached, sql):
    detached.batch_upsert([doc("b", chunks=THREE), doc("a#1")])
    assert sql("SELECT count(*) FROM chunks WHERE document_id IS NULL") == [(3,)]


# -- all or nothing ------------------------------------------------------------------------------------------


@pytest.fixture
def no_poison(sql):
    """The server refuses any chunk whose text is `poison`."""
    sql("ALTER TABLE chunks ADD CONSTRAINT no_poison CHECK (text <> 'poison')")


def test_a_new_document_whose_chunk_is_refused_is_not_there_at_all(store, sql, no_poison):
    poisoned = doc("a", chunks=[{"text": "fine"}, {"text": "poison"}])
    result = store.batch_upsert([doc("b", chunks=THREE), poisoned, doc("c")])
    assert counts(result) == {"inserted": 2, "failed": 1}
    assert result.errors[0][0] == "a"
    assert sql("SELECT id FROM embeddings ORDER BY id") == [("b",), ("c",)]
    assert sql("SELECT DISTINCT document_id FROM chunks") == [("b",)]


def test_a_stored_document_whose_new_chunk_is_refused_stays_as_it_was(store, no_poison):
    store.batch_upsert([Document("a", "old", vector(1), {"v": 1}, chunks=[DocumentChunk("old chunk")])])
    before = store.get(["a"])
    result = store.batch_upsert([Document("a", "new", vector(2), {"v": 2}, chunks=[DocumentChunk("poison")])])
    assert counts(result) == {"failed": 1}
    after = store.get(["a"])
    assert repr(after) == repr(before)


def test_a_document_never_takes_a_chunk_id_of_another(store, sql):
    store.batch_upsert([doc("owner", chunks=[{"text": "mine"}])])
    sql("UPDATE chunks SET id = 'a#0'")
    result = store.batch_upsert([doc("a", chunks=[{"text": "theirs"}]), doc("b")])
    assert counts(result) == {"inserted": 1, "failed": 1}
    assert sql("SELECT document_id, text FROM chunks") == [("owner", "mine")]


def test_writing_works_under_row_level_security(store, sql):
    [(name,)] = sql("SELECT current_database()")
    role = f"{name}_tenant"
    sql(f"CREATE ROLE {role}")
    try:
        for table in ("embeddings", "chunks"):
            sql(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            sql(f"CREATE POLICY everything ON {table} USING (true)")
        sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} SET role = {role}")
        store.pool.drain()
        assert counts(store.batch_upsert([doc("a", chunks=THREE), doc("b")])) == {"inserted": 2}
        assert counts(store.batch_upsert([doc("a", chunks=THREE[:1]), doc("b", "other")])) == {"updated": 2}
        assert texts(store, "a") == ["zero"]
    finally:
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} RESET role")
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")


@pytest.mark.parametrize("batch_size", [1, 10])
def test_parts_that_the_last_version_leaves_out_stay_from_the_one_before(store, batch_size):
    versions = [
        doc("a", "1", embedding=vector(1), chunks=THREE, created_at=OLD),
        doc("a", "2"),
        doc("a", "3", embedding=vector(3)),
        doc("a", "4"),
    ]
    assert counts(store.batch_upsert(versions, batch_size=batch_size)) == {"inserted": 1, "superseded": 3}
    [stored] = store.get(["a"])
    assert (stored.text, stored.embedding.tolist(), stored.created_at) == ("4", vector(3), OLD)
    assert texts(store, "a") == ["zero", "one", "two"]
