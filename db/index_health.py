"""The state of the vector indexes, and one verdict with its reasons."""

from collections.abc import Iterable
from typing import Any

from psycopg import Connection

from .embedding_model import Model
from .health_rules import BLOAT_DEGRADED, STALE_DEGRADED, judge
from .index_facts import Facts, gather
from .row_counts import RowCount
from .search import TABLE_OF
from .types import Health, IndexReport, Reason

_SEVERITY: dict[Health, int] = {"healthy": 0, "degraded": 1, "critical": 2}


def inspect_indexes(
    connection: Connection[Any], model: Model | None, known: dict[str, RowCount] | None = None
) -> list[IndexReport]:
    """A report of each vector index that the store should have; none before a model is registered.

    Tables whose counts are `known` are not counted again; those that are counted are known from then on.
    """
    if model is None:
        return []
    known = {} if known is None else known
    return [_report(gather(connection, model, level, known)) for level in TABLE_OF]


def overall(reports: Iterable[IndexReport]) -> Health:
    """The worst of the verdicts."""
    return _worst(report.verdict for report in reports)


def _worst(verdicts: Iterable[Health]) -> Health:
    return max(verdicts, key=_SEVERITY.__getitem__, default="healthy")


def _report(facts: Facts) -> IndexReport:
    server, built, recall = facts.server, facts.built, facts.recall
    findings = judge(facts)
    return IndexReport(
        name=facts.index,
        table=facts.table,
        valid=facts.valid,
        size_bytes=server.size_bytes,
        indexed_rows=facts.vectors if facts.valid else 0,
        unindexed_rows=0 if facts.valid else facts.vectors,
        stale_percent=round(100 * facts.stale_share, 1),
        needs_rebuild=_needs_rebuild(facts, findings),
        used=facts.used,
        recall=recall.recall if recall else None,
        verdict=_worst(finding.verdict for finding in findings),
        reasons=[str(finding) for finding in findings],
        findings=findings,
        exists=server.exists,
        ready=server.ready,
        building=facts.building,
        rows_without_vector=facts.without_vector,
        dead_rows=server.dead_rows,
        bytes_per_row=facts.bytes_per_row,
        bytes_per_row_built=facts.bytes_per_row_built,
        bloat=facts.bloat,
        changes_since_build=facts.changes_since_build,
        built_at=built.at if built else None,
        last_used=server.last_scan,
        operator_class=server.operator_class,
        planned=facts.planned,
        planned_generic=facts.planned_generic,
        duplicates=facts.duplicates,
        shared_buffers_share=facts.shared_buffers_share,
        hit_rate=facts.hit_rate,
        recall_interval=(recall.low, recall.high) if recall else None,
        recall_target=recall.target if recall else None,
        recall_ef_search=recall.ef_search if recall else None,
        recall_measured_at=recall.measured_at if recall else None,
        looked_up=recall.looked_up if recall else None,
        unreachable=recall.unreachable if recall else None,
        zero_vectors=recall.zero_vectors if recall else None,
        estimated=facts.estimated,
    )


# What only a rebuild of the index mends. Low recall is not among them: that is what `ef_search` is tuned for.
_REBUILT = {"no-index", "invalid", "many-unreachable", "unreachable", "stale", "bloat"}


def _needs_rebuild(facts: Facts, findings: Iterable[Reason]) -> bool:
    """Whether the index is to be built, or built again: its rules hold, or it is stale in a small table, too."""
    if not facts.model.indexed or not facts.vectors or facts.building is not None:
        return False
    wanted = any(finding.rule in _REBUILT for finding in findings)
    return wanted or facts.stale_share > STALE_DEGRADED or (facts.bloat or 0) >= BLOAT_DEGRADED
