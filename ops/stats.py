"""`vectorkeep stats`."""

from typing import Annotated, Any

import typer

import db

from .command import Cli
from .opening import open_store


def stats(
    cli: Cli,
    workspace: Annotated[str | None, typer.Option(help="Count only this workspace.", show_default=False)] = None,
) -> None:
    """Tell how much the store holds, how fast and how healthy it is.

    A workspace limits documents, chunks and sources; storage, health and performance are the store's.
    """
    with open_store(cli.options) as store:
        statistics = store.get_statistics(workspace)
    cli.output.document(statistics)
    print_statistics(cli, statistics)


def print_statistics(cli: Cli, statistics: db.Statistics) -> None:
    """The fields, and on a terminal a table of the indexes."""
    cli.output.fields(_fields(statistics))
    if cli.output.on_terminal and statistics.indexes:
        cli.output.line("")
        cli.output.rows(_INDEX_COLUMNS, [_index_row(index) for index in statistics.indexes])


def _fields(statistics: db.Statistics) -> dict[str, Any]:
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
    return fields | {f"index.{index.name}": _index_line(index) for index in statistics.indexes}


_INDEX_COLUMNS = ("index", "verdict", "MB", "rows", "not indexed", "stale %", "used", "reasons")


def _index_row(index: db.IndexReport) -> list[Any]:
    megabytes = index.size_bytes / 1_000_000
    used = "unknown" if index.used is None else index.used
    return [
        index.name,
        index.verdict,
        f"{megabytes:.1f}",
        index.indexed_rows,
        index.unindexed_rows,
        f"{index.stale_percent:.1f}",
        used,
        "; ".join(index.reasons),
    ]


def _index_line(index: db.IndexReport) -> str:
    return f"{index.verdict}, {index.indexed_rows} rows, {index.size_bytes} bytes"
