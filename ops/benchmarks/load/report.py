"""What a run under load came to: figures, and verdicts that say what they are based on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plan import LoadPlan
from .samples import Samples, Trend
from .work import OPERATIONS, Outcome

# Beyond it memory counts as growing: the greater of both, between two medians of a minute.
_GROWTH_MB = 5.0
_GROWTH_SHARE = 0.05
# Each store opens its pool's connections, and one at a time beside them: at its beginning, to look at the schema.
DIRECT_CONNECTIONS = 1

OPERATION_COLUMNS = ("operation", "calls", "a second", "p50 ms", "p95 ms", "p99 ms", "max ms")
MEMORY_COLUMNS = ("process", "MB, first", "MB, last", "growth MB", "MB a minute", "open files, first", "last")


@dataclass(frozen=True)
class Verdict:
    """Whether something holds; None where the run cannot tell. `evidence` is what that rests on."""

    what: str
    holds: bool | None
    evidence: str

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "holds": self.holds, "evidence": self.evidence}

    def __str__(self) -> str:
        said = {True: "yes", False: "NO", None: "not judged"}[self.holds]
        return f"{self.what}: {said}; {self.evidence}"


@dataclass(frozen=True)
class LoadReport:
    """One run. results: what each process told. deaths: why others did not. server_connections: for all roles.

    vectors: what those are that were stored, in words.
    """

    plan: LoadPlan
    vectors: str
    results: Sequence[Mapping[str, Any]]
    deaths: Sequence[str]
    samples: Samples
    server_connections: int

    @property
    def outcome(self) -> Outcome:
        whole = Outcome()
        for result in self.results:
            whole.merge(Outcome.from_json(result))
        return whole

    @property
    def seconds(self) -> float:
        return max((float(result["seconds"]) for result in self.results), default=0.0)

    @property
    def pool_max(self) -> int:
        return max((int(result["pool"]["pool_max"]) for result in self.results), default=0)

    @property
    def most_connections(self) -> int:
        """What the documented arithmetic allows."""
        return self.plan.processes * (self.pool_max + DIRECT_CONNECTIONS)

    def operations(self) -> list[dict[str, Any]]:
        """Rates and latencies (ms) of each kind of call that was made."""
        latencies = self.outcome.latencies
        return [
            {
                "operation": name,
                "calls": found.count,
                "per_second": found.count / self.seconds,
                "p50_ms": 1000 * found.percentile_s(50),
                "p95_ms": 1000 * found.percentile_s(95),
                "p99_ms": 1000 * found.percentile_s(99),
                "max_ms": 1000 * found.max_s,
            }
            for name in OPERATIONS
            if (found := latencies.get(name)) is not None and found.count
        ]

    def errors(self) -> list[dict[str, Any]]:
        """Calls that failed, by type, with one example each; and processes that died."""
        outcome = self.outcome
        found = [
            {"kind": kind, "count": count, "example": outcome.examples[kind]}
            for kind, count in outcome.errors.most_common()
        ]
        if self.deaths:
            found.append({"kind": "process died", "count": len(self.deaths), "example": self.deaths[0]})
        return found

    def pool(self) -> dict[str, int]:
        """The pools' own counters, summed over the processes; `most_waiting` and `pool_max` are of one."""
        pools = [result["pool"] for result in self.results]
        summed = {name: sum(pool[name] for pool in pools) for name in (pools[0] if pools else ())}
        return summed | {name: max(pool[name] for pool in pools) for name in ("most_waiting", "pool_max") if pools}

    def processes(self) -> list[dict[str, Any]]:
        """Memory and open files of each process, first and last window after the warm-up."""
        files = self.samples.file_trends()
        return [
            {
                "process": number,
                "first_mb": memory.first,
                "last_mb": memory.last,
                "growth_mb": memory.growth,
                "slope_mb_per_minute": memory.slope_a_minute,
                "files_first": int(files[number].first),
                "files_last": int(files[number].last),
            }
            for number, memory in sorted(self.samples.memory_trends().items())
        ]

    def connections(self) -> dict[str, Any]:
        """Sessions of all processes on the scratch database."""
        seen = self.samples.sessions_trend()
        return {
            "most": max(self.samples.sessions, default=0),
            "allowed": self.most_connections,
            "first": seen.first if seen else None,
            "last": seen.last if seen else None,
            "server": self.server_connections,
            "window_s": seen.window_s if seen else None,
        }

    def verdicts(self) -> list[Verdict]:
        return [
            self._no_errors(),
            self._memory_flat(),
            self._connections_bounded(),
            self._connections_flat(),
            self._fits_server(),
        ]

    def _no_errors(self) -> Verdict:
        calls = sum(int(operation["calls"]) for operation in self.operations())
        errors = sum(int(error["count"]) for error in self.errors())
        return Verdict("no errors", errors == 0 and calls > 0, f"{errors} errors beside {calls:,} calls that succeeded")

    def _memory_flat(self) -> Verdict:
        trends = self.samples.memory_trends()
        if len(trends) < self.plan.processes or not all(trend.judged for trend in trends.values()):
            return Verdict("memory flat", None, "the run was too short to tell; --seconds 600 does")
        number, worst = max(trends.items(), key=lambda item: _over(item[1]))
        evidence = (
            f"most grew process {number}: from {worst.first:.1f} to {worst.last:.1f} MB, "
            f"{worst.slope_a_minute:+.2f} MB a minute; allowed are {_allowed_mb(worst):.1f} MB"
        )
        return Verdict("memory flat", _over(worst) <= 0, evidence)

    def _connections_bounded(self) -> Verdict:
        most = max(self.samples.sessions, default=0)
        evidence = (
            f"at most {most} at once; allowed are {self.most_connections}: "
            f"{self.plan.processes} processes × ({self.pool_max} of the pool + {DIRECT_CONNECTIONS})"
        )
        return Verdict("connections bounded", 0 < most <= self.most_connections, evidence)

    def _connections_flat(self) -> Verdict:
        seen = self.samples.sessions_trend()
        if seen is None or not seen.judged:
            return Verdict("connections do not grow", None, "the run was too short to tell; --seconds 600 does")
        # A pool that never had all its callers at once may open one more at any time.
        holds = seen.growth <= self.plan.processes
        return Verdict("connections do not grow", holds, f"median {seen.first:g} at first, {seen.last:g} at the end")

    def _fits_server(self) -> Verdict:
        holds = self.most_connections <= self.server_connections
        evidence = f"{self.most_connections} may be opened, the server has {self.server_connections} for all its users"
        return Verdict("fits into max_connections", holds, evidence)

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "operations": self.operations(),
            "errors": self.errors(),
            "pool": self.pool(),
            "processes": self.processes(),
            "connections": self.connections(),
            "verdicts": [verdict.as_json() for verdict in self.verdicts()],
        }


def _allowed_mb(trend: Trend) -> float:
    return max(_GROWTH_MB, _GROWTH_SHARE * trend.first)


def _over(trend: Trend) -> float:
    return trend.growth - _allowed_mb(trend)
