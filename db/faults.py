"""Faults on request: named points in the code at which a test has the process die, fail or stand still.

VECTORKEEP_FAULT=<point>:<action>, several separated by commas. Actions: `kill` (as by the kernel, nothing is tidied
up), `stop` (until SIGCONT) and `raise`; `kill@3` waits for the third time that the point is reached. Without the
variable a point costs one look at an empty dict.
"""

import os
import signal
from collections import Counter


class InjectedFault(Exception):  # noqa: N818  (it is a fault on purpose)
    """Raised at a point whose action is `raise`."""


def _parse(text: str) -> dict[str, str]:
    return dict(part.strip().rpartition(":")[::2] for part in text.split(",") if part.strip())


_reached: Counter[str] = Counter()
_PLAN = _parse(os.environ.get("VECTORKEEP_FAULT", ""))


def point(name: str) -> None:
    """Do what was requested for the point `name`, usually nothing."""
    if _PLAN and name in _PLAN:
        _strike(name, _PLAN[name])


def _strike(name: str, action: str) -> None:
    action, _, time = action.partition("@")
    _reached[name] += 1
    if _reached[name] != int(time or _reached[name]):
        return
    if action == "raise":
        raise InjectedFault(name)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action])
