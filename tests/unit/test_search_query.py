import dataclasses

import numpy as np
import pytest

from db.embedding_model import Model
from db.errors import ValidationError
from db.filters import Filter
from db.reading import cache_key
from db.search import MAX_K, Query

MODEL = Model("m", 4, "cosine")
VECTOR = np.array([1, 2, 3, 4], dtype=np.float32)


def query(**changed):
    given = {"vector": VECTOR, "k": 10, "level": "documents", "filter": Filter(), "ef_search": 100, "exact": False}
    return Query(**{**given, **changed})


@pytest.mark.parametrize("k", [0, -1, MAX_K + 1, 10**9, 1.0, "3", None, True])
def test_k_is_an_integer_from_1_to_the_limit(k):
    with pytest.raises(ValidationError, match=f"expected an integer from 1 to {MAX_K}"):
        query(k=k)


@pytest.mark.parametrize("ef_search", [0, -5, 1001, 10**9, "x", 50.5, None, True])
def test_ef_search_is_an_integer_that_the_index_takes(ef_search):
    with pytest.raises(ValidationError, match=r"ef_search is .*expected"):
        query(ef_search=ef_search)


@pytest.mark.parametrize("level", ["document", "", None, 1])
def test_the_level_is_one_of_two(level):
    with pytest.raises(ValidationError, match="expected 'documents' or 'chunks'"):
        query(level=level)


def test_an_index_scan_brings_more_candidates_than_are_asked_for_but_never_fewer():
    assert query(k=1).candidates == 4
    assert query(k=10).candidates == 40
    assert query(k=50).candidates == 100
    assert query(k=500).candidates == 500


def test_a_question_of_a_stored_row_is_searched_as_one_answer_more_is():
    for k in (1, 10, 100, 500):
        assert query(k=k, exclude_id="a").candidates == query(k=k + 1).candidates


def test_the_key_holds_everything_that_the_answer_depends_on():
    different = [
        query(),
        query(vector=VECTOR + np.float32(1e-6)),
        query(vector=-VECTOR),
        query(k=11),
        query(level="chunks"),
        query(ef_search=101),
        query(exact=True),
        query(filter=Filter(workspace="x")),
        query(filter=Filter(source_id="x")),
        query(filter=Filter(where={"x": 1})),
        query(filter=Filter(where={"x": True})),
    ]
    models = [MODEL, *(dataclasses.replace(MODEL, **c) for c in ({"model_id": "n"}, {"distance": "l2"}))]
    keys = [repr(cache_key(q, m).question) for q in different for m in models]
    assert len(set(keys)) == len(keys)
    assert repr(cache_key(query(), MODEL)) == repr(cache_key(query(vector=VECTOR.copy()), MODEL))


@pytest.mark.parametrize(
    ("filters", "tag"),
    [
        (Filter(), "store"),
        (Filter(where={"workspace": "w"}), "store"),
        (Filter(workspace="w"), "workspace:w"),
        (Filter(source_id="s"), "source:s"),
        (Filter("w", "s"), "source:s"),
    ],
)
def test_an_answer_depends_on_the_narrowest_tag(filters, tag):
    assert cache_key(query(filter=filters), MODEL).tag == tag
