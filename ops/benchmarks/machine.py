"""What the figures depend on: this machine, the server and its settings. No names of hosts."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psycopg import Connection

_SERVER = """
    SELECT current_setting('server_version'),
           (SELECT default_version FROM pg_available_extensions WHERE name = 'vector')
"""
_SETTINGS = """
    SELECT name, current_setting(name) FROM pg_settings
    WHERE name IN ('shared_buffers', 'maintenance_work_mem', 'max_wal_size', 'fsync', 'synchronous_commit',
                   'full_page_writes', 'max_parallel_maintenance_workers')
"""


def machine(connection: Connection[Any]) -> dict[str, Any]:
    """This machine, and the server that `connection` is to."""
    [(postgres, pgvector)] = connection.execute(_SERVER).fetchall()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "python": platform.python_version(),
        "postgresql": postgres.split()[0],
        "pgvector": pgvector,
        "settings": dict(connection.execute(_SETTINGS).fetchall()),
    }


def described(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    settings = ", ".join(f"{name} {value}" for name, value in sorted(machine["settings"].items()))
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; Python {machine['python']}; "
        f"PostgreSQL {machine['postgresql']} with pgvector {machine['pgvector']} ({settings})"
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
