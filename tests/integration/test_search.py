"""Search against NumPy: the same rows, in the same order, at the same distances, whichever way they were found."""

import numpy as np
import psycopg
import pytest

import db
from db.errors import DimensionError, SchemaError, ValidationError
from db.filters import Filter
from db.index_facts import gather
from db.search import Query, Searcher

D = 8
ROWS = 3000


def distances(distance, vectors, query):
    """What a store calls the distance of each vector, computed in float64."""
    vectors, query = vectors.astype(np.float64), np.asarray(query, dtype=np.float64)
    if distance == "l2":
        return np.linalg.norm(vectors - query, axis=1)
    if distance == "inner_product":
        return -(vectors @ query)
    return 1 - (vectors @ query) / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))


def score(distance, value):
    return 1 - value if distance == "cosine" else -value


def documents(vectors):
    return [
        {"id": f"d{n:05}", "text": f"text {n}", "embedding": v, "metadata": {"n": n}} for n, v in enumerate(vectors)
    ]


def ids(result):
    return [hit.id for hit in result]


@pytest.fixture
def open_store(database_url):
    stores = []

    def connect(**settings):
        given = {"model_id": "test-model", "dimensions": D, "pool_max": 1, **settings}
        stores.append(db.connect(database_url, False, **given))
        return stores[-1]

    yield connect
    for store in stores:
        store.close()


@pytest.fixture
def analyzed(admin):
    return lambda: admin.execute("ANALYZE embeddings, chunks")


def scans(store, admin, index="embeddings_vector_idx"):
    """How often an index was scanned. The store has one connection, which tells its counts when asked to."""
    with store.pool.connection() as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
    [(count,)] = admin.execute("SELECT idx_scan FROM pg_stat_all_indexes WHERE indexrelname = %s", (index,)).fetchall()
    return count


@pytest.mark.every_server
@pytest.mark.parametrize("level", ["documents", "chunks"])
@pytest.mark.parametrize("distance", ["cosine", "l2", "inner_product"])
def test_order_distance_and_score_are_numpys(open_store, distance, level):
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((60, D)).astype(np.float32)
    store = open_store(distance=distance)
    rows = documents(vectors)
    if level == "chunks":
        rows = [
            {"id": r["id"], "text": r["text"], "chunks": [{"text": "c", "embedding": r["embedding"]}]} for r in rows
        ]
    assert store.batch_upsert(rows).inserted == 60
    for query in rng.standard_normal((5, D)).astype(np.float32):
        expected = distances(distance, vectors, query)
        nearest = np.argsort(expected)[:10]
        result = store.search(query, 10, level=level)
        assert [hit.document_id for hit in result] == [f"d{n:05}" for n in nearest]
        assert [hit.distance for hit in result] == pytest.approx(expected[nearest], abs=1e-5)
        assert [hit.score for hit in result] == pytest.approx(score(distance, expected[nearest]), abs=1e-5)
        assert (result.exact, result.complete) == (True, True)


@pytest.mark.parametrize("distance", ["cosine", "l2", "inner_product"])
def test_a_large_store_uses_its_index_and_finds_what_numpy_finds(open_store, admin, analyzed, distance):
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((ROWS, D)).astype(np.float32)
    if distance == "cosine":
        vectors[::3] *= 1e-9
    store = open_store(distance=distance)
    store.batch_upsert(documents(vectors))
    analyzed()
    found = 0
    queries = rng.standard_normal((20, D)).astype(np.float32)
    for query in queries:
        expected = distances(distance, vectors, query)
        nearest = np.argsort(expected)[:10]
        result = store.search(query, 10)
        assert not result.exact
        assert [hit.distance for hit in result] == sorted(hit.distance for hit in result)
        assert [hit.distance for hit in result] == pytest.approx(
            [expected[int(hit.id[1:])] for hit in result], abs=1e-5
        )
        found += len(set(ids(result)) & {f"d{n:05}" for n in nearest})
        assert ids(store.search(query, 10, exact=True)) == [f"d{n:05}" for n in nearest]
    assert found / 200 >= 0.95
    assert scans(store, admin) == 20  # far more than five runs: a prepared plan is in use by then


def test_a_filter_on_metadata_is_searched_by_the_index_too(open_store, admin, analyzed):
    vectors = np.random.default_rng(3).standard_normal((ROWS, D)).astype(np.float32)
    store = open_store()
    store.batch_upsert([{**d, "metadata": {"even": n % 2 == 0}, "chunks": [{"text": "c", "embedding": d["embedding"]}]}
                        for n, d in enumerate(documents(vectors))])  # fmt: skip
    analyzed()
    for level in ("documents", "chunks"):
        result = store.search(vectors[0], 10, where={"even": True}, level=level)
        assert not result.exact
        assert result[0].document_id == "d00000"
        assert all(int(hit.document_id[1:]) % 2 == 0 for hit in result)
    assert scans(store, admin) == 1
    assert scans(store, admin, "chunks_vector_idx") == 1


