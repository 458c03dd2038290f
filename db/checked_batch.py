"""The inputs of one batch, checked a run at a time: the server compares one run while the next is checked."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from .documents import HashedItem
from .errors import ValidationError
from .tally import Tally
from .values import shown

H = TypeVar("H", bound=HashedItem)

_RUN = 250


class CheckedBatch(Generic[H]):
    """The valid ones of a batch, the last of each id. The others are counted, once."""

    def __init__(self, batch: Iterable[Any], check: Callable[[Any], H], tally: Tally) -> None:
        """check: makes of an input what is stored, or raises ValidationError."""
        self._valid: dict[str, H] = {}
        self._checked: list[list[H]] = []
        self._unchecked = self._check(batch, check, tally)
        self._failure: Exception | None = None

    def runs(self) -> Iterator[list[H]]:
        """The valid ones, a run at a time, from the beginning. A later run may have an id of an earlier one again.

        Where `check` or the batch itself raised anything else, it raises that, however often it is asked.
        """
        yield from list(self._checked)
        while (run := self._next_run()) is not None:
            self._checked.append(run)
            yield run

    def _next_run(self) -> list[H] | None:
        if self._failure is not None:  # the generator has ended with it, and would seem to have brought all
            raise self._failure
        try:
            return next(self._unchecked, None)
        except Exception as exc:
            self._failure = exc
            raise

    def items(self) -> list[H]:
        """All of them, the last of each id."""
        for _ in self.runs():
            pass
        return list(self._valid.values())

    def _check(self, batch: Iterable[Any], check: Callable[[Any], H], tally: Tally) -> Iterator[list[H]]:
        run: dict[str, H] = {}
        for given in batch:
            try:
                checked = check(given)
            except ValidationError as exc:
                tally.fail(id_of(given), str(exc))
                continue
            if (earlier := self._valid.pop(checked.id, None)) is not None:
                run.pop(checked.id, None)
                checked.follow(earlier)
                tally.supersede()
            self._valid[checked.id] = run[checked.id] = checked
            if len(run) == _RUN:
                yield list(run.values())
                run = {}
        if run:
            yield list(run.values())


def id_of(given: Any) -> str:
    """The id of an input that may be anything and is not checked yet; where it has none that is text, what it has."""
    id_ = given.get("id") if isinstance(given, Mapping) else getattr(given, "id", None)
    return id_ if isinstance(id_, str) else shown(id_)
