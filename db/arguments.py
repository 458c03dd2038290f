"""The arguments of calls, checked before anything is asked of a server: numbers, times, ids and what to choose from."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from .config import Consistency
from .documents import check_key
from .errors import ValidationError
from .values import shown

MAX_SECONDS = 1e6
MAX_AGE = timedelta(days=36_500)


def check_count(name: str, value: Any, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
        raise ValidationError(f"{name} is {shown(value)}; expected an integer from 1 to {highest}")


def check_number(name: str, value: Any, lowest: float, highest: float) -> None:
    """Raise ValidationError where `value` is no number within the bounds, which are allowed themselves."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise ValidationError(f"{name} is {shown(value)}; expected a number from {lowest:g} to {highest:g}")


def check_ids(ids: Any) -> list[str]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ValidationError(f"ids is {shown(ids)}; expected a sequence of ids")
    return [check_key("id", id_) for id_ in ids]


def check_min_age(value: Any) -> None:
    if value is not None and (not isinstance(value, timedelta) or abs(value) > MAX_AGE):
        raise ValidationError(f"min_age is {shown(value)}; expected a timedelta of at most {MAX_AGE.days} days")


def check_bulk(bulk: Any) -> None:
    if not isinstance(bulk, bool) and not (isinstance(bulk, str) and bulk == "auto"):
        raise ValidationError(f"bulk is {shown(bulk)}; expected True, False or 'auto'")


def check_consistency(consistency: Any) -> Consistency:
    if not isinstance(consistency, str) or consistency not in ("strict", "bounded"):
        raise ValidationError(f"consistency is {shown(consistency)}; expected 'strict' or 'bounded'")
    return consistency  # type: ignore[return-value]
