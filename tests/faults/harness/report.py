"""What a run showed, as text and as JSON."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from .checker import Findings

SHOWN = 20


@dataclass
class Report:
    """The sum of all rounds. `recoveries` are milliseconds from the end of a fault to the next acknowledged write."""

    seed: str
    bounded_ttl_s: float
    machine: str = ""
    rounds: int = 0
    seconds: float = 0.0
    injected: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    survived: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    missed: Counter = field(default_factory=Counter)  # faults that found nothing to strike
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    operations: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    connections_leaked: int = 0
    leaks: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def ok(self):
        return self.findings.clean and not self.unexpected and not self.connections_leaked

    def struck(self, family, name, recovered_ms):
        self.injected[family][name] += 1
        if recovered_ms is not None:
            self.survived[family][name] += 1
            self.recoveries[family].append(recovered_ms)
        else:
            self.unexpected.append(f"no write was acknowledged within a minute after {family}: {name}")

    def as_dict(self):
        found = self.findings
        every = [one for recoveries in self.recoveries.values() for one in recoveries]
        return {
            "ok": self.ok,
            "seed": self.seed,
            "machine": self.machine,
            "rounds": self.rounds,
            "seconds": round(self.seconds, 1),
            "faults": {
                family: {name: {"injected": n, "survived": self.survived[family][name]} for name, n in names.items()}
                for family, names in self.injected.items()
            },
            "faults_injected": sum(names.total() for names in self.injected.values()),
            "faults_survived": sum(names.total() for names in self.survived.values()),
            "faults_without_target": dict(self.missed),
            "operations": dict(self.operations),
            "refused": dict(self.refused),
            "writes_acknowledged": found.acknowledged,
            "writes_unacknowledged": found.unacknowledged,
            "acknowledged_lost": len(found.lost),
            "reads": dict(found.reads),
            "stale_reads": len(found.stale),
            "bounded_staleness_ms": round(found.bounded_staleness_ms, 1),
            "bounded_bound_ms": self.bounded_ttl_s * 1000,
            "duplicates": len(found.twice),
            "half_documents": len(found.half),
            "other": len(found.other),
            "recovery_ms": _quantiles(every),
            "recovery_ms_by_family": {family: _quantiles(one) for family, one in self.recoveries.items()},
            "connections_leaked": self.connections_leaked,
            "unexpected": self.unexpected[:SHOWN],
            "details": [*self.leaks, *found.lost, *found.stale, *found.half, *found.twice, *found.other][:SHOWN],
        }

    def lines(self):
        """The report for people."""
        told = self.as_dict()
        reads, bound_ms = told["reads"], told["bounded_bound_ms"]
        yield f"seed {self.seed}, {self.machine}: {self.rounds} rounds, {self.seconds:.0f} s"
        yield "  nothing was found" if self.ok else "  FAILED"
        for family, names in sorted(told["faults"].items()):
            times = told["recovery_ms_by_family"].get(family, {})
            yield f"  {family}: recovery p50 {times.get('p50')} ms, p99 {times.get('p99')} ms"
            for name, count in sorted(names.items()):
                yield f"    {name:52} {count['injected']:5} injected {count['survived']:5} survived"
        yield f"  document versions acknowledged {told['writes_acknowledged']:9}   lost {told['acknowledged_lost']}"
        yield f"  not acknowledged               {told['writes_unacknowledged']:9}   half {told['half_documents']}"
        for mode in ("strict", "bounded"):
            all_, cached, cut = (reads.get(f"{mode}{what}", 0) for what in ("", " cached", " incomplete"))
            yield f"  {mode + ' reads':30} {all_:9}   from the cache {cached}, told to be incomplete {cut}"
        yield f"  stale reads {told['stale_reads']}, duplicates {told['duplicates']}, other {told['other']}"
        yield f"  oldest bounded read {told['bounded_staleness_ms']:.0f} ms; the bound is {bound_ms} ms"
        p50, p99 = (told["recovery_ms"][name] for name in ("p50", "p99"))
        yield f"  recovery p50 {p50} ms, p99 {p99} ms; connections leaked {told['connections_leaked']}"
        yield f"  calls refused, by error: {told['refused']}"
        yield f"  faults that found nothing to strike: {told['faults_without_target']}"
        for problem in (*told["unexpected"], *told["details"]):
            yield f"  ! {problem}"


def _quantiles(values):
    ordered = sorted(values)
    at = {name: min(len(ordered) - 1, int(share * len(ordered))) for name, share in (("p50", 0.5), ("p99", 0.99))}
    return {name: round(ordered[index]) if ordered else None for name, index in at.items()}
