"""Texts cut into chunks that say where they stand."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.chunking import Chunker, TextChunk
from db.errors import ValidationError


def test_a_short_text_is_one_chunk_as_it_is():
    assert Chunker(50, 10).split("  short \n") == [TextChunk("  short \n", 0, 9)]


@given(st.text(st.sampled_from("ab é😀.\n"), min_size=1, max_size=400))
def test_chunks_fit_stand_where_they_say_and_lose_no_word(text):
    chunks = Chunker(50, 10).split(text)
    assert chunks
    assert all(len(chunk.text) <= 50 for chunk in chunks)
    assert all(text[chunk.start : chunk.end] == chunk.text for chunk in chunks)
    covered = {position for chunk in chunks for position in range(chunk.start, chunk.end)}
    assert all(position in covered or text[position].isspace() for position in range(len(text)))


def test_neighbours_share_up_to_the_overlap():
    text = " ".join(f"word{n}" for n in range(100))
    chunks = Chunker(80, 20).split(text)
    shared = [one.end - other.start for one, other in pairwise(chunks)]
    assert len(chunks) > 5
    assert all(n <= 20 for n in shared)
    assert max(shared) > 0
    apart = Chunker(80, 0).split(text)
    assert all(one.end <= other.start for one, other in pairwise(apart))


def test_a_cut_comes_at_the_best_boundary_that_fits():
    text = "First paragraph, not long.\n\nSecond paragraph, a little longer than that."
    assert [c.text for c in Chunker(50, 0).split(text)] == [
        "First paragraph, not long.",
        "Second paragraph, a little longer than that.",
    ]


def test_a_text_of_blanks_alone_is_still_one_chunk():
    assert [c.text for c in Chunker(50, 0).split(" " * 200)] == [" " * 200]


def test_the_same_text_is_always_cut_alike():
    text = "Some sentence or other. " * 60
    assert Chunker(100, 20).split(text) == Chunker(100, 20).split(text)


def test_an_overlap_as_large_as_the_chunk_is_refused():
    with pytest.raises(ValidationError, match="chunk_overlap is 50; expected less than chunk_size, 50"):
        Chunker(50, 50)
