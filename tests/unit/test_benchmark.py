"""The arithmetic of the benchmark: turns, medians, ratios, verdicts, and the rows that it writes."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from ops.benchmarks import memory, rows, timing
from ops.benchmarks.report import Figure, Target, growth_figure, rate_figure
from ops.benchmarks.scratch import database_url
from ops.benchmarks.timing import Times, compete, order_of


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.pass_s` moves; and no garbage is collected, which takes long after many tests."""

    class Clock:
        now = 0.0

        def pass_s(self, seconds):
            self.now += seconds

    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(timing, "gc", SimpleNamespace(collect=lambda: None))
    return made


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_sides_take_turns(count):
    names = [f"side {n}" for n in range(count)]
    orders = [order_of(names, number) for number in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    for one, other in itertools.permutations(names, 2):
        first = [order.index(one) < order.index(other) for order in orders]
        assert first.count(True) == count, "as often before as after"
    assert {order[0] for order in orders} == set(names)
    assert order_of(names, 0) == names
    assert order_of(names, 1) == names[::-1]


def test_only_the_sides_are_timed(clock):
    done = []

    def work(name, seconds):
        def side(number):
            done.append((name, number))
            clock.pass_s(seconds + number)

        return side

    times = compete(
        {"a": work("a", 1), "b": work("b", 10)},
        rounds=3,
        prepare=lambda name: (done.append(("prepare", name)), clock.pass_s(100)),
        say=lambda _text: clock.pass_s(1000),
        after=lambda name, number: (done.append(("after", name, number)), clock.pass_s(100)),
    )
    assert times.seconds == {"a": [1, 2, 3], "b": [10, 11, 12]}
    assert done[:6] == [("prepare", "a"), ("a", 0), ("after", "a", 0), ("prepare", "b"), ("b", 0), ("after", "b", 0)]


@pytest.mark.parametrize(("least_s", "rounds"), [(0, 3), (33, 3), (34, 4), (44, 4), (500, 12)])
def test_short_rounds_are_repeated_until_the_sides_took_long_enough(clock, least_s, rounds):
    times = compete(
        {"a": lambda _number: clock.pass_s(1), "b": lambda _number: clock.pass_s(10)},
        rounds=3,
        prepare=lambda _name: clock.pass_s(1000),
        say=lambda _text: None,
        least_s=least_s,
    )
    assert times.seconds == {"a": [1] * rounds, "b": [10] * rounds}


def test_a_rate_is_that_of_the_median_and_a_ratio_the_median_of_the_rounds_own():
    times = Times({"ours": [2.0, 1.0, 8.0], "by hand": [1.0, 1.0, 6.0]})
    figure = rate_figure("m", "what", times, 100, side="ours", other="by hand")
    assert (figure.ours, figure.other) == (50, 100)
    assert figure.ratios == (0.5, 1.0, 0.75)
    assert figure.ratio == 0.75
    assert figure.as_row() == ("what", "50 rows/s", "by hand", "100 rows/s", "0.75 (0.50–1.00)", "", "")


def test_growth_is_for_equal_work():
    times = Times({"100": [1.0, 1.0, 2.0], "400": [2.0, 4.0, 6.0]})
    grown = growth_figure("m", "what", times, large="400", small="100")
    assert grown.ratios == (2, 4, 3)
    assert (grown.ours, grown.other) == (4, 1)
    for_each = growth_figure("m", "what", times, large="400", small="100", work=4)
    assert for_each.ratios == (0.5, 1, 0.75)


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (Target(0.8), 0.8, "met"),
        (Target(0.8), 0.79, "MISSED"),
        (Target(1.5, at_most=True), 1.5, "met"),
        (Target(1.5, at_most=True), 1.51, "MISSED"),
        (None, 0.01, ""),
    ],
)
def test_a_target_is_met_or_missed(target, value, verdict):
    assert Figure("m", "what", value, "MB", target=target).verdict == verdict
    assert Figure("m", "what", 1000, "rows/s", other=1, ratios=(value,), target=target).verdict == verdict


@pytest.mark.parametrize("target", [Target(1), None])
def test_a_condition_that_does_not_hold_is_a_target_missed(target):
    figure = Figure("m", "what", 5, "%", target=target, conditions={"held": True, "no row written": False})
    assert figure.verdict == "MISSED"
    assert figure.as_row()[-1] == "MISSED: not so: no row written"
    assert Figure("m", "what", 5, "%", target=target, conditions={"held": True}).verdict == ("met" if target else "")


def test_all_texts_are_distinct_and_a_revision_changes_all_but_the_ids():
    vectors = rows.SyntheticVectors(8)
    first, changed = (list(rows.documents(vectors, 0, 10_000, revision=revision)) for revision in (0, 1))
    assert len({d.text for d in first} | {d.text for d in changed}) == 20_000
    assert [d.id for d in first] == [d.id for d in changed]
    assert all(a.metadata != b.metadata for a, b in zip(first, changed, strict=True))
    assert len(rows.corpus()) > 500


@pytest.mark.parametrize("start", [0, 1, 2500])
def test_a_row_is_the_same_wherever_the_making_begins(start):
    every = list(rows.documents(rows.SyntheticVectors(4), 0, 2600))[start:]
    some = list(rows.documents(rows.SyntheticVectors(4), start, 2600 - start))
    assert [(d.id, d.text, d.source_id) for d in some] == [(d.id, d.text, d.source_id) for d in every]
    assert all(np.array_equal(a.embedding, b.embedding) for a, b in zip(some, every, strict=True))
    assert np.linalg.norm(some[0].embedding) == pytest.approx(1)


def test_vectors_differ_among_rows_and_revisions():
    made = [d for revision in (0, 1) for d in rows.documents(rows.SyntheticVectors(4), 0, 50, revision=revision)]
    assert len({d.embedding.tobytes() for d in made}) == 100


def test_an_embedder_with_known_vectors_counts_what_it_is_asked():
    known = list(rows.documents(rows.SyntheticVectors(4), 0, 3))
    embedder = rows.KnownVectors(rows.SyntheticVectors(4), known)
    assert np.array_equal(embedder.embed([known[2].text]), [known[2].embedding])
    assert embedder.asked == 1
    with pytest.raises(KeyError):
        embedder.embed(["unknown"])


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("postgresql://me:x@host:5433/store", "postgresql://me:x@host:5433/scratch"),
        ("postgresql:///store?host=%2Frun%2Fpg", "postgresql:///scratch?host=%2Frun%2Fpg"),
        ("postgresql://me@/?host=%2Frun&dbname=store", "postgresql://me@/scratch?host=%2Frun"),
    ],
)
def test_another_database_of_the_same_server(server, expected):
    assert database_url(server, "scratch") == expected


def test_texts_are_distinct_however_few_pieces_there_are(monkeypatch):
    monkeypatch.setattr(rows, "corpus", lambda: ("one", "two", "three"))
    assert len({rows.text_of(number, revision) for number in range(100) for revision in (0, 1)}) == 200


def test_the_peak_of_memory_is_seen_after_it_is_over():
    def take_and_give_back():
        b"x" * (64 * 1024**2)

    before_mb, grown_mb = memory.growth_mb(take_and_give_back)
    assert before_mb > 10
    assert 60 < grown_mb < 80
