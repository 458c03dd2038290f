"""What is accepted as a document, why the rest is not, and when two documents are the same."""

from dataclasses import asdict, replace
from datetime import UTC, datetime
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from db import vectors
from db.documents import MAX_KEY_BYTES, as_document, as_item, canonical_metadata, hash_item, prepare
from db.embedding_model import Model
from db.errors import DimensionError, ValidationError
from db.types import Document, DocumentChunk, Item


class Codec:
    """What a store's model asks of vectors, without a server."""

    model_id = "test-model"
    model = Model("test-model", 3, "cosine")

    def encode(self, value):
        vector = vectors.as_vector(value)
        self.model.check(vector)
        return vectors.encode(vector)


CODEC = Codec()
GOOD = {"id": "a", "text": "hello"}


def prepared(**parts):
    return prepare({**GOOD, **parts}, CODEC)


def reason_of(**parts):
    with pytest.raises(ValidationError) as refused:
        prepared(**parts)
    return str(refused.value)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"id": ""}, "id is ''; expected a string that is not empty"),
        ({"id": 7}, "id is 7; expected a string that is not empty"),
        ({"id": None}, "id is None; expected a string that is not empty"),
        ({"id": "a\0b"}, "id has a NUL character, which PostgreSQL cannot store; remove it"),
        ({"id": "a\ud800"}, "id has a lone surrogate at 1; it is not valid text"),
        ({"source_id": ""}, "source_id is ''; expected a string that is not empty"),
        ({"source_id": None}, "source_id is None; expected a string that is not empty"),
        ({"text": ""}, "text is ''; expected a string that is not empty"),
        ({"text": b"x"}, "text is b'x'; expected a string that is not empty"),
        ({"text": "x\0"}, "text has a NUL character, which PostgreSQL cannot store; remove it"),
        ({"text": "\udfff"}, "text has a lone surrogate at 0; it is not valid text"),
        ({"metadata": None}, "metadata is None; expected an object"),
        ({"metadata": [1]}, "metadata is [1]; expected an object"),
        ({"metadata": "x"}, "metadata is 'x'; expected an object"),
        ({"metadata": {"a": {1: 2}}}, "metadata['a'] has the key 1; expected strings as keys"),
        ({"metadata": {"a": [0, {2}]}}, "metadata['a'][1] is a set, which is not JSON-serializable"),
        ({"metadata": {"a": float("nan")}}, "metadata['a'] is nan; JSON has no such number"),
        ({"metadata": {"a": [float("-inf")]}}, "metadata['a'][0] is -inf; JSON has no such number"),
        ({"metadata": {"a": datetime(2024, 1, 1)}}, "metadata['a'] is a datetime, which is not JSON-serializable"),
        (
            {"metadata": {"a": "\0"}},
            "metadata['a'] has text that has a NUL character, which PostgreSQL cannot store; remove it",
        ),
        ({"metadata": {"\ud800": 1}}, "metadata has text that has a lone surrogate at 0; it is not valid text"),
        ({"metadata": {"n": 2**64}}, "metadata['n'] is an integer beyond 64 bits; write it as a string"),
        ({"metadata": {"workspace": 3}}, "metadata['workspace'] is 3; expected a string that is not empty"),
        ({"metadata": {"workspace": None}}, "metadata['workspace'] is None; expected a string that is not empty"),
        ({"metadata": {"workspace": ""}}, "metadata['workspace'] is ''; expected a string that is not empty"),
        ({"created_at": "2024"}, "created_at is '2024'; expected a datetime with a time zone"),
        ({"updated_at": datetime(2024, 1, 1)}, "expected a datetime with a time zone"),
        ({"chunks": "abc"}, "chunks is 'abc'; expected a sequence of chunks"),
        ({"chunks": {"text": "c"}}, "expected a sequence of chunks"),
        ({"chunks": iter([])}, "expected a sequence of chunks"),
        ({"chunks": [{"text": "c"}, {"text": ""}]}, "chunk 1: text is ''; expected a string that is not empty"),
        ({"chunks": [{"txt": "c"}]}, "chunk 0: text is missing"),
        ({"chunks": [3]}, "chunk 0: got a int; expected a DocumentChunk or a mapping"),
        ({"chunks": [{"text": "c", "metadata": {"x": float("nan")}}]}, "chunk 0: metadata['x'] is nan"),
        ({"embedding": [0, 0, 0]}, "vector is all zeros; cosine distance needs a direction"),
        ({"embedding": [1, float("nan"), 0]}, "vector has components that are NaN, infinite or beyond float32"),
        ({"embedding": [1, 2]}, "vector has 2 dimensions, the store expects 3; embed with the store's model"),
        ({"chunks": [{"text": "c", "embedding": [1]}]}, "chunk 0: vector has 1 dimensions, the store expects 3"),
        ({"embeding": [1, 2, 3]}, "unknown key 'embeding'; expected some of id, text, embedding, metadata, source_id"),
    ],
)
def test_a_bad_part_is_refused_with_its_value_and_what_was_expected(parts, reason):
    assert reason in reason_of(**parts)


