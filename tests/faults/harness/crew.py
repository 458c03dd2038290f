"""The worker processes of a round: started, watched, replaced when they die, stopped."""

import multiprocessing
import os
import random
import signal
import threading
import time

from . import workload
from .ledger import now

# Forked from a server that has imported everything: a replacement is at work at once.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([workload.__name__])

SETTINGS = {
    "pool_max": 2,
    "pool_timeout_s": 5,
    "statement_timeout_s": 5,
    "bounded_ttl_s": 3,
    "cache_ttl_s": 60,
}
STOP_WITHIN_S = 60

# {operation that is preferred: points in it}
POINTS = {
    "upsert": [
        "upsert.locked", "upsert.copied_documents", "upsert.inserted", "upsert.updated", "upsert.updated_chunks",
        "write.logged", "write.committed", "write.told",
    ],
    "embed": ["embed.embedded", "upsert.updated", "write.committed"],
    "sync": ["sync.stored", "sync.deleted", "delete.chunks", "delete.documents"],
    "delete": ["delete.chunks", "delete.documents", "write.logged", "write.committed"],
    "detach": ["delete.chunks", "delete.documents"],
    "cleanup": ["cleanup.removed", "cleanup.committed", "cleanup.vacuumed"],
    "bulk": ["bulk_load.dropped", "bulk_load.loaded", "bulk_load.built"],
    "maintain": [
        "maintain.deliver invalidations", "maintain.prune the write log", "maintain.remove leftovers",
        "maintain.build missing indexes", "maintain.vacuum embeddings",
    ],
}  # fmt: skip
READER_POINTS = ["cache.computed", "cache.stored"]


class Crew:
    def __init__(self, servers, ledger, rng, *, writers, readers, baseline, mutations=(), at_points=True):
        self.servers, self.ledger, self.rng = servers, ledger, rng
        self.slots = list(range(writers))
        self.members = [f"r{n}" for n in range(readers)] + self.slots
        self.baseline, self.mutations, self.at_points = baseline, list(mutations), at_points
        self.strikes = []  # (what killed it, when, slot)
        self.unexpected = []
        self._stopping = False
        self._lock = threading.Lock()
        self._killed, self._running = set(), set()
        self._watchers, self._living = [], {}

    def start(self):
        for member in self.members:
            self._spawn(member, first=True)

    def kill(self):
        """kill -9 of one that lives, any of them."""
        with self._lock:
            member, process = self.rng.choice(sorted(self._living.items(), key=str))
            self._killed.add(process.pid)
            process.kill()
        return member

    def stop(self):
        """Let all finish what they are at. Returns those that did not."""
        with self._lock:
            self._stopping = True
            processes = list(self._living.values())
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + STOP_WITHIN_S
        for watcher in self._watchers:
            watcher.join(max(0, deadline - time.monotonic()))
        hung = [process.pid for process in processes if process.pid in self._running]
        for pid in hung:
            os.kill(pid, signal.SIGKILL)
        return hung

    def _spawn(self, member, *, first=False):
        orders = self._orders(member, first)
        receiving, sending = _processes.Pipe(duplex=False)
        process = _processes.Process(target=workload.main, args=(orders, sending), daemon=True)
        process.start()
        sending.close()
        descriptor = os.dup(receiving.fileno())
        receiving.close()
        self._living[member] = process
        self._running.add(process.pid)
        watcher = threading.Thread(target=self._watch, args=(member, process, descriptor, orders["fault"]), daemon=True)
        self._watchers.append(watcher)
        watcher.start()

    def _watch(self, member, process, descriptor, fault):
        self.ledger.follow(descriptor, member)  # its end is that of the process: nobody else holds the pipe
        died = now()
        with self._lock:
            self._running.discard(process.pid)
            if self._stopping:
                return
            if process.pid not in self._killed and not fault:
                self.unexpected.append(f"worker {member} died by itself")  # and would again
                return
            point = "at a random moment" if process.pid in self._killed else f"at {fault.partition(':')[0]}"
            self.strikes.append((point, died, member))
            self._spawn(member)

    def _orders(self, member, first):
        reads = member not in self.slots
        state = {} if reads else self._state(member)
        preferred, fault = self._fault(reads) if self.at_points and self.rng.random() < 0.5 else ("", "")
        return {
            "slot": member,
            "slots": self.slots,
            "reads": reads,
            "seed": self.rng.getrandbits(32),
            "state": state,
            "certain": list(state) if first else [],
            "prefer": "" if reads else preferred,
            "fault": fault,
            "mutations": self.mutations,
            "database_url": self.servers.proxied_url,
            "redis_url": self.servers.redis_url(reads=reads),
            "settings": SETTINGS,
        }

    def _state(self, slot):
        mine = {id_: list(state) for id_, state in self.baseline.items() if id_[1:].startswith(f"{slot}-")}
        return mine | self.ledger.versions(slot)

    def _fault(self, reads):
        if reads:
            return "", f"{self.rng.choice(READER_POINTS)}:kill@{self.rng.randint(1, 300)}"
        operation = self.rng.choice(list(POINTS))
        return operation, f"{self.rng.choice(POINTS[operation])}:kill@{self.rng.randint(1, 4)}"


def seeded(*parts):
    """A generator of its own for each use, so that one more draw here changes nothing there."""
    return random.Random(":".join(map(str, parts)))
