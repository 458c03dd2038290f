"""The arithmetic of a run under load: percentiles in bounded space, trends, verdicts that can go either way."""

import numpy as np
import pytest

from ops.benchmarks.load.latency import Latencies
from ops.benchmarks.load.material import Material, is_quiet
from ops.benchmarks.load.plan import LoadPlan
from ops.benchmarks.load.report import LoadReport
from ops.benchmarks.load.samples import Samples, trend
from ops.benchmarks.load.work import NOT_CACHED, WRITE, Outcome
from ops.benchmarks.rows import SyntheticVectors


def latencies_of(seconds):
    made = Latencies()
    for value in seconds:
        made.add(value)
    return made


@pytest.mark.parametrize("percent", [50, 95, 99])
def test_a_percentile_is_right_to_two_percent(percent):
    seconds = np.random.default_rng(1).lognormal(-5, 1.5, 20_000)
    exact = np.percentile(seconds, percent, method="inverted_cdf")
    assert exact <= latencies_of(seconds).percentile_s(percent) * (1 + 1e-9) <= exact * 1.0201


def test_the_maximum_is_exact_and_no_percentile_is_beyond_it():
    made = latencies_of([0.001, 0.01, 0.1234])
    assert made.max_s == made.percentile_s(100) == 0.1234


def test_many_latencies_take_no_more_room_than_few():
    made = latencies_of([0.001])
    room = made._counts.nbytes
    for value in (0.0, 1e-9, 0.5, 5e4):  # out of range, too
        made.add(value)
    assert made.count == 5
    assert made._counts.nbytes == room


def test_outcomes_of_threads_and_processes_are_added_up():
    one, other = Outcome(), Outcome()
    one.latencies[WRITE].add(0.1)
    other.latencies[WRITE].add(0.3)
    other.latencies[NOT_CACHED].add(0.01)
    one.fail(ValueError("first\nof all"))
    other.fail(ValueError("second"))
    one.merge(Outcome.from_json(other.as_json()))
    assert (one.latencies[WRITE].count, one.latencies[WRITE].max_s) == (2, 0.3)
    assert one.latencies[NOT_CACHED].count == 1
    assert (dict(one.errors), one.examples) == ({"ValueError": 2}, {"ValueError": "first of all"})


def test_kinds_of_errors_do_not_grow_without_end():
    outcome = Outcome()
    for number in range(100):
        outcome.fail(type(f"Error{number}", (Exception,), {})("x"))
    assert len(outcome.errors) == 21
    assert sum(outcome.errors.values()) == 100


def test_a_trend_leaves_the_warm_up_out():
    times = list(range(600))
    seen = trend(times, [50.0 if t < 60 else 100.0 + t / 60 for t in times])
    assert (seen.first, seen.last) == (pytest.approx(101.5, abs=0.1), pytest.approx(109.5, abs=0.1))
    assert seen.slope_a_minute == pytest.approx(1)
    assert (seen.window_s, seen.judged) == (60, True)
    assert not trend(times[:100], [1.0] * 100).judged
    assert trend([], []) is None


@pytest.mark.parametrize("times", [[0.0], [1.5], [0.0, 1.0], [0.0, 1.0, 2.0]])
def test_few_samples_are_a_trend_too(times):
    seen = trend(times, [5.0] * len(times))
    assert (seen.first, seen.last, seen.judged) == (5, 5, False)
    assert seen.slope_a_minute == pytest.approx(0)


def report(*, memory=lambda _t: 100.0, sessions=lambda _t: 8, seconds=600, errors=(), deaths=(), server=97):
    outcome = Outcome()
    outcome.latencies[WRITE].add(0.1)
    for error in errors:
        outcome.fail(error)
    times = list(range(seconds))
    samples = Samples(
        times,
        [sessions(t) for t in times],
        {n: [(t, memory(t)) for t in times] for n in range(2)},
        {n: [(t, 10) for t in times] for n in range(2)},
    )
    pool = {"requests_num": 5, "most_waiting": 3, "pool_max": 20}
    result = {"seconds": seconds, "pool": pool, **outcome.as_json()}
    plan = LoadPlan(2, 1, 1, seconds, 100, 8)
    return LoadReport(plan, "", [result] * (2 - len(deaths)), deaths, samples, server)


def verdicts(**given):
    return {verdict.what: verdict.holds for verdict in report(**given).verdicts()}


GOOD = dict.fromkeys(
    ("no errors", "memory flat", "connections bounded", "connections do not grow", "fits into max_connections"), True
)


@pytest.mark.parametrize(
    ("given", "otherwise"),
    [
        ({}, {}),
        ({"memory": lambda t: 100 + min(t, 60)}, {}),  # while it warms up
        ({"memory": lambda t: 100 + t / 50}, {"memory flat": False}),
        ({"sessions": lambda _t: 43}, {"connections bounded": False}),
        ({"sessions": lambda _t: 0}, {"connections bounded": False}),
        ({"sessions": lambda t: 4 + t // 60}, {"connections do not grow": False}),
        ({"errors": [ValueError("x")]}, {"no errors": False}),
        ({"deaths": ["process 1 ended (-9)"]}, {"no errors": False}),
        ({"server": 41}, {"fits into max_connections": False}),
        ({"seconds": 60}, {"memory flat": None, "connections do not grow": None}),
    ],
)
def test_a_verdict_holds_or_not_by_what_was_seen(given, otherwise):
    if "deaths" in given:
        otherwise = otherwise | {"connections bounded": True}
    assert verdicts(**given) == GOOD | otherwise


def test_a_process_that_died_is_an_error_with_its_last_words():
    assert report(deaths=["process 1 ended (-9)"]).errors() == [
        {"kind": "process died", "count": 1, "example": "process 1 ended (-9)"}
    ]


def test_documents_differ_and_the_quiet_sources_are_never_written_to():
    material = Material(SyntheticVectors(8))
    stored = list(material.shared_documents(200))
    assert len({d.text for d in stored}) == len({d.embedding.tobytes() for d in stored}) == 200
    assert all(np.linalg.norm(d.embedding) == pytest.approx(1, abs=1e-5) for d in stored)
    changed = material.changed(200, 40, np.random.default_rng(2))
    assert len({d.id for d in changed}) == len(changed) > 20
    assert not any(is_quiet(int(d.id.split("/")[1])) for d in changed)
    quiet = {d.source_id for d in stored} - {d.source_id for d in material.changed(200, 200, np.random.default_rng(3))}
    asked = {q.filters["source_id"] for q in material.questions() if "source_id" in q.filters}
    assert asked == quiet
    assert {type(q.query) for q in material.questions()} == {str, np.ndarray}