def test_a_wrong_dimension_is_told_apart_even_inside_a_chunk():
    with pytest.raises(DimensionError):
        prepared(embedding=[1, 2])
    with pytest.raises(DimensionError):
        prepared(chunks=[{"text": "c", "embedding": [1, 2]}])


@pytest.mark.parametrize("name", ["id", "source_id"])
def test_keys_are_limited_in_bytes_not_in_characters(name):
    fits, too_long = "é" * (MAX_KEY_BYTES // 2), "é" * (MAX_KEY_BYTES // 2) + "x"
    assert getattr(prepared(**{name: fits}), name) == fits
    assert reason_of(**{name: too_long}) == f"{name} has 1025 bytes; expected at most 1024"


def test_a_workspace_is_limited_in_bytes_too():
    assert "1026 bytes" in reason_of(metadata={"workspace": "é" * 513})


def test_a_long_value_is_cut_in_the_message():
    assert len(reason_of(metadata="x" * 10_000)) < 120


def test_nesting_as_deep_as_json_is_read_is_accepted_and_deeper_is_refused():
    def nested(levels):
        value = {}
        for _ in range(levels):
            value = {"a": value}
        return value

    assert prepared(metadata=nested(100))
    assert reason_of(metadata=nested(101)) == (
        "metadata['a']['a']['a']['a']['a'][…] is nested deeper than 100 levels; nest it less, or write it as a string"
    )
    assert "nested deeper" in reason_of(metadata=nested(5000))


def test_metadata_that_holds_itself_is_refused():
    loop: dict = {}
    loop["loop"] = loop
    assert "nested deeper" in reason_of(metadata=loop)


@pytest.mark.parametrize("number", [2**63, -(2**63), 2**64 - 1, 1e308, 5e-324, 0, True])
def test_numbers_that_read_back_as_written_are_accepted(number):
    assert prepared(metadata={"n": number})


@pytest.mark.parametrize("kind", ["document", "item"])
def test_a_mapping_needs_id_and_text(kind):
    convert = as_document if kind == "document" else as_item
    with pytest.raises(ValidationError, match="id is missing"):
        convert({"text": "x"})
    with pytest.raises(ValidationError, match="text is missing"):
        convert({"id": "x"})
    with pytest.raises(ValidationError, match="got a list; expected"):
        convert(["x"])


def test_an_item_has_no_vector():
    with pytest.raises(
        ValidationError, match="unknown key 'embedding'; expected some of id, text, metadata, source_id"
    ):
        as_item({**GOOD, "embedding": [1]})


def test_what_was_absent_stays_absent_in_a_copy():
    absent, removed, filled = (Document("a", "text", **e) for e in ({}, {"embedding": None}, {"embedding": [1.0]}))
    for copied in (lambda d: replace(d, text="other"), lambda d: as_document(asdict(d))):
        assert [copied(d).embedding_given for d in (absent, removed, filled)] == [False, True, True]
    assert replace(absent, embedding=[1.0]).embedding_given


def test_a_mapping_and_a_document_mean_the_same():
    parts = {"embedding": [1, 0, 0], "metadata": {"k": 1}, "source_id": "s", "chunks": [{"text": "c"}]}
    as_class = Document("a", "hello", [1, 0, 0], {"k": 1}, "s", [DocumentChunk("c")])
    assert prepare(as_class, CODEC) == prepared(**parts)


def test_any_mapping_is_a_mapping():
    read_only = MappingProxyType({**GOOD, "metadata": MappingProxyType({"a": MappingProxyType({"b": 1})})})
    assert prepare(read_only, CODEC).metadata == b'{"a":{"b":1}}'


# -- absent, None, empty ---------------------------------------------------------------------------------


def test_an_absent_embedding_differs_from_none():
    absent, removed = prepared(), prepared(embedding=None)
    assert (absent.vector_given, removed.vector_given) == (False, True)
    assert absent.vector is removed.vector is None
    assert Document("a", "t").embedding is None


def test_absent_chunks_differ_from_no_chunks():
    assert prepared().chunks is None
    assert prepared(chunks=None).chunks is None
    assert prepared(chunks=()).chunks == ()


def test_chunks_are_numbered_and_named_after_their_document():
    chunks = prepared(chunks=[{"text": "x"}, {"text": "y", "id": "ignored", "index": 9}]).chunks
    assert [(c.id, c.index, c.text) for c in chunks] == [("a#0", 0, "x"), ("a#1", 1, "y")]


# -- hashes ----------------------------------------------------------------------------------------------

HASHES = ("content_hash", "vector_hash", "chunks_hash", "text_hash")


def hashes(**parts):
    document = prepared(**parts)
    return {name: getattr(document, name) for name in HASHES}


def test_the_order_of_keys_changes_no_hash():
    one = {"a": 1, "b": {"c": [1, {"x": 1, "y": 2}], "d": None}}
    other = {"b": {"d": None, "c": [1, {"y": 2, "x": 1}]}, "a": 1}
    assert hashes(metadata=one, chunks=[{"text": "c", "metadata": one}]) == hashes(
        metadata=other, chunks=[{"text": "c", "metadata": other}]
    )


@pytest.mark.parametrize(
    "same", [[1.0, 0.5, 0.0], (1, 0.5, 0), np.array([1, 0.5, 0]), np.array([1, 0.5, 0], np.float16)]
)
def test_equal_vectors_of_any_type_have_equal_hashes(same):
    assert hashes(embedding=same) == hashes(embedding=np.array([1, 0.5, 0], np.float32))


def test_times_are_no_part_of_any_hash():
    assert hashes(created_at=datetime(2020, 1, 1, tzinfo=UTC), updated_at=datetime(2021, 1, 1, tzinfo=UTC)) == hashes()


@pytest.mark.parametrize(
    ("one", "other", "differing"),
    [
        ({"text": "x"}, {"text": "y"}, {"content_hash", "text_hash"}),
        ({"source_id": "x"}, {"source_id": "y"}, {"content_hash"}),
        ({"metadata": {"a": 1}}, {"metadata": {"a": 2}}, {"content_hash"}),
        ({"metadata": {"a": 1}}, {"metadata": {"a": "1"}}, {"content_hash"}),
        ({"metadata": {"a": 1}}, {"metadata": {"a": True}}, {"content_hash"}),
        ({"metadata": {"a": None}}, {"metadata": {}}, {"content_hash"}),
        ({"metadata": {"a": [1, 2]}}, {"metadata": {"a": [2, 1]}}, {"content_hash"}),
        ({"embedding": [1, 0, 0]}, {"embedding": [1, 0, 1e-30]}, {"vector_hash"}),
        ({"embedding": [1, 0, 0]}, {"embedding": None}, {"vector_hash"}),
        ({"chunks": [{"text": "ab"}]}, {"chunks": [{"text": "a"}, {"text": "b"}]}, {"chunks_hash"}),
        ({"chunks": [{"text": "a"}]}, {"chunks": [{"text": "a", "embedding": [1, 0, 0]}]}, {"chunks_hash"}),
        ({"chunks": [{"text": "a"}]}, {"chunks": [{"text": "a", "metadata": {"k": 1}}]}, {"chunks_hash"}),
        ({"chunks": [{"text": "a"}]}, {"chunks": []}, {"chunks_hash"}),
    ],
)
def test_each_part_has_the_hash_that_tells_it(one, other, differing):
    first, second = hashes(**one), hashes(**other)
    assert {name for name in HASHES if first[name] != second[name]} == differing


def test_source_and_metadata_do_not_run_into_each_other():
    one = hash_item(Item("a", "t", {"b": 1}, "s"))
    other = hash_item(Item("a", "t", {}, 's{"b":1}'))
    assert one.content_hash != other.content_hash


def test_a_vector_of_another_model_has_another_hash():
    class Other(Codec):
        model_id = "other-model"

    document = {**GOOD, "embedding": [1, 0, 0]}
    assert prepare(document, CODEC).vector_hash != prepare(document, Other()).vector_hash


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text("abcd", max_size=2), json_values, max_size=4), st.randoms())
def test_canonical_metadata_depends_on_the_content_alone(metadata, random):
    keys = list(metadata)
    random.shuffle(keys)
    assert canonical_metadata({key: metadata[key] for key in keys}) == canonical_metadata(metadata)
