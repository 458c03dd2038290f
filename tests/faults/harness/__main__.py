"""`python -m tests.faults.harness --minutes 60 --seed …`: a long run; exit code 1 where anything was found."""

import argparse
import json
import logging
import secrets
import signal
import sys

from . import conductor
from .faults import FAULTS


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.faults.harness", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", default="", help="decides which faults come when; a new one by default")
    parser.add_argument("--families", nargs="*", default=[], choices=sorted({fault.family for fault in FAULTS}))
    parser.add_argument("--faults", nargs="*", default=[], choices=sorted({fault.name for fault in FAULTS}))
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # with the servers stopped, too
    logging.getLogger("vectorkeep").addHandler(logging.NullHandler())
    seed = given.seed or secrets.token_hex(4)
    plan = conductor.Plan(seed, given.minutes * 60, families=tuple(given.families), faults=tuple(given.faults))
    report = conductor.run(plan, lambda line: print(line, file=sys.stderr, flush=True))
    if given.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print(*report.lines(), sep="\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
