"""Recall, measured: the store's own searches against the exact answers to the same questions.

Each question is searched as a user's search goes, and then exactly, in one snapshot. The exact side runs
unprepared, with index scans off, and its plan is looked at: a prepared statement keeps the plan that it has, whatever
is set later, and recall would be 1.000 by definition. Sampled rows are also asked for by their own vector: one that
does not come back is not reachable in the index.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from threading import Event
from typing import Any

from psycopg import Connection, IsolationLevel
from psycopg import errors as pg

from .arguments import MAX_SECONDS, check_count, check_number
from .embedding_model import Model
from .errors import MeasurementError, UnavailableError, ValidationError
from .filters import Filter
from .models import vector_index_name
from .proportion import clustered_interval
from .recall_history import record_measurement
from .recall_sample import Question, choose_questions
from .search import MAX_EF_SEARCH, TABLE_OF, Query, Searcher, check_asked
from .types import Level, Progress, RecallReport, SearchResult

MAX_SAMPLE = 10_000

# Where the lowest ef_search that meets the target is looked for: steps of a quarter or so.
_LADDER = (10, 15, 20, 30, 40, 50, 60, 80, 100, 125, 160, 200, 250, 320, 400, 500, 640, 800, 1000)
# Distances within the rounding of float32 are equal: of unit vectors absolutely, of others relatively.
_ROUNDING = 1e-6
# The share of the time that the comparison itself may take; the rest is for other values of ef_search.
_COMPARING = 0.7
# Where searches of so many questions would compare all rows anyway, those of the others would, too.
_ENOUGH_WITHOUT_INDEX = 10

_APPROXIMATE_INDEXES = """
    SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid JOIN pg_am ON pg_am.oid = relam
    WHERE indrelid = to_regclass(%s) AND amname NOT IN ('btree', 'hash', 'gin', 'gist', 'spgist', 'brin')
