"""Memory of a change detection over very many rows: how far a fresh process grows after it has connected.

Runs itself in a process of its own, `python -m ops.benchmarks.memory`, the database named in the environment.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg

import db

from .plan import Run, UnequalWork
from .report import Figure, Target
from .rows import KnownVectors, SyntheticVectors
from .scratch import ScratchDatabase, open_store

MEMORY_TARGET = Target(32, at_most=True)
_URL = "VECTORKEEP_BENCHMARK_URL"
_PROGRESS_EVERY = 50_000


def measure_memory(run: Run, database: ScratchDatabase, rows: int) -> None:
    """Scan the hashes of `rows` stored rows, and pass the same rows through `embed_batch` once more, once each."""
    for way, measured in _WAYS.items():
        growth = _measured_in_a_process(run, database, way, rows)
        events = growth["progress_events"]
        run.add(
            Figure(
                "memory",
                f"{measured}, {rows:,} rows: peak growth of the process",
                growth["grown_mb"],
                "MB",
                target=MEMORY_TARGET,
                conditions={"progress logged every 50,000": events >= rows // _PROGRESS_EVERY},
                notes=(f"progress was logged {events} times; connected, the process had {growth['before_mb']} MB",),
            )
        )


def _measured_in_a_process(run: Run, database: ScratchDatabase, way: str, rows: int) -> dict[str, Any]:
    environment = {**os.environ, _URL: database.url, "PYTHONPATH": python_path()}
    command = [sys.executable, "-m", __name__, way, str(database.vectors.dimensions), str(rows)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise db.UnavailableError(f"the process that scans hashes failed: {ended.stderr.strip()[-500:]}")
    for line in ended.stderr.splitlines():
        run.say(f"  {line}")
    measured: dict[str, Any] = json.loads(ended.stdout)
    return measured


def python_path() -> str:
    """Where this package lies, before what the environment names."""
    return os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])


class _ProgressEvents(logging.Handler):
    """Counts and shows the library's progress events."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().endswith(".progress"):
            self.count += 1
            rows = getattr(record, "rows", getattr(record, "processed", None))
            print(f"{record.getMessage()} {rows:,}", file=sys.stderr)


def _scan_hashes(store: db.VectorStore, _url: str, rows: int) -> None:
    seen = sum(1 for _ in store.iter_hashes())
    if seen != rows:
        raise UnequalWork(f"{rows} rows are stored, {seen} were seen")


def _embed_unchanged(store: db.VectorStore, url: str, rows: int) -> None:
    result = store.embed_batch(_stored_items(url))
    if (result.skipped, result.embedded) != (rows, 0):
        raise UnequalWork(f"{rows} rows are stored and did not change, but the result is {result}")


def _stored_items(url: str) -> Iterator[db.Item]:
    """The stored documents as items, one batch in memory at a time."""
    with psycopg.connect(url) as connection, connection.cursor(name="stored_items") as cursor:
        cursor.itersize = 1000
        for id_, text, metadata, source_id in cursor.execute("SELECT id, text, metadata, source_id FROM embeddings"):
            yield db.Item(id_, text, metadata, source_id)


_WAYS = {"iter_hashes": "scan of hashes by iter_hashes", "embed_batch": "unchanged rows through embed_batch"}
_WORK = {"iter_hashes": _scan_hashes, "embed_batch": _embed_unchanged}


def main(way: str, dimensions: int, rows: int) -> None:
    """Connect, measure, work, measure; print what came of it as JSON."""
    url = os.environ[_URL]
    events = _ProgressEvents()
    logger = logging.getLogger("vectorkeep")
    logger.addHandler(events)
    logger.setLevel(logging.INFO)
    embedder = KnownVectors(SyntheticVectors(dimensions))
    with open_store(url, embedder, embedder) as store:
        before_mb, grown_mb = growth_mb(lambda: _WORK[way](store, url, rows))
    measured = {"grown_mb": grown_mb, "before_mb": before_mb, "progress_events": events.count}
    print(json.dumps(measured))


def growth_mb(work: Callable[[], None]) -> tuple[float, float]:
    """What this process has resident before `work`, and by how much it grew at most meanwhile."""
    before_kb = _status_kb("VmRSS")
    _reset_peak()
    work()
    return round(before_kb / 1024, 1), round((_status_kb("VmHWM") - before_kb) / 1024, 1)


def _reset_peak() -> None:
    # Where the kernel refuses, importing may have left a peak above what is resident: growth is overstated.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(value)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
