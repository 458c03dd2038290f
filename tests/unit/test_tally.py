"""Counting inputs: each once, by the last valid one of its id."""

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import db
from db import tally as tally_module
from db.tally import Tally, batches, total_of

COUNTS = ("inserted", "updated", "unchanged", "superseded", "failed")


class Table:
    """A plain model of a table: text by id. Tells the outcome of each write of a batch."""

    def __init__(self, rows):
        self.rows = dict(rows)

    def write(self, batch):
        outcomes = {}
        for id_, text in batch.items():
            stored = self.rows.get(id_)
            outcomes[id_] = "inserted" if stored is None else "unchanged" if stored == text else "updated"
            self.rows[id_] = text
        return outcomes


ids = st.sampled_from("abcd")
# A text of None is an invalid input.
inputs = st.lists(st.tuples(ids, st.sampled_from(["x", "y", None])), max_size=25)


@given(st.dictionaries(ids, st.sampled_from("xy")), inputs, st.integers(1, 5))
def test_counts_are_those_of_the_inputs_by_their_last_valid_one(stored, given_inputs, size):
    table, tally = Table(stored), Tally(len(given_inputs), None)
    for batch in batches(iter(given_inputs), size):
        valid = {}
        for id_, text in batch:
            if text is None:
                tally.fail(id_, "bad")
            else:
                if valid.pop(id_, None) is not None:
                    tally.supersede()
                valid[id_] = text
        tally.add(table.write(valid))
        tally.progress(len(batch))

    valid_inputs = [(id_, text) for id_, text in given_inputs if text is not None]
    last = dict(valid_inputs)
    expected = Counter({"failed": len(given_inputs) - len(valid_inputs), "superseded": len(valid_inputs) - len(last)})
    for id_ in last:
        versions = [text for i, text in valid_inputs if i == id_]
        if id_ not in stored:
            expected["inserted"] += 1
        # Within one batch the earlier versions never reach the table: only a changed end, or a write between.
        elif versions[-1] != stored[id_]:
            expected["updated"] += 1
        else:
            expected["unchanged or updated"] += 1
    counts = {name: tally[name] for name in COUNTS}
    assert sum(counts.values()) == len(given_inputs) == tally.processed
    assert counts["failed"] == expected["failed"] == len(tally.errors)
    assert counts["superseded"] == expected["superseded"]
    assert counts["inserted"] == expected["inserted"]
    assert expected["updated"] <= counts["updated"] <= expected["updated"] + expected["unchanged or updated"]


@pytest.mark.parametrize(
    ("outcomes", "counted"),
    [
        (["inserted"], "inserted"),
        (["inserted", "updated"], "inserted"),
        (["inserted", "unchanged"], "inserted"),
        (["updated", "unchanged"], "updated"),
        (["unchanged", "updated"], "updated"),
        (["unchanged", "unchanged", "unchanged"], "unchanged"),
        (["unchanged", "updated", "unchanged"], "updated"),
        (["unchanged", "inserted"], "inserted"),
    ],
)
def test_an_id_that_comes_again_counts_by_what_the_call_did_to_its_row(outcomes, counted):
    tally = Tally(None, None)
    for outcome in outcomes:
        tally.add({"a": outcome})
    assert {name: tally[name] for name in COUNTS if tally[name]} == (
        {counted: 1} if len(outcomes) == 1 else {counted: 1, "superseded": len(outcomes) - 1}
    )


def test_what_is_remembered_of_a_call_is_bounded(monkeypatch):
    monkeypatch.setattr(tally_module, "_REMEMBERED", 10)
    tally = Tally(None, None)
    for n in range(50):
        tally.add({f"{n}": "inserted"})
    assert len(tally._outcomes) == 10
    assert tally["inserted"] == 50


def test_an_id_that_comes_again_beyond_the_remembered_ones_counts_by_itself(monkeypatch):
    monkeypatch.setattr(tally_module, "_REMEMBERED", 10)
    tally = Tally(None, None)
    for id_ in ("a", *range(9), "a", *range(10, 20), "a"):
        tally.add({str(id_): "inserted" if tally["inserted"] < 1 or id_ != "a" else "updated"})
    assert {name: tally[name] for name in COUNTS if tally[name]} == {"inserted": 20, "updated": 1, "superseded": 1}


def test_progress_is_told_after_each_batch_with_the_total():
    told = []
    tally = Tally(5, lambda processed, total: told.append((processed, total)))
    for batch in batches(iter(range(5)), 2):
        tally.progress(len(batch))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_the_total_of_a_generator_is_unknown():
    assert total_of(n for n in range(3)) is None
    assert total_of(iter([1])) is None
    assert total_of([1, 2]) == total_of({"a": 1, "b": 2}) == 2


def test_batches_read_no_further_than_they_give():
    read = []

    def source():
        for n in range(5):
            read.append(n)
            yield n

    given_batches = batches(source(), 2)
    assert next(given_batches) == [0, 1]
    assert read == [0, 1]
    assert list(given_batches) == [[2, 3], [4]]


def test_long_texts_make_short_batches(monkeypatch):
    monkeypatch.setattr(tally_module, "MAX_BATCH_CHARACTERS", 100)
    short = {"id": "short", "text": "x" * 10}
    sixty = db.Item("sixty", "x" * 60)
    chunked = db.Document("chunked", "x" * 50, chunks=[{"text": "x" * 30}, db.DocumentChunk("x" * 20)])
    broken = [None, 7, "a string of more than a hundred characters" * 3, {"text": 200}, {"text": "", "chunks": 5}]
    given_inputs = [sixty, short, sixty, sixty, sixty, chunked, short, *broken, short]
    found = [len(batch) for batch in batches(iter(given_inputs), 1000)]
    assert found == [3, 2, 1, 7]
    assert [given for batch in batches(iter(given_inputs), 1000) for given in batch] == given_inputs


def test_a_batch_that_is_full_of_text_is_given_before_more_is_read(monkeypatch):
    monkeypatch.setattr(tally_module, "MAX_BATCH_CHARACTERS", 100)

    def source():
        yield db.Item("long", "x" * 101)
        pytest.fail("read too far")

    assert len(next(batches(source(), 10))) == 1


def test_a_long_run_tells_the_log_how_far_it_is(caplog, monkeypatch):
    monkeypatch.setattr(tally_module, "LOG_EVERY", 50)
    caplog.set_level(logging.INFO, logger="vectorkeep")
    tally = Tally(1000, None)
    tally.add({"a": "inserted"})
    for inputs in (20, 20, 20, 30, 140, 1):
        tally.progress(inputs)
    told = [(r.getMessage(), r.processed, r.total, r.inserted) for r in caplog.records]
    assert told == [("ingestion.progress", done, 1000, 1) for done in (60, 230)]
    assert not hasattr(caplog.records[0], "failed")


def test_chunks_of_any_kind_are_counted_without_a_fault():
    nested = {"text": "abc"}
    for _ in range(5000):
        nested = {"text": "abc", "chunks": [nested]}
    odd = [{"text": "a", "chunks": np.array([1, 2])}, nested, {"text": 1, "chunks": [None, 3, "x"]}, None]
    assert list(batches(iter(odd), 10)) == [odd]