"""


@dataclass(frozen=True, slots=True)
class RecallRequest:
    """What to measure, and for how long. Raises ValidationError."""

    ef_search: int
    target: float
    k: int = 10
    sample: int = 200
    level: Level = "documents"
    filter: Filter = field(default_factory=Filter)
    deadline_s: float = 600.0
    cancel: Event | None = None
    on_progress: Progress | None = None

    def __post_init__(self) -> None:
        check_asked(self.k, self.level, self.ef_search)
        check_count("sample", self.sample, MAX_SAMPLE)
        check_number("deadline_s", self.deadline_s, 1e-3, MAX_SECONDS)


@dataclass(frozen=True, slots=True)
class _Trial:
    """One question, asked both ways. reach: the distance within which an answer counts, ties included."""

    question: Question
    reach: float
    possible: int
    found: int
    index_planned: bool
    by_index: bool
    indexed_ms: float
    exact_ms: float
    reached: bool | None  # whether the row found itself through the index; None where that was not asked


def measure_recall(
    connection: Connection[Any], searcher: Searcher, model: Model, request: RecallRequest
) -> RecallReport:
    """Measure, and keep the figures in `recall_measurements` where the role may. `connection` is a maintenance one.

    Raises ValidationError where nothing can be asked; MeasurementError where the exact side would not be exact;
    UnavailableError where not one comparison fits into the time.
    """
    try:
        with _session(connection, request.deadline_s):
            questions = choose_questions(connection, model, request.level, request.filter, request.sample)
            if not questions.asked:
                raise ValidationError(
                    f"there is nothing to measure: no row of {request.level} with a vector passes the filter; "
                    "choose another filter"
                )
            measurement = _Measurement(connection, searcher, model, request)
            measurement.compare(questions.asked)
            recommended = measurement.recommend()
    except pg.QueryCanceled as exc:
        raise UnavailableError(
            f"one statement took longer than the {request.deadline_s:g} s of the whole measurement; "
            "give it a longer deadline_s"
        ) from exc
    report = measurement.report(recommended, questions.zero_vectors)
    try:
        record_measurement(connection, model, report, filtered=request.filter != Filter())
    except (pg.InsufficientPrivilege, pg.ReadOnlySqlTransaction) as exc:
        report.notes.append(f"not kept in recall_measurements: {exc.diag.message_primary}")
    return report


@contextmanager
def _session(connection: Connection[Any], deadline_s: float) -> Iterator[None]:
    """Each question sees one snapshot, and no statement outlasts the whole measurement."""
    before, connection.isolation_level = connection.isolation_level, IsolationLevel.REPEATABLE_READ
    connection.execute("SELECT set_config('statement_timeout', %s, false)", (str(max(1, int(1000 * deadline_s))),))
    try:
        yield
    finally:
        if not connection.closed:
            connection.isolation_level = before
            connection.execute("SET statement_timeout = 0")


class _Measurement:
    """The trials of one measurement."""

    def __init__(self, connection: Connection[Any], searcher: Searcher, model: Model, request: RecallRequest) -> None:
        self.connection = connection
        self.searcher = searcher
        self.model = model
        self.request = request
        self.started = time.monotonic()
        self.trials: list[_Trial] = []
        self.cut_short = False
        self.recall_at: dict[int, float] = {}
        self.index = vector_index_name(TABLE_OF[request.level])
        rows = connection.execute(_APPROXIMATE_INDEXES, (TABLE_OF[request.level],)).fetchall()
        self.approximate = {name for (name,) in rows}

    def compare(self, asked: Sequence[Question]) -> None:
        """Ask each question both ways, until the time for it is over."""
        for number, question in enumerate(asked):
            if self._is_over(_COMPARING) and self.trials:
                self.cut_short = True
                break
            with self.connection.transaction():
                trial = self._try(question)
            if trial.possible:
                self.trials.append(trial)
            if len(self.trials) == _ENOUGH_WITHOUT_INDEX and not any(trial.index_planned for trial in self.trials):
                break  # two exact answers each: more of them tell nothing
            if self.request.on_progress is not None:
                self.request.on_progress(number + 1, len(asked))
        if not self.trials:
            raise ValidationError("there is nothing to measure: no question has an answer but itself")
        self.recall_at[self.request.ef_search] = self._recall([t.found for t in self.trials])

    def _try(self, question: Question) -> _Trial:
        query = self._query(question, self.request.ef_search)
        planned = self.searcher.indexes_planned(self.connection, query, self.model)
        indexed, indexed_ms = self._timed(query)
        index_planned = self.index in planned
        by_index = index_planned and not indexed.exact
        # One that was planned by index and compared all rows in the end: the index brought too few of them.
        ran_dry = index_planned and indexed.exact and self.request.filter == Filter()
        looked_up = question.row_id is not None and (by_index or ran_dry)
        reached = self._reaches_itself(question) if looked_up else None
        exact, exact_ms = self._exactly(query)
        if reached is False and not self._is_there(question):
            reached = None
        reach = exact[-1].distance + self._rounding(exact[-1].distance) if exact else 0.0
        return _Trial(
            question=question,
            reach=reach,
            possible=len(exact),
            found=sum(hit.distance <= reach for hit in indexed),
            index_planned=index_planned,
            by_index=by_index,
            indexed_ms=indexed_ms,
            exact_ms=exact_ms,
            reached=reached,
        )

    def _query(self, question: Question, ef_search: int, *, itself: bool = False) -> Query:
        request = self.request
        exclude_id = None if itself else question.row_id
        return Query(question.vector, request.k, request.level, request.filter, ef_search, False, exclude_id)

    def _timed(self, query: Query) -> tuple[SearchResult, float]:
        started = time.perf_counter()
        result = self.searcher.search(self.connection, query, self.model).result
        return result, (time.perf_counter() - started) * 1000

    @contextmanager
    def _index_preferred(self) -> Iterator[None]:
        """Inside, the index answers also where the server would rather compare the rows of a small table."""
        with self.connection.transaction(force_rollback=True):  # what is set here ends here
            self.connection.execute("SET LOCAL enable_seqscan = off")
            yield

    def _exactly(self, query: Query) -> tuple[SearchResult, float]:
        """The exact answer, in a transaction whose remaining statements use no index scan."""
        query = replace(query, exact=True)
        self.connection.execute("SET LOCAL enable_indexscan = off")
        planned = self.searcher.indexes_planned(self.connection, query, self.model)
        if used := sorted(planned & self.approximate):
            raise MeasurementError(
                f"the exact side would use the index {used[0]}, so there is nothing to compare with; "
                "drop that index, or allow sequential scans (SHOW enable_seqscan)"
            )
        return self._timed(query)

    def _reaches_itself(self, question: Question) -> bool:
        """Whether a row is found by its own vector, at last with the most patient search. Ties will do."""
        own = self._distance_to_itself(question)
        with self._index_preferred():
            for ef_search in sorted({self.request.ef_search, MAX_EF_SEARCH}):
                hits, _ = self._timed(self._query(question, ef_search, itself=True))
                if hits.exact:
                    continue  # the index brought too few, so all rows were compared
                if any(hit.id == question.row_id for hit in hits) or hits[-1].distance <= own + self._rounding(own):
                    return True
        return False

    def _is_there(self, question: Question) -> bool:
        """Whether the exact answer holds the row: another session may have changed it since it was picked."""
        query = replace(self._query(question, self.request.ef_search, itself=True), exact=True)
        return any(hit.id == question.row_id for hit in self._timed(query)[0])

    def _distance_to_itself(self, question: Question) -> float:
        wide = question.vector.astype("f8")
        return -float(wide @ wide) if self.model.distance == "inner_product" else 0.0

    def _rounding(self, distance: float) -> float:
        return _ROUNDING if self.model.distance == "cosine" else _ROUNDING * abs(distance)

    # -- other values of ef_search ---------------------------------------------------------------------

    def recommend(self) -> int | None:
        """The lowest ef_search that was seen to meet the target, the ladder halved until it is found; None without."""
        request = self.request
        # Below k it makes no difference, and where no search uses the index nowhere.
        steps = sorted({step for step in (*_LADDER, min(request.k, MAX_EF_SEARCH)) if step >= request.k})
        low, high = 0, len(steps) if any(trial.by_index for trial in self.trials) else 0
        while low < high:
            middle = (low + high) // 2
            recall = self._recall_with(steps[middle])
            if recall is None:
                break
            low, high = (low, middle) if recall >= request.target else (middle + 1, high)
        return min((ef for ef, recall in self.recall_at.items() if recall >= request.target), default=None)

    def _recall_with(self, ef_search: int) -> float | None:
        """Recall of the same questions with another ef_search; None where the time is over."""
        if ef_search not in self.recall_at:
            found = []
            with self._index_preferred():
                for trial in self.trials:
                    if self._is_over():
                        self.cut_short = True
                        return None
                    hits, _ = self._timed(self._query(trial.question, ef_search))
                    found.append(min(trial.possible, sum(hit.distance <= trial.reach for hit in hits)))
            self.recall_at[ef_search] = self._recall(found)
        return self.recall_at[ef_search]

    def _recall(self, found: Sequence[int]) -> float:
        return sum(found) / sum(trial.possible for trial in self.trials)

    def _is_over(self, share: float = 1.0) -> bool:
        request = self.request
        late = time.monotonic() - self.started > share * request.deadline_s
        return late or (request.cancel is not None and request.cancel.is_set())

    # -- the figures -----------------------------------------------------------------------------------

    def report(self, recommended: int | None, zero_vectors: int) -> RecallReport:
        trials, request = self.trials, self.request
        stored = sum(trial.question.row_id is not None for trial in trials)
        looked_up = [trial.reached for trial in trials if trial.reached is not None]
        return RecallReport(
            recall=self.recall_at[request.ef_search],
            interval=clustered_interval([t.found for t in trials], [t.possible for t in trials]),
            k=request.k,
            sample=len(trials),
            ef_search=request.ef_search,
            recommended_ef_search=recommended,
            indexed_ms_p50=median(trial.indexed_ms for trial in trials),
            exact_ms_p50=median(trial.exact_ms for trial in trials),
            level=request.level,
            target=request.target,
            queries_from_store=stored,
            queries_from_searches=len(trials) - stored,
            through_index=sum(trial.by_index for trial in trials),
            looked_up=len(looked_up),
            unreachable=looked_up.count(False),
            zero_vectors=zero_vectors,
            recall_by_ef_search=dict(sorted(self.recall_at.items())),
            notes=list(self._notes(recommended)),
        )

    def _notes(self, recommended: int | None) -> Iterator[str]:
        trials, request = self.trials, self.request
        direct = sum(not trial.by_index for trial in trials)
        if direct == len(trials):
            yield "no search used the vector index: all rows were compared, as in a user's search of these"
        elif direct:
            yield f"{direct} of {len(trials)} searches compared all rows, as a user's would have"
        if self.cut_short:
            yield f"the time of {request.deadline_s:g} s was over, or it was cancelled; more was to be measured"
        if recommended is None:
            best = max(self.recall_at)
            yield f"no ef_search tried meets {request.target:g}; with {best} it is {self.recall_at[best]:.3f}"
