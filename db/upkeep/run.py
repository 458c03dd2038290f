"""One maintenance run: what it may do, its connection, and the outcome of each step."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any, Literal

import psycopg
from psycopg import Connection
from psycopg import errors as pg

from .. import faults
from ..arguments import MAX_AGE, MAX_SECONDS, check_number
from ..embedding_model import Model
from ..engine import Database
from ..errors import VectorKeepError
from ..index_health import inspect_indexes
from ..interruption import Interruption
from ..row_counts import RowCount
from ..types import IndexReport, Step, StepProgress

logger = logging.getLogger("vectorkeep")

Outcome = Literal["done", "skipped", "failed", "not permitted", "not reached"]


@dataclass(frozen=True, slots=True)
class MaintenancePlan:
    """What a run may do, and for how long. Raises ValidationError."""

    skip_compaction: bool = False
    skip_index: bool = False
    skip_cleanup: bool = False
    retention_days: float = 7
    index_stale_threshold: float = 0.1
    dry_run: bool = False
    deadline_s: float | None = None
    cancel: Event | None = None
    on_progress: StepProgress | None = None

    def __post_init__(self) -> None:
        check_number("retention_days", self.retention_days, 0, MAX_AGE.days)
        check_number("index_stale_threshold", self.index_stale_threshold, 0, 1e6)
        if self.deadline_s is not None:
            check_number("deadline_s", self.deadline_s, 0, MAX_SECONDS)


class Skipped(Exception):  # noqa: N818
    """A step had nothing to do, or only told what it would do."""


class NotPermitted(Exception):  # noqa: N818
    """The role may not do this step."""


class Run:
    """What the steps work with, and what became of them."""

    def __init__(
        self, database: Database, connection: Connection[Any], plan: MaintenancePlan, model: Model | None
    ) -> None:
        self.database = database
        self.settings = database.settings
        self.connection = connection
        self.plan = plan
        self.model = model
        self.interruption = Interruption(plan.deadline_s, plan.cancel)
        self.started = time.monotonic()
        self.steps: list[Step] = []
        self.rows_removed = 0
        self.bytes_removed = 0
        self.index_built = False
        self.row_counts: dict[str, RowCount] = {}

    def inspect_indexes(self) -> list[IndexReport]:
        """How the vector indexes are now; the rows of the tables are counted once a run."""
        return inspect_indexes(self.connection, self.model, self.row_counts)

    @property
    def duration_s(self) -> float:
        return time.monotonic() - self.started

    def step(self, name: str, work: Callable[["Run"], str]) -> None:
        """Run one step; its failure is reported and the next one goes on."""
        started = time.perf_counter()
        if reason := self.interruption.reason:
            self.note(name, "not reached", reason)
            return
        self.tell(name, None)
        outcome, details = self._outcome(name, work)
        faults.point(f"maintain.{name}")
        self.steps.append(Step(name, outcome, details, (time.perf_counter() - started) * 1000))

    def _outcome(self, name: str, work: Callable[["Run"], str]) -> tuple[Outcome, str]:
        try:
            with self.interruption.watching(self.connection):
                return "done", work(self)
        except Skipped as exc:
            return "skipped", str(exc)
        except (NotPermitted, pg.InsufficientPrivilege) as exc:
            return "not permitted", str(exc).strip()
        except (psycopg.Error, VectorKeepError) as exc:
            stopped = isinstance(exc, pg.QueryCanceled) or isinstance(exc.__cause__, pg.QueryCanceled)
            if stopped and (reason := self.interruption.reason):
                return "not reached", f"stopped: {reason}"
            details = str(exc).strip()
            logger.warning("maintain.step_failed", extra={"step": name, "reason": details})
            return "failed", details

    def note(self, name: str, outcome: Outcome, details: str) -> None:
        """Report a step that took no time."""
        self.steps.append(Step(name, outcome, details, 0.0))

    def tell(self, step: str, details: str | None) -> None:
        if self.plan.on_progress is not None:
            self.plan.on_progress(step, details)

    def remove(self, statement: str, parameters: Any, what: str) -> str:
        """Execute a DELETE, or say in a dry run what it would remove."""
        if self.plan.dry_run:
            raise Skipped(f"dry run: would remove {what}")
        removed = self.connection.execute(statement.encode(), parameters).rowcount
        self.rows_removed += removed
        return f"removed {removed} {what}"

    def row(self, statement: str, *parameters: Any) -> tuple[Any, ...] | None:
        return self.connection.execute(statement.encode(), parameters).fetchone()
