"""A batch that is checked a run at a time: each input once, however often the runs are asked for."""

import pytest

from db import checked_batch
from db.checked_batch import CheckedBatch
from db.documents import HashedItem, hash_item
from db.errors import ValidationError
from db.tally import Tally
from db.types import Item


@pytest.fixture(autouse=True)
def run_of_two(monkeypatch):
    monkeypatch.setattr(checked_batch, "_RUN", 2)


@pytest.fixture
def tally():
    return Tally(None, None)


def check(given):
    if given.startswith("bad"):
        raise ValidationError("it is bad")
    id_, _, text = given.partition(" ")
    return hash_item(Item(id_, text or "t"))


def ids(run):
    return [item.id for item in run]


def test_runs_are_checked_as_they_are_asked_for(tally):
    asked = []

    def given():
        for name in "abcde":
            asked.append(name)
            yield name

    runs = CheckedBatch(given(), check, tally).runs()
    assert asked == []
    assert (ids(next(runs)), asked) == (["a", "b"], ["a", "b"])
    assert [ids(run) for run in runs] == [["c", "d"], ["e"]]


def test_after_a_failure_in_the_middle_they_begin_again_and_nothing_is_checked_twice(tally):
    checked = CheckedBatch(["a", "bad", "b", "c", "bad", "d", "e"], check, tally)
    first = next(checked.runs())
    assert [ids(run) for run in checked.runs()] == [["a", "b"], ["c", "d"], ["e"]]
    assert next(checked.runs()) is first
    assert ids(checked.items()) == list("abcde")
    assert tally["failed"] == 2


def test_a_check_that_failed_is_no_end_of_the_batch(tally):
    """Whoever tries again what failed would take the rest for unchanged."""

    def failing(given):
        if given == "c":
            raise ConnectionError("as the registry's may")
        return check(given)

    checked = CheckedBatch("abcde", failing, tally)
    for _ in range(2):
        runs = checked.runs()
        assert ids(next(runs)) == ["a", "b"]
        with pytest.raises(ConnectionError, match="as the registry's may"):
            next(runs)
    with pytest.raises(ConnectionError):
        checked.items()


def test_of_an_id_that_comes_again_the_last_counts(tally):
    checked = CheckedBatch(["a 1", "b 1", "a 2", "c 1", "c 2", "b 2", "d 1"], check, tally)
    assert [[(i.id, i.text) for i in run] for run in checked.runs()] == [
        [("a", "1"), ("b", "1")],
        [("a", "2"), ("c", "1")],
        [("c", "2"), ("b", "2")],
        [("d", "1")],
    ]
    assert [(i.id, i.text) for i in checked.items()] == [("a", "2"), ("c", "2"), ("b", "2"), ("d", "1")]
    assert tally["superseded"] == 3


def test_within_a_run_too(tally):
    checked = CheckedBatch(["a 1", "a 2", "b 1"], check, tally)
    assert [[(i.id, i.text) for i in run] for run in checked.runs()] == [[("a", "2"), ("b", "1")]]


def test_an_input_without_an_id_is_told_all_the_same(tally):
    class Odd:
        id = 7

    def refuse(_given) -> HashedItem:
        raise ValidationError("no")

    assert CheckedBatch([{"id": "x"}, {}, Odd(), 5], refuse, tally).items() == []
    assert [id_ for id_, _ in tally.errors] == ["x", "None", "7", "None"]
