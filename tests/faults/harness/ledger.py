"""What a worker tells of itself: one line of JSON an event, through a pipe that outlives it."""

import itertools
import json
import os
import threading
import time
from dataclasses import dataclass, field

_DISORDER_NS = 60_000_000_000  # no line comes later than this behind another's


def now():
    """Nanoseconds on the clock that all processes of a machine share."""
    return time.monotonic_ns()


class Writer:
    """The worker's end."""

    def __init__(self, descriptor):
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._number = 0

    def tell(self, event, **fields):
        line = json.dumps({"event": event, "at": now(), **fields}, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]

    def intend(self, kind, documents):
        """Note what is about to be written, {id: [version, source or None]}; returns the number of the operation."""
        self._number += 1
        self.tell("intent", n=self._number, kind=kind, documents=documents)
        return self._number


@dataclass
class Ledger:
    """All that the workers of one round told."""

    operations: list = field(default_factory=list)  # intents, with "acked" once it came
    reads: list = field(default_factory=list)
    errors: list = field(default_factory=list)
    closed: list = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def follow(self, descriptor, slot):
        """Read a worker's pipe to its end, which is the end of the worker."""
        pending = {}
        with os.fdopen(descriptor, "rb") as pipe:
            for line in pipe:
                try:
                    event = json.loads(line)
                except ValueError:  # cut off by a kill
                    continue
                self._take(event, slot, pending)

    def _take(self, event, slot, pending):
        kind = event["event"]
        with self._changed:
            if kind == "intent":
                operation = {**event, "slot": slot, "acked": None, "failed": ()}
                pending[event["n"]] = operation
                self.operations.append(operation)
            elif kind == "ack":
                pending.pop(event["n"]).update(acked=event["at"], failed=event["failed"])
            elif kind == "read":
                self.reads.append(event)
            elif kind == "error":
                self.errors.append({**event, "slot": slot})
            else:
                self.closed.append({**event, "slot": slot})
            self._changed.notify_all()

    def first_ack(self, after, timeout_s, slot=None):
        """When the first write that began `after` was acknowledged; None where none was in time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if acked := self._acked(after, slot):
                    return min(acked)
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.wait(min(left, 1))

    def _acked(self, after, slot):
        """When writes were acknowledged that began `after`."""
        late = itertools.takewhile(lambda operation: operation["at"] > after - _DISORDER_NS, reversed(self.operations))
        mine = (operation for operation in late if slot in (None, operation["slot"]))
        return [operation["acked"] for operation in mine if operation["at"] > after and operation["acked"]]

    def versions(self, slot):
        """The last intended [version, source] of each document of `slot`."""
        with self._changed:
            mine = [operation["documents"] for operation in self.operations if operation["slot"] == slot]
        return {id_: state for documents in mine for id_, state in documents.items()}
