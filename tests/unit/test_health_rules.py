import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from db.embedding_model import Model
from db.health_rules import RULES, judge, rules_table
from db.index_facts import Built, Facts, Server
from db.recall_history import PastMeasurement
from db.types import BuildProgress

DOCS = Path(__file__).parents[2] / "docs" / "health.md"

HEALTHY = Facts(
    table="chunks",
    index="chunks_vector_idx",
    model=Model("m", 256, "cosine"),
    server=Server(
        exists=True,
        valid=True,
        ready=True,
        size_bytes=40_000_000,
        operator_class="halfvec_ip_ops",
        live_rows=50_000,
        dead_rows=100,
        indexed_share=1.0,
        changes=60_000,
        scans=10,
        last_scan=None,
        counted_for=timedelta(days=30),
        pages_hit=100_000,
        pages_read=10,
        shared_buffers_bytes=128 * 1024**2,
    ),
    vectors=50_000,
    without_vector=0,
    built=Built(50_000, 39_000_000, 50_000, datetime.now(UTC) - timedelta(days=30)),
    building=None,
    planned=True,
    planned_generic=True,
    duplicates=[],
    unindexed_keys=[],
    recall=PastMeasurement(0.96, 0.95, 0.97, 0.95, 100, datetime.now(UTC), 200, 0, 0, 50_000, 50_000),
)


def server(**changed):
    return {"server": dataclasses.replace(HEALTHY.server, **changed)}


def recall(**changed):
    return {"recall": dataclasses.replace(HEALTHY.recall, **changed)}


BUILDING = BuildProgress("building index: loading tuples", 40.0, 30.0, 4711)

FAULTS = {
    "no-index": server(exists=False, valid=False, ready=False),
    "invalid": server(valid=False),
    "being-built": {**server(valid=False), "building": BUILDING},
    "wrong-operator-class": server(operator_class="vector_l2_ops"),
    "not-planned": {"planned": False},
    "not-planned-generic": {"planned_generic": False},
    "recall-lost": recall(high=0.74),
    "recall-below-target": recall(high=0.949),
    "many-unreachable": recall(unreachable=11),
    "unreachable": recall(unreachable=5),
    "zero-vectors": recall(zero_vectors=1),
    "stale": {**server(dead_rows=1100, live_rows=50_000), "vectors": 1000, "built": None},
    "dead-rows": server(dead_rows=13_000, indexed_share=0.1),
    "bloat": server(size_bytes=58_500_000),
    "unused": server(scans=0),
    "duplicate-index": {"duplicates": ["other_idx"]},
    "foreign-key-without-index": {"unindexed_keys": ["document_id"]},
    "larger-than-memory": {**server(size_bytes=200_000_000, pages_read=20_000), "built": None},
    "too-many-dimensions": {
        **server(exists=False, valid=False), "model": Model("m", 4001, "cosine"), "planned": None
    },
}  # fmt: skip


def test_what_is_well_breaks_no_rule():
    assert judge(HEALTHY) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_holds_alone_where_its_fault_is(rule):
    [reason] = judge(dataclasses.replace(HEALTHY, **FAULTS[rule.name]))
    assert (reason.rule, reason.verdict) == (rule.name, rule.verdict)
    assert reason.evidence.startswith("chunks: ")
    assert reason.command
    assert reason.sql
    for text in (reason.evidence, reason.command, reason.sql):
        assert not {"{", "}"} & set(text), text
        assert "None" not in text


@pytest.mark.parametrize(
    "changed",
    [
        recall(high=0.95),
        recall(unreachable=4),
        server(size_bytes=58_000_000),
        {**server(scans=0, counted_for=timedelta(days=6))},
        {**server(size_bytes=50_000_000, shared_buffers_bytes=10**7)},  # larger, and found in memory all the same
        {**server(exists=False, valid=False, ready=False), "vectors": 0},
        {"planned": None, "planned_generic": None},
    ],
)
def test_at_the_limit_nothing_is_wrong_yet(changed):
    assert judge(dataclasses.replace(HEALTHY, **changed)) == []


def test_a_remedy_in_sql_is_the_whole_statement():
    [reason] = judge(dataclasses.replace(HEALTHY, **FAULTS["no-index"]))
    assert reason.sql.startswith("CREATE INDEX CONCURRENTLY chunks_vector_idx ON chunks USING hnsw (")
    assert reason.command == "vectorkeep migrate --model m --dimensions 256 --distance cosine"


def test_the_documents_table_is_the_codes():
    assert rules_table() in DOCS.read_text()