def test_the_settings_of_a_scan_end_with_its_transaction(open_store, analyzed):
    vectors = np.random.default_rng(3).standard_normal((1500, D)).astype(np.float32)
    store = open_store(ef_search=77)
    store.batch_upsert(documents(vectors))
    analyzed()
    names = ("hnsw.ef_search", "hnsw.iterative_scan", "hnsw.max_scan_tuples")

    def shown():
        with store.pool.connection() as connection:
            return [connection.execute(f"SELECT current_setting('{n}')").fetchone()[0] for n in names]

    before = shown()
    assert not store.search(vectors[0], 5, ef_search=99).exact
    assert shown() == before == ["40", "off", "20000"]


@pytest.mark.parametrize("state", ["no index", "invalid index"])
def test_without_a_valid_index_every_row_is_compared(open_store, admin, analyzed, state):
    vectors = np.random.default_rng(3).standard_normal((1500, D)).astype(np.float32)
    store = open_store()
    store.batch_upsert(documents(vectors))
    analyzed()
    assert not store.search(vectors[5], 3).exact
    if state == "no index":
        admin.execute("DROP INDEX embeddings_vector_idx")
    else:
        admin.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embeddings_vector_idx'::regclass")
    result = store.search(vectors[5], 3)
    assert result.exact
    assert ids(result)[0] == "d00005"


def test_an_index_that_is_exchanged_after_the_snapshot_was_taken_is_valid_in_it(open_store, admin, analyzed):
    """As REINDEX CONCURRENTLY does at its end: the name goes to one that was not valid before."""
    vectors = np.random.default_rng(3).standard_normal((1500, D)).astype(np.float32)
    store = open_store()
    store.batch_upsert(documents(vectors))
    analyzed()
    [(definition,)] = admin.execute("SELECT pg_get_indexdef('embeddings_vector_idx'::regclass)").fetchall()
    admin.execute(definition.replace("embeddings_vector_idx", "next_idx"))
    set_valid = "UPDATE pg_index SET indisvalid = %s WHERE indexrelid = %s::regclass"
    admin.execute(set_valid, (False, "next_idx"))
    with store.pool.connection() as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with connection.transaction():
            connection.execute("SELECT FROM pg_class LIMIT 1")
            with admin.transaction():
                admin.execute("ALTER INDEX embeddings_vector_idx RENAME TO former_idx")
                admin.execute("ALTER INDEX next_idx RENAME TO embeddings_vector_idx")
                admin.execute(set_valid, (False, "former_idx"))
                admin.execute(set_valid, (True, "embeddings_vector_idx"))
            query = Query(vectors[5], 3, "documents", Filter(), 100, False)
            assert not Searcher().search(connection, query, store.model).result.exact
            assert gather(connection, store.model, "documents", {}).server.valid
        connection.isolation_level = None


@pytest.mark.parametrize("scale", [1e-9, 1e-30, 1e30])
def test_vectors_of_any_length_are_found_by_their_direction(store, scale):
    vectors = np.random.default_rng(1).standard_normal((30, D)).astype(np.float32)
    scaled = vectors.copy()
    scaled[::2] *= np.float32(scale)
    store.batch_upsert(documents(scaled))
    for query in (vectors[4], vectors[4] * np.float32(scale)):
        result = store.search(query, 5)
        assert ids(result) == [f"d{n:05}" for n in np.argsort(distances("cosine", vectors, query))[:5]]
        assert result[0].distance == pytest.approx(0, abs=1e-6)


def test_equal_distances_come_in_order_of_id(store):
    store.batch_upsert([{"id": id_, "text": "t", "embedding": [1.0] * D} for id_ in "dbeac"])
    assert ids(store.search([1.0] * D, 3)) == ["a", "b", "c"]
    assert ids(store.search([1.0] * D, 3, exact=True)) == ["a", "b", "c"]


def test_k_beyond_what_is_there_gives_all_and_says_so(store):
    assert list(store.search([1.0] * D, 5)) == []
    store.batch_upsert(documents(np.eye(D, dtype=np.float32)))
    result = store.search([1.0] * D, 10_000)
    assert (len(result), result.complete, result.exact) == (D, True, True)
    assert store.search([1.0] * D, 1).complete


@pytest.mark.parametrize("k", [0, -1, 10_001, 10**9, True, 2.0])
def test_k_out_of_bounds_is_refused(store, k):
    store.batch_upsert(documents(np.eye(D, dtype=np.float32)))
    with pytest.raises(ValidationError, match="k is"):
        store.search([1.0] * D, k)


def test_a_store_without_a_model_has_nothing_to_find(database_url):
    with db.connect(database_url, False) as store:
        result = store.search([1.0, 2.0], 5)
        assert (len(result), result.complete, result.cached) == (0, True, False)


