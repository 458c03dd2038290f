"""The checker of the fault harness turns red where it must: ledgers made by hand, each with one thing wrong."""

import pytest

from tests.faults.harness import content
from tests.faults.harness.checker import Findings, History, Version, check_reads, check_stored, histories_of


def baseline():
    return {"d0-0": History(Version(1, "s0", 0, 0))}


def write(at, acked, version, source="s0", id_="d0-0", failed=()):
    return {"at": at, "acked": acked, "failed": failed, "documents": {id_: [version, source]}}


def read(start, end, seen, mode="strict", filter=None, **more):
    more = {"cached": False, "complete": True, "half": [], "twice": [], "ids": None} | more
    return {"start": start, "end": end, "seen": seen, "mode": mode, "filter": filter or {}, **more}


def findings_of_reads(operations, *reads, bounded_ttl_s=1):
    findings = Findings()
    check_reads(reads, histories_of(operations, reads, baseline()), findings, bounded_ttl_s)
    return findings


def findings_of_rows(operations, documents, chunks=None):
    findings = Findings()
    if chunks is None:
        chunks = [
            (id_, None, n, text) for id_, _, v, _ in documents for n, text in enumerate(content.chunk_texts(id_, v))
        ]
    check_stored(documents, chunks, histories_of(operations, [], baseline()), findings)
    return findings


def row(version, source="s0", id_="d0-0"):
    return id_, source, version, content.text_of(id_, version)


ACKED = [write(10, 20, 2)]
UNKNOWN = [write(10, None, 2)]
DELETED = [write(10, 20, 2, None)]


@pytest.mark.parametrize(
    ("operations", "seen"),
    [
        (ACKED, read(5, 8, {"d0-0": 1})),
        (ACKED, read(15, 18, {"d0-0": 1})),
        (ACKED, read(15, 18, {"d0-0": 2})),
        (ACKED, read(20, 22, {"d0-0": 1})),  # not after the acknowledgement
        (ACKED, read(21, 22, {"d0-0": 2})),
        (UNKNOWN, read(90, 91, {"d0-0": 1})),
        (UNKNOWN, read(90, 91, {"d0-0": 2})),
        (DELETED, read(21, 22, {})),
        (ACKED, read(21, 22, {}, filter={"source_id": "s1"})),
        (ACKED, read(21, 22, {}, filter={"workspace": "w1"})),
        (ACKED, read(21, 22, {}, complete=False)),
        ([write(10, 20, 2, failed=("d0-0",))], read(21, 22, {"d0-0": 1})),
    ],
)
def test_a_read_that_can_be_explained(operations, seen):
    assert findings_of_reads(operations, seen).clean


@pytest.mark.parametrize(
    ("operations", "seen"),
    [
        (ACKED, read(21, 22, {"d0-0": 1})),
        (ACKED, read(5, 8, {"d0-0": 2})),  # before anybody intended it
        (ACKED, read(21, 22, {})),
        (DELETED, read(21, 22, {"d0-0": 1})),
        (ACKED, read(21, 22, {}, filter={"workspace": "w0"})),
        (ACKED, read(21, 22, {"d0-0": 2}, filter={"source_id": "s1"})),
        (ACKED, read(21, 22, {"d0-0": 1}, complete=False)),
    ],
)
def test_a_stale_read(operations, seen):
    findings = findings_of_reads(operations, seen)
    assert len(findings.stale) == 1
    assert not findings.clean


def test_what_a_strict_read_saw_is_committed_for_those_that_follow():
    assert findings_of_reads(UNKNOWN, read(15, 18, {"d0-0": 2}), read(19, 21, {"d0-0": 1})).stale
    assert findings_of_reads(UNKNOWN, read(15, 18, {"d0-0": 2}), read(17, 21, {"d0-0": 1})).clean
    assert findings_of_reads(UNKNOWN, read(15, 18, {"d0-0": 2}, mode="bounded"), read(19, 21, {"d0-0": 1})).clean


