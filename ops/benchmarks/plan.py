"""What one run measures: sizes, rounds, vectors, and where its progress and its figures go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import db

from .report import Figure
from .rows import Vectors
from .scratch import Scratch, ScratchDatabase
from .timing import Say, Side, Times, compete


class UnequalWork(db.VectorKeepError):
    """A side of a comparison did not do the work that is measured: it left other rows, or counted other ones."""


@dataclass
class Run:
    """One run of the benchmark.

    rows: what most measures write. vectors: of most measures. wide: others, for some of them, a quarter as many
    rows; None for no such. least_s: measures of which a round takes less than a second or two have more rounds, until
    they took this long: what else a shared machine does comes and goes in seconds.
    """

    scratch: Scratch
    rows: int
    rounds: int
    vectors: Vectors
    wide: Vectors | None
    say: Say
    least_s: float = 0.0
    figures: list[Figure] = field(default_factory=list)

    def add(self, *figures: Figure) -> None:
        self.figures += figures
        for figure in figures:
            self.say("  " + "  ".join(part for part in figure.as_row() if part))

    def variants(self) -> list[tuple[Vectors, int]]:
        """The vectors, each with the number of rows that are written of it."""
        return [(self.vectors, self.rows), *([(self.wide, max(self.rows // 4, 1))] if self.wide else [])]

    def compete(
        self,
        databases: Sequence[ScratchDatabase],
        sides: Mapping[str, Side],
        *,
        prepare: Callable[[str], None] = lambda _side: None,
        equal: Sequence[str] = (),
        vacuum: bool = True,
        repeated: bool = False,
    ) -> Times:
        """Time `sides` over `databases`, which are at rest before every start, and vacuumed where `vacuum` says so.

        repeated: short rounds may be repeated, the sides need not know how often.
        In the first round those named `equal` must leave the (first) database alike; else raises UnequalWork.
        """
        left: dict[str, object] = {}

        def make_ready(side: str) -> None:
            prepare(side)
            for database in databases:
                database.settle(vacuum=vacuum)

        def look(side: str, number: int) -> None:
            if number == 0 and side in equal:
                left[side] = databases[0].fingerprint()

        least_s = self.least_s if repeated else 0.0
        times = compete(sides, rounds=self.rounds, prepare=make_ready, say=self.say, after=look, least_s=least_s)
        for side in equal:
            if left[side] != left[equal[0]]:
                raise UnequalWork(f"{side!r} left {left[side]}, and {equal[0]!r} {left[equal[0]]}")
        return times
