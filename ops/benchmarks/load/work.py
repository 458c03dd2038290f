"""The threads of one process: each calls the store again as soon as its last call has ended."""

import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

import db

from .latency import Latencies
from .material import Material, Question
from .plan import LoadPlan

BATCH = 100
K = 10
_NEW, _CHANGED = 50, 40  # of a batch; the rest are documents of the batch before, as they were
_BATCHES_A_SOURCE = 4
_SOURCES_KEPT = 2

WRITE = f"write: upsert of {BATCH} documents"
DELETE = f"write: delete of a source of {_NEW * _BATCHES_A_SOURCE}"
CACHED = f"search of {K}, from the cache"
NOT_CACHED = f"search of {K}, not from the cache"
OPERATIONS = (WRITE, DELETE, CACHED, NOT_CACHED)

_REST_AFTER_ERROR_S = 0.05
_KINDS_TOLD = 20

Call = Callable[[], str]  # one call of the store; returns which operation it was


class WrongAnswer(db.VectorKeepError):
    """The store did something, and not what it was asked for."""


class Caller(Protocol):
    """What one thread does."""

    def next_call(self) -> Call:
        """The next call, made ready: what is timed is the store's part alone."""
        ...


@dataclass
class Outcome:
    """What became of the calls of one thread, or of several: it does not grow with their number."""

    latencies: dict[str, Latencies] = field(default_factory=lambda: defaultdict(Latencies))
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def fail(self, exc: Exception) -> None:
        kind = type(exc).__name__
        if kind not in self.errors and len(self.errors) >= _KINDS_TOLD:
            kind = "others"
        self.errors[kind] += 1
        self.examples.setdefault(kind, " ".join(str(exc).split())[:500])

    def merge(self, other: "Outcome") -> None:
        for operation, latencies in other.latencies.items():
            self.latencies[operation].merge(latencies)
        self.errors += other.errors
        self.examples = other.examples | self.examples

    def as_json(self) -> dict[str, Any]:
        latencies = {operation: found.as_json() for operation, found in self.latencies.items()}
        return {"latencies": latencies, "errors": dict(self.errors), "examples": self.examples}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Outcome":
        made = cls(errors=Counter(value["errors"]), examples=dict(value["examples"]))
        made.latencies.update((name, Latencies.from_json(found)) for name, found in value["latencies"].items())
        return made


class Writer:
    """Upserts batches: new documents, changed ones that others change too, unchanged ones; deletes its old sources."""

    def __init__(self, store: db.VectorStore, material: Material, name: str, rows: int) -> None:
        self._store, self._material, self._name, self._rows = store, material, name, rows
        self._draw = np.random.default_rng(list(name.encode()))
        self._batches = 0
        self._sources: deque[str] = deque()
        self._uncertain: set[str] = set()  # sources of which a batch failed: nobody knows how much of it is there
        self._last: list[db.Document] = []

    def next_call(self) -> Call:
        if len(self._sources) > _SOURCES_KEPT and self._batches % _BATCHES_A_SOURCE == 0:
            source = self._sources.popleft()
            return lambda: self._delete(source)
        batch = self._next_batch()
        return lambda: self._checked_upsert(batch)

    def _next_batch(self) -> list[db.Document]:
        source = f"{self._name}-{self._batches // _BATCHES_A_SOURCE}"
        if not self._sources or self._sources[-1] != source:
            self._sources.append(source)
        first = self._batches * _NEW
        ids = [(number, f"{self._name}/{number:09}") for number in range(first, first + _NEW)]
        new = [self._material.document(id_, source, number, self._draw) for number, id_ in ids]
        changed = self._material.changed(self._rows, _CHANGED, self._draw)
        # Those of the source before are gone where it was deleted meanwhile.
        same = [document for document in self._last if document.source_id in self._sources]
        batch = [*new, *changed, *same[: BATCH - len(new) - len(changed)]]
        self._batches += 1
        self._last = new
        return batch

    def _checked_upsert(self, batch: Sequence[db.Document]) -> str:
        try:
            return self._upsert(batch)
        except BaseException:
            self._uncertain.add(self._sources[-1])
            self._last = []
            raise

    def _upsert(self, batch: Sequence[db.Document]) -> str:
        result = self._store.batch_upsert(batch)
        if result.failed:
            raise WrongAnswer(f"{result.failed} of {len(batch)} documents failed, the first: {result.errors[0]}")
        if result.inserted != _NEW or result.inserted + result.updated + result.unchanged != len(batch):
            raise WrongAnswer(f"of {len(batch)} documents {_NEW} were new, but the result is {result}")
        return WRITE

    def _delete(self, source: str) -> str:
        result = self._store.delete_by_source_id(source)
        if result.deleted != _NEW * _BATCHES_A_SOURCE and source not in self._uncertain:
            raise WrongAnswer(f"source {source} held {_NEW * _BATCHES_A_SOURCE} documents, but the result is {result}")
        self._uncertain.discard(source)
        return DELETE


class Reader:
    """Searches for questions that repeat, some of them much more often than others."""

    def __init__(self, store: db.VectorStore, questions: Sequence[Question], name: str) -> None:
        self._store, self._questions = store, questions
        self._draw = random.Random(name)

    def next_call(self) -> Call:
        question = self._questions[int(len(self._questions) * self._draw.random() ** 2)]
        return lambda: self._search(question)

    def _search(self, question: Question) -> str:
        result = self._store.search(question.query, K, **question.filters)
        if len(result) != K:
            raise WrongAnswer(f"there are {K} documents for {question.filters}, but {len(result)} were found")
        return CACHED if result.cached else NOT_CACHED


class Crew:
    """The threads of one process over one store."""

    def __init__(self, store: db.VectorStore, material: Material, plan: LoadPlan, process: int) -> None:
        questions = material.questions()
        writers = [Writer(store, material, f"writer-{process}-{n}", plan.rows) for n in range(plan.writers)]
        readers = [Reader(store, questions, f"reader-{process}-{n}") for n in range(plan.readers)]
        self._callers: list[Caller] = [*writers, *readers]
        self._outcomes = [Outcome() for _ in self._callers]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(caller, outcome), name=f"load-{number}")
            for number, (caller, outcome) in enumerate(zip(self._callers, self._outcomes, strict=True))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> Outcome:
        """Let each end the call it is in. Returns what became of all calls."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        whole = Outcome()
        for outcome in self._outcomes:
            whole.merge(outcome)
        return whole

    def _work(self, caller: Caller, outcome: Outcome) -> None:
        while not self._stop.is_set():
            try:
                call = caller.next_call()
                started = time.perf_counter()
                operation = call()
                outcome.latencies[operation].add(time.perf_counter() - started)
            except Exception as exc:  # noqa: BLE001  (whatever it is, it is counted and told)
                outcome.fail(exc)
                self._stop.wait(_REST_AFTER_ERROR_S)