def test_a_bounded_read_may_be_older_but_not_beyond_the_bound():
    second = 1_000_000_000
    findings = findings_of_reads(ACKED, read(20 + second // 2, second, {"d0-0": 1}, mode="bounded"))
    assert findings.clean
    assert findings.bounded_staleness_ms == pytest.approx(500, abs=1)
    assert findings_of_reads(ACKED, read(20 + 2 * second, 3 * second, {"d0-0": 1}, mode="bounded")).stale


def test_what_a_read_tells_of_itself_counts():
    assert findings_of_reads([], read(1, 2, {"d0-0": 1}, half=["torn"])).half
    assert findings_of_reads([], read(1, 2, {"d0-0": 1}, twice=["d0-0"])).twice
    assert findings_of_reads([], read(1, 2, {"d0-0": 1, "unheard of": 1})).other


@pytest.mark.parametrize(
    ("operations", "documents"),
    [(ACKED, [row(2)]), (UNKNOWN, [row(1)]), (UNKNOWN, [row(2)]), (DELETED, []), ([], [row(1)])],
)
def test_rows_that_can_be_explained(operations, documents):
    assert findings_of_rows(operations, documents).clean


@pytest.mark.parametrize(
    ("operations", "documents"),
    [(ACKED, [row(1)]), (ACKED, []), (UNKNOWN, []), (DELETED, [row(1)]), (ACKED, [row(2, "s1")]), ([], [row(2)])],
)
def test_an_acknowledged_write_that_is_lost(operations, documents):
    assert findings_of_rows(operations, documents).lost


def test_a_later_write_that_was_acknowledged_does_not_excuse_an_older_row():
    operations = [write(10, None, 2), write(30, 40, 3)]
    assert findings_of_rows(operations, [row(2)]).lost
    assert findings_of_rows(operations, [row(3)]).clean


def test_half_a_document():
    whole = [("d0-0", None, n, text) for n, text in enumerate(content.chunk_texts("d0-0", 2))]
    old = [("d0-0", None, n, text) for n, text in enumerate(content.chunk_texts("d0-0", 1))]
    assert findings_of_rows(ACKED, [row(2)], whole).clean
    assert findings_of_rows(ACKED, [row(2)], whole[:-1]).half
    assert findings_of_rows(ACKED, [row(2)], old).half
    assert findings_of_rows(ACKED, [row(2)], []).half
    assert findings_of_rows(ACKED, [("d0-0", "s0", 2, content.text_of("d0-0", 1))], whole).half
    assert findings_of_rows(DELETED, [], old).half


def test_what_is_stored_twice_or_by_nobody():
    assert findings_of_rows(ACKED, [row(2), row(2)]).twice
    chunks = [("d0-0", None, 0, text) for text in content.chunk_texts("d0-0", 2)]
    assert findings_of_rows(ACKED, [row(2)], chunks).twice
    assert findings_of_rows(ACKED, [row(2), row(1, id_="unheard of")]).other


@pytest.mark.parametrize(("start", "told"), [(25, []), (35, ["as it was 0.000 ms before"])])
def test_an_answer_of_the_round_before_is_as_old_as_it_is(start, told):
    """Version 2 was known from 20 on, and the bound is 10: at 25 a cached answer may still have version 1."""
    before = histories_of(ACKED, [], baseline())
    later = {id_: history.continued(Version(2, "s0"), 30) for id_, history in before.items()}
    findings = Findings()
    late = read(start, start + 1, {"d0-0": 1}, "bounded", cached=True)
    check_reads([late], histories_of([], [late], later), findings, 10e-9)
    assert len(findings.stale) == len(told)
    assert all(part in sentence for part, sentence in zip(told, findings.stale, strict=True))


def test_a_round_counts_only_its_own_versions():
    before = histories_of(ACKED, [], baseline())
    later = {id_: history.continued(Version(2, "s0"), 30) for id_, history in before.items()}
    findings = Findings()
    chunks = [("d0-0", None, n, text) for n, text in enumerate(content.chunk_texts("d0-0", 3))]
    check_stored([row(3)], chunks, histories_of([write(40, 50, 3)], [], later), findings)
    assert (findings.clean, findings.acknowledged, findings.unacknowledged) == (True, 1, 0)
