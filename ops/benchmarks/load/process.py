"""One process of a run under load: `python -m ops.benchmarks.load.process`, told by its input what to do.

Its input is one line of JSON, then `go`; its output `ready`, then one line of JSON. It ends before its time, in
order, when its input ends: no process outlives the one that started it.
"""

import json
import select
import signal
import sys
import time
from typing import Any

import db

from .material import Material
from .plan import LoadPlan
from .work import Crew

_LOOK_EVERY_S = 0.1
# Of the pool's own counters, those that tell of waits; psycopg_pool leaves out what never happened.
_COUNTERS = ("requests_num", "requests_queued", "requests_wait_ms", "requests_errors", "connections_num")
# What was cached is left to expire soon after the end: the database that it names is gone then.
_CACHE_KEPT_S = 60


def open_store(url: str, plan: LoadPlan, material: Material) -> db.VectorStore:
    """A store as the environment has it, but of the scratch database and its model."""
    return db.connect(
        url,
        plan.redis_url or False,
        embedder=material,
        distance="cosine",
        maintenance_url=None,
        maintenance_on_close=False,
        cache_ttl_s=round(plan.seconds) + _CACHE_KEPT_S,
    )


def run(url: str, plan: LoadPlan, number: int) -> dict[str, Any] | None:
    """Open a store, say so, work when told to. Returns what came of it; None where it was told to end."""
    material = Material(plan.vectors())
    with open_store(url, plan, material) as store:
        crew = Crew(store, material, plan, number)
        print("ready", flush=True)
        if sys.stdin.readline().strip() != "go":
            return None
        started = time.monotonic()
        crew.start()
        most_waiting = _watch_pool(store, started + plan.seconds)
        outcome = crew.stop()
        seconds = time.monotonic() - started
        pool = _pool_of(store) | {"most_waiting": most_waiting}
    return {"seconds": seconds, "pool": pool, **outcome.as_json()}


def _watch_pool(store: db.VectorStore, until: float) -> int:
    """Wait until then, or until the input ends. Returns how many callers at most were seen to wait at once."""
    most = 0
    while time.monotonic() < until:
        most = max(most, store.pool.get_stats().get("requests_waiting", 0))
        if select.select([sys.stdin], [], [], _LOOK_EVERY_S)[0]:
            break
    return most


def _pool_of(store: db.VectorStore) -> dict[str, int]:
    stats = store.pool.get_stats()
    return {name: stats.get(name, 0) for name in (*_COUNTERS, "pool_max")}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    request = json.loads(sys.stdin.readline())
    result = run(request["url"], LoadPlan(**request["plan"]), request["number"])
    if result is not None:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
