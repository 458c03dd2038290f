"""`vectorkeep stats`."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any

import typer

import db

from .command import Cli
from .opening import open_store

_LEVEL_OF = {"embeddings": "documents", "chunks": "chunks"}


def stats(
    cli: Cli,
    workspace: Annotated[str | None, typer.Option(help="Count only this workspace.", show_default=False)] = None,
    recall: Annotated[
        bool, typer.Option("--recall", help="Measure recall now: compare searches with exact ones.")
    ] = False,
    k: Annotated[int, typer.Option("-k", min=1, help="With --recall: how many hits of each search are compared.")] = 10,
    sample: Annotated[int, typer.Option(min=1, help="With --recall: how many searches are compared.")] = 200,
) -> None:
    """Tell how much the store holds, how fast and how healthy it is.

    A workspace limits documents, chunks and sources; storage, health and performance are the store's. Recall is
    measured at each level that has vectors; all rows are compared for each search, for ten minutes at most.
    """
    measured: list[db.RecallReport] = []
    with open_store(cli.options) as store:
        statistics = store.get_statistics(workspace)
        if recall:
            for index in statistics.indexes:
                if index.indexed_rows or index.unindexed_rows:
                    measured.append(_measure(cli, store, _LEVEL_OF[index.table], k, sample))
            statistics = store.get_statistics(workspace)
    plain = {field.name: getattr(statistics, field.name) for field in fields(statistics)}
    cli.output.document(plain | {"recall": measured} if recall else statistics)
    print_statistics(cli, statistics, measured)


def _measure(cli: Cli, store: db.VectorStore, level: Any, k: int, sample: int) -> db.RecallReport:
    with cli.output.progress(f"Measuring recall of {level}") as on_progress:
        return store.measure_recall(level=level, k=k, sample=sample, on_progress=on_progress)


def print_statistics(cli: Cli, statistics: db.Statistics, measured: Sequence[db.RecallReport] = ()) -> None:
    """The fields, and on a terminal tables of the indexes and of what is wrong with them."""
    cli.output.fields(_fields(statistics, measured))
    if cli.output.on_terminal and statistics.indexes:
        cli.output.line("")
        cli.output.rows(_INDEX_COLUMNS, [_index_row(index) for index in statistics.indexes])
        findings = [finding for index in statistics.indexes for finding in index.findings]
        if findings:
            cli.output.line("")
            cli.output.rows(_FINDING_COLUMNS, [[f.rule, f.verdict, f.evidence, f.command, f.sql] for f in findings])


def _fields(statistics: db.Statistics, measured: Sequence[db.RecallReport]) -> dict[str, Any]:
    """Everything but the indexes' details, a name each."""
    performance = statistics.performance
    fields: dict[str, Any] = {
        "documents": statistics.documents,
        "chunks": statistics.chunks,
        "sources": statistics.sources,
        "storage_mb": round(statistics.storage_mb, 3),
        "index_health": statistics.index_health,
        "reasons": "; ".join(statistics.reasons),
        "avg_search_ms": performance.avg_search_ms,
        "avg_insert_ms": performance.avg_insert_ms,
        "cache_hit_rate": performance.cache_hit_rate,
    }
    for operation, percentiles in performance.percentiles.items():
        fields[f"{operation}_ms"] = ", ".join(f"{name} {ms:.1f}" for name, ms in percentiles.items())
    if statistics.estimated:
        fields["estimated"] = statistics.estimated
    fields |= {f"index.{index.name}": _index_line(index) for index in statistics.indexes}
    return fields | {f"recall.{report.level}": _recall_line(report) for report in measured}


_INDEX_COLUMNS = ("index", "verdict", "MB", "bytes/row", "rows", "not indexed", "stale %", "used", "recall")
_FINDING_COLUMNS = ("rule", "verdict", "evidence", "run", "or in SQL")


def _index_row(index: db.IndexReport) -> list[Any]:
    megabytes = index.size_bytes / 1_000_000
    used = "unknown" if index.used is None else index.used
    return [
        index.name,
        index.verdict,
        f"{megabytes:.1f}",
        None if index.bytes_per_row is None else round(index.bytes_per_row),
        _about(index, index.indexed_rows),
        _about(index, index.unindexed_rows),
        f"{index.stale_percent:.1f}",
        used,
        _past_recall(index),
    ]


def _about(index: db.IndexReport, rows: int) -> int | str:
    return f"about {rows}" if index.estimated and rows else rows


def _past_recall(index: db.IndexReport) -> str:
    if index.recall is None or index.recall_interval is None or index.recall_measured_at is None:
        return "not measured"
    low, high = index.recall_interval
    return f"{index.recall:.3f} ({low:.3f} to {high:.3f}), {index.recall_measured_at:%Y-%m-%d %H:%M}"


def _index_line(index: db.IndexReport) -> str:
    parts = [index.verdict, f"{_about(index, index.indexed_rows)} rows", f"{index.size_bytes} bytes"]
    if index.bloat is not None:
        parts.append(f"{index.bloat:.2f} times the bytes a row after its build")
    if index.changes_since_build is not None:
        parts.append(f"{index.changes_since_build} changes since")
    if index.recall is not None:
        parts.append(f"recall {_past_recall(index)}")
    return ", ".join(parts)


def _recall_line(report: db.RecallReport) -> str:
    low, high = report.interval
    best = report.recommended_ef_search
    advice = f"{best} is the lowest that meets {report.target:g}" if best else f"none meets {report.target:g}"
    return "; ".join(
        [
            f"recall@{report.k} {report.recall:.3f} ({low:.3f} to {high:.3f}) of {report.sample} searches "
            f"with ef_search {report.ef_search}, {advice}",
            f"{report.indexed_ms_p50:.1f} ms, exactly {report.exact_ms_p50:.1f} ms",
            f"{report.unreachable} of {report.looked_up} rows unreachable",
            *report.notes,
        ]
    )
