"""Timing two or more ways to do one thing, so that what the machine does besides hits all of them alike."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Say = Callable[[str], None]
Side = Callable[[int], object]  # does the work once; is told the number of the round, from 0

# Rounds that are repeated because they are short come to no more than this many times what was asked for.
_MOST_REPEATS = 4


@dataclass(frozen=True)
class Times:
    """Seconds that each side took, a value a round."""

    seconds: Mapping[str, Sequence[float]]

    def median_s(self, side: str) -> float:
        return median(self.seconds[side])

    def speedups(self, side: str, than: str) -> list[float]:
        """How many times faster `side` was in each round. Rounds are compared each with itself: machines drift."""
        return [other / own for own, other in zip(self.seconds[side], self.seconds[than], strict=True)]


def compete(
    sides: Mapping[str, Side],
    *,
    rounds: int,
    prepare: Callable[[str], None],
    say: Say,
    after: Callable[[str, int], None] = lambda _side, _number: None,
    least_s: float = 0.0,
) -> Times:
    """Time the `sides` in turns, in an order that alternates: `rounds` times, and then until they took `least_s`.

    Before each, untimed: `prepare(side)` makes the state that all start from, and Python collects its garbage.
    `after(side, number)` looks at what it left, untimed too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(_MOST_REPEATS * rounds):
        if number >= rounds and sum(map(sum, seconds.values())) >= least_s:
            break
        for name in order_of(list(sides), number):
            prepare(name)
            gc.collect()
            started = time.perf_counter()
            sides[name](number)
            seconds[name].append(time.perf_counter() - started)
            say(f"  round {number + 1}, {name}: {seconds[name][-1]:.3f} s")
            after(name, number)
    return Times(seconds)


def order_of(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: forwards, then backwards, each time begun one further on."""
    first = number // 2 % len(names)
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if number % 2 else turned
