"""What was measured, in figures: each with what it is compared with, its target, and whether that was met."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from .timing import Times

Verdict = Literal["met", "MISSED", ""]


@dataclass(frozen=True)
class Target:
    """A bound on a figure's ratio, or on its value where it is compared with nothing."""

    bound: float
    at_most: bool = False

    def met_by(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """One line of the report.

    ours, other: in `unit`, medians over the rounds. ratios: a value a round; what is reported is their median.
    conditions: what must hold besides, for the target to be met.
    """

    measure: str
    measured: str
    ours: float
    unit: str
    compared_with: str = ""
    other: float | None = None
    ratios: tuple[float, ...] = ()
    target: Target | None = None
    conditions: Mapping[str, bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    @property
    def verdict(self) -> Verdict:
        held = all(self.conditions.values())
        if self.target is None:
            return "" if held else "MISSED"
        return "met" if held and self.target.met_by(self.ours if self.ratio is None else self.ratio) else "MISSED"

    def as_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "measured": self.measured,
            "ours": self.ours,
            "unit": self.unit,
            "compared_with": self.compared_with or None,
            "other": self.other,
            "ratio": self.ratio,
            "ratios": list(self.ratios),
            "target": str(self.target) if self.target else None,
            "conditions": dict(self.conditions),
            "verdict": self.verdict or None,
            "notes": list(self.notes),
        }

    def as_row(self) -> tuple[str, str, str, str, str, str, str]:
        other = "" if self.other is None else amount(self.other, self.unit)
        failed = [name for name, held in self.conditions.items() if not held]
        verdict = f"{self.verdict}: not so: {', '.join(failed)}" if failed else self.verdict
        target, ratio = str(self.target or ""), self._shown_ratio()
        return (
            self.measured,
            amount(self.ours, self.unit),
            self.compared_with,
            other,
            ratio,
            target,
            verdict,
        )

    def _shown_ratio(self) -> str:
        if self.ratio is None:
            return ""
        return f"{self.ratio:.2f} ({min(self.ratios):.2f}–{max(self.ratios):.2f})"


COLUMNS = ("measured", "ours", "compared with", "that", "ratio", "target", "")


def rate_figure(
    measure: str,
    measured: str,
    times: Times,
    rows: int,
    *,
    side: str,
    other: str,
    target: Target | None = None,
    conditions: Mapping[str, bool] | None = None,
    notes: Sequence[str] = (),
) -> Figure:
    """Rows a second of `side` against `other`, both of which handled `rows` rows."""
    return Figure(
        measure,
        measured,
        rows / times.median_s(side),
        "rows/s",
        other,
        rows / times.median_s(other),
        tuple(times.speedups(side, other)),
        target,
        conditions or {},
        tuple(notes),
    )


def growth_figure(
    measure: str,
    measured: str,
    times: Times,
    *,
    large: str,
    small: str,
    work: float = 1,
    target: Target | None = None,
    notes: Sequence[str] = (),
) -> Figure:
    """How the time grew from `small` to `large`, for equal work: `large` did `work` times as much."""
    return Figure(
        measure,
        measured,
        times.median_s(large),
        "s",
        small,
        times.median_s(small),
        tuple(1 / (speedup * work) for speedup in times.speedups(large, small)),
        target,
        {},
        tuple(notes),
    )


def amount(value: float, unit: str) -> str:
    """`value` with its unit, short."""
    digits = 0 if unit == "rows/s" else 3 if unit == "s" else 1
    return f"{value:,.{digits}f} {unit}"
