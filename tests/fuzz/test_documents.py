"""Ids, texts, sources and metadata of any kind: each row is stored as it was given, or listed with the reason."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import db
from tests.fuzz.conftest import DIMENSIONS, examples
from tests.fuzz.strategies import (
    as_json,
    deep_list,
    is_key,
    is_metadata,
    is_text,
    json_like,
    metadata,
    mostly_texts,
    no_texts,
    same,
    texts,
)

VECTOR = [1.0] * DIMENSIONS
MEGABYTE = 2**20

rows = st.one_of(
    st.fixed_dictionaries({"id": mostly_texts, "text": mostly_texts}, optional={"source_id": mostly_texts}),
    st.fixed_dictionaries({"id": texts, "text": texts, "metadata": metadata}),
    st.fixed_dictionaries({"id": texts, "text": texts, "metadata": metadata}),
    st.fixed_dictionaries({"id": texts, "text": texts, "source_id": texts, "metadata": metadata}),
)
no_rows = st.one_of(no_texts, texts, st.dictionaries(texts, texts, min_size=1))


def is_valid(row):
    return (
        is_key(row["id"])
        and is_text(row["text"])
        and is_key(row.get("source_id", "batch"))
        and is_metadata(row.get("metadata", {}))
    )


def assert_stored(store, rows):
    """The last valid one of each id reads back equal."""
    last = {row["id"]: row for row in rows}
    read = {document.id: document for document in store.get(list(last))}
    assert read.keys() == last.keys()
    for id_, row in last.items():
        document = read[id_]
        assert (document.text, document.source_id) == (row["text"], row.get("source_id", "batch"))
        assert same(document.metadata, as_json(row.get("metadata", {}))), (document.metadata, row)


@examples(60)
@given(st.lists(rows, min_size=1, max_size=8), st.lists(no_rows, max_size=1))
def test_good_rows_are_stored_beside_bad_ones(store, report, given_rows, others):
    good = [row for row in given_rows if is_valid(row)]
    result = store.batch_upsert([*given_rows, *others])
    report.rows(result, len(good), len(given_rows) + len(others) - len(good))
    assert result.inserted + result.updated + result.unchanged + result.superseded == len(good)
    assert_stored(store, good)
    assert store.batch_upsert(good).updated == 0, "the same again is a change"
    report.accepted(len(good))


@examples(15)
@given(st.lists(rows, min_size=1, max_size=6), st.sampled_from(["embed_batch", "sync"]))
def test_good_items_are_embedded_beside_bad_ones(store, report, given_rows, call):
    if call == "sync":  # its own source counts, and an item without an id keeps it from deleting
        given_rows = [{**row, "source_id": "synced"} for row in given_rows if is_key(row["id"])]
        store.delete_by_source_id("synced")
    good = [row for row in given_rows if is_valid(row)]
    arguments = {"source_id": "synced", "allow_empty": True} if call == "sync" else {}
    result = getattr(store, call)(given_rows, **arguments)
    report.rows(result, len(good), len(given_rows) - len(good))
    assert_stored(store, good)
    report.accepted(len(good))


@examples(20)
@given(st.lists(st.one_of(no_texts, texts), min_size=1, max_size=3))
def test_a_sync_of_items_without_ids_deletes_nothing(store, report, ids):
    store.sync([{"id": "kept", "text": "t"}], source_id="s")
    items = [{"id": id_, "text": "other", "source_id": "s"} for id_ in ids]
    good = [item for item in items if is_key(item["id"])]
    report.tried(lambda: store.sync(items, source_id="s"), valid=len(good) == len(items))
    if len(good) == len(items):
        report.accepted()
        assert store.get(["kept"]) == []
    assert_stored(store, good)
    store.delete_by_source_id("s")


@examples(25)
@given(json_like, texts, st.lists(st.one_of(texts, no_texts), max_size=2))
def test_chunks_are_stored_as_given_or_refuse_their_document(store, report, value, key, chunk_texts):
    chunks = [{"text": text, "metadata": {key: value}} for text in chunk_texts]
    good = all(is_text(c["text"]) and is_metadata({"k": c["metadata"]}) for c in chunks)
    result = store.batch_upsert([{"id": "c", "text": "t", "chunks": chunks}])
    report.rows(result, good, not good)
    if good:
        [document] = store.get(["c"])
        assert [c.text for c in document.chunks] == [c["text"] for c in chunks]
        assert all(same(c.metadata, as_json({key: value})) for c in document.chunks)
        report.accepted()


@examples(25)
@given(st.one_of(st.lists(mostly_texts, max_size=3), no_texts, texts), st.sampled_from(["get", "delete"]))
def test_ids_to_read_or_delete_are_checked(store, report, ids, call):
    valid = isinstance(ids, list) and all(map(is_key, ids))
    found = report.tried(lambda: getattr(store, call)(ids), valid=valid)
    if valid:
        assert found == [] if call == "get" else found.deleted == 0
        report.accepted()


@pytest.mark.parametrize("part", ["text", "value", "key", "many keys", "long list"])
def test_a_megabyte_is_stored(store, report, part):
    filled = {
        "text": {},
        "value": {"v": "'\\%\"😀é" * (MEGABYTE // 12)},
        "key": {"k" * MEGABYTE: 1},
        "many keys": {f"key {n}": n for n in range(MEGABYTE // 16)},
        "long list": {"l": [n / 7 for n in range(MEGABYTE // 16)]},
    }
    row = {"id": "big", "text": "é" * MEGABYTE if part == "text" else "t", "metadata": filled[part]}
    report.rows(store.batch_upsert([{**row, "embedding": VECTOR}]), 1, 0)
    assert_stored(store, [row])
    [hit] = store.search(VECTOR, 1)
    again = store.search(VECTOR, 1)
    assert again.cached
    assert hit.metadata == again[0].metadata == filled[part]
    report.accepted()


@pytest.mark.parametrize(
    "chunks",
    [[{"text": "c", "chunks": deep_list(1)}], [deep_list(5000)], 5, "abc", {"text": "c"}, [None], itertools.count()],
)
def test_chunks_that_are_none_are_listed(store, report, chunks):
    report.rows(store.batch_upsert([{"id": "a", "text": "t", "chunks": chunks}]), 0, 1)


def test_chunks_within_chunks_are_refused_and_exhaust_no_stack(store, report):
    chunk = {"text": "c"}
    for _ in range(5000):
        chunk = {"text": "c", "chunks": [chunk]}
    report.rows(store.batch_upsert([{"id": "a", **chunk}]), 0, 1)


@pytest.mark.parametrize("value", [1e16, 1e23, 2.0**63, 12345678901234567890.0, -1e308, 1e16 + 2])
def test_a_large_float_is_itself_and_no_rounded_integer(store, report, value):
    row = {"id": "f", "text": "t", "metadata": {"n": value, "l": [{"n": value}]}}
    report.rows(store.batch_upsert([{**row, "embedding": VECTOR}]), 1, 0)
    assert_stored(store, [row])
    for search in (1, 2):
        hits = store.search(VECTOR, where={"n": int(value)} if abs(value) < 2**63 and search == 1 else {"n": value})
        assert [same(hit.metadata, row["metadata"]) for hit in hits] == [True]
    report.accepted()


def test_metadata_of_others_that_no_cache_takes_is_read_all_the_same(store, beside, report):
    report.rows(store.batch_upsert([{"id": "deep", "text": "t", "embedding": VECTOR}]), 1, 0)
    beside.execute("UPDATE embeddings SET metadata = %s", ('{"a":' * 900 + "1" + "}" * 900,))
    for _ in range(2):
        found = store.search(VECTOR, 1)[0].metadata
        for _ in range(900):
            found = found["a"]
        assert found == 1
    report.accepted()


def test_an_error_of_ours_is_what_is_counted(report):
    with pytest.raises(AssertionError, match="accepted"):
        report.tried(lambda: 1, valid=False)
    with pytest.raises(KeyError):
        report.tried(lambda: {}["a"], valid=False)
    with pytest.raises(AssertionError, match="does not say"):
        report.refused("bad")
    with pytest.raises(AssertionError):
        report.rows(db.UpsertResult(0, 0, 0, 0, 0, [], 0.0), 0, 1)
    report.counts.clear()