@pytest.mark.parametrize("exact", [False, True])
def test_a_stored_vector_of_another_length_is_named_with_the_remedy(store, admin, exact):
    store.batch_upsert(documents(np.eye(D, dtype=np.float32)))
    admin.execute("DROP INDEX embeddings_vector_idx; UPDATE embeddings SET embedding = '[1,2]' WHERE id = 'd00003'")
    with pytest.raises(SchemaError, match="length is not the 8 of the store's model test-model; 'vectorkeep doctor'"):
        store.search([1.0] * D, exact=exact)


@pytest.mark.parametrize("query", [[1.0] * 7, [1.0] * 9, np.ones(1)])
def test_a_query_of_another_dimension_names_both(store, query):
    store.batch_upsert(documents(np.eye(D, dtype=np.float32)))
    with pytest.raises(DimensionError, match=f"{len(query)} dimensions, the store expects 8"):
        store.search(query)


@pytest.mark.parametrize("query", [[0.0] * D, [np.nan] * D, [np.inf] * D, [[1.0] * D], ["a"] * D, []])
def test_a_query_that_nothing_is_near_to_is_refused(store, query):
    store.batch_upsert(documents(np.eye(D, dtype=np.float32)))
    with pytest.raises(ValidationError):
        store.search(query)


def test_a_text_is_embedded_by_the_stores_embedder(database_url):
    embedder = db.CallableEmbedder(lambda texts: [[len(t), 1.0, 0.0] for t in texts], "length", 3)
    with db.connect(database_url, False, embedder=embedder) as store:
        store.embed_batch([{"id": "short", "text": "abc"}, {"id": "long", "text": "abc" * 30}])
        assert ids(store.search("xyz", 2)) == ["short", "long"]
    with db.connect(database_url, False) as store, pytest.raises(ValidationError, match="no embedder"):
        store.search("xyz")


def test_chunks_are_read_over_their_documents(store):
    chunks = [{"text": "one", "embedding": [1.0] * D, "metadata": {"page": 1, "lang": "de"}}, {"text": "no vector"}]
    metadata = {"lang": "en", "title": "T", "workspace": "w"}
    store.batch_upsert([{"id": "d", "text": "whole", "source_id": "s", "metadata": metadata, "chunks": chunks}])
    [hit] = store.search([1.0] * D, 5, level="chunks")
    assert (hit.id, hit.document_id, hit.source_id, hit.text) == ("d#0", "d", "s", "one")
    assert dict(hit.metadata) == {**metadata, "page": 1, "lang": "de"}
    for where, count in (({"lang": "de"}, 1), ({"lang": "en"}, 0), ({"title": "T"}, 1), ({"page": {"$gt": 1}}, 0)):
        assert len(store.search([1.0] * D, 5, level="chunks", where=where)) == count
    assert len(store.search([1.0] * D, 5, level="chunks", workspace="w", source_id="s")) == 1
    assert list(store.search([1.0] * D, 5)) == []


def test_detached_chunks_are_found_under_their_old_document(store):
    chunk = {"text": "one", "embedding": [1.0] * D, "metadata": {"page": 1}}
    store.batch_upsert([{"id": "d", "text": "whole", "source_id": "s", "metadata": {"title": "T"}, "chunks": [chunk]}])
    store.delete_by_source_id("s", cascade=False)
    [hit] = store.search([1.0] * D, 5, level="chunks", where={"title": {"$exists": False}})
    assert (hit.id, hit.document_id, dict(hit.metadata)) == ("d#0", "d", {"page": 1})


@pytest.mark.parametrize("unit", ["documents", "chunks"])
def test_an_exact_search_never_uses_the_vector_index(open_store, admin, analyzed, unit):
    vectors = np.random.default_rng(3).standard_normal((1500, D)).astype(np.float32)
    store = open_store()
    store.batch_upsert([{**d, "chunks": [{"text": "c", "embedding": d["embedding"]}]} for d in documents(vectors)])
    analyzed()
    for n in range(12):  # past the five runs after which a statement is prepared
        assert store.search(vectors[n], 3, exact=True, level=unit)[0].document_id == f"d{n:05}"
    assert scans(store, admin, f"{'embeddings' if unit == 'documents' else 'chunks'}_vector_idx") == 0


def test_a_server_that_is_gone_is_reported_as_unavailable(database_url, admin):
    store = db.connect(database_url, False, model_id="test-model", dimensions=D, statement_timeout_s=1)
    with store, psycopg.connect(database_url) as blocker:
        store.batch_upsert(documents(np.eye(D, dtype=np.float32)))
        blocker.execute("LOCK TABLE embeddings IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(db.UnavailableError, match="statement timeout"):
            store.search([1.0] * D)
