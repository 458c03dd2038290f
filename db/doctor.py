"""The doctor: runs every check, mends on request what is safe to mend, and never stops at a fault.

A check that itself fails is a finding, and the others go on. Mending touches no document and no chunk; whether
it helped is told by a second look, not by the absence of an error.
"""

import logging
from collections.abc import Callable, Iterator

import psycopg
import redis
from psycopg import errors as pg

from .checks import CHECKS, NOT_LOOKED_AT
from .checks.base import Check, Examination, Found, Limits, fail, ok, warn
from .config import Settings
from .engine import Database
from .errors import VectorKeepError
from .types import Finding

__all__ = ["Limits", "examine"]

logger = logging.getLogger("vectorkeep")

OnCheck = Callable[[str, str | None], None]


def examine(
    settings: Settings,
    *,
    fix: bool = False,
    database: Database | None = None,
    limits: Limits | None = None,
    on_check: OnCheck | None = None,
) -> list[Finding]:
    """Findings of all checks, at least one each, in the order of `db.checks.CHECKS`.

    Works where no store can be opened: what is in the way is a finding, and what could not be looked at for
    that reason is the last one. `database` is that of a store that is open: its pool is looked at, too.
    """
    findings: list[Finding] = []
    missed: list[str] = []
    with Examination(settings, limits or Limits(), database) as examination:
        for check in CHECKS:
            if on_check is not None:
                on_check(check.name, None)
            if examination.can(check.needs):
                findings += _findings(check, examination, fix=fix)
            else:
                missed.append(check.name)
        reason = examination.trouble or examination.schema_trouble
    if missed:
        evidence = f"{reason}, so these were not looked at: {', '.join(missed)}"
        findings.append(
            Finding(NOT_LOOKED_AT, "warn", evidence, "mend that first, then run 'vectorkeep doctor'", False)
        )
    return findings


def _findings(check: Check, examination: Examination, *, fix: bool) -> Iterator[Finding]:
    first = _look(check, examination)
    mended, refused = _mend(check, first) if fix else ({}, {})
    found = _look(check, examination) if mended or refused else first
    still = {one.subject for one in found if one.status != "ok"}
    fixed = [one for one in first if one.subject in mended and one.subject not in still]
    for one in fixed:
        logger.info("doctor.fixed", extra={"check": check.name, "what": mended[one.subject]})
        yield Finding(check.name, "ok", f"{one.evidence}; fixed: {mended[one.subject]}", "", True)
    for one in found:
        if one.status == "ok" and fixed:
            continue
        why_not = refused.get(one.subject, "") if one.status != "ok" else ""
        evidence = f"{one.evidence}; not fixed: {why_not}" if why_not else one.evidence
        yield Finding(check.name, one.status, evidence, one.remedy, False)


def _look(check: Check, examination: Examination) -> list[Found]:
    """What the check found, or why it could not look."""
    try:
        return list(check.look(examination)) or [ok(check.fine)]
    except pg.InsufficientPrivilege as exc:
        return [warn(f"not permitted: {_line(exc)}", "run it as a role that may, or GRANT pg_monitor to this one")]
    except (pg.QueryCanceled, pg.LockNotAvailable) as exc:
        return [warn(f"could not look: {_line(exc)}", "run it again later; 'blockers' tells who holds a lock")]
    except redis.RedisError as exc:
        return [warn(f"Redis did not answer this: {_line(exc)}", "see the check 'redis'")]
    except Exception as exc:  # one broken check must not hide what the others see
        logger.debug("doctor.check_failed", extra={"check": check.name}, exc_info=True)
        return [fail(f"the check itself failed: {type(exc).__name__}: {_line(exc)}", "")]


def _mend(check: Check, found: list[Found]) -> tuple[dict[str, str], dict[str, str]]:
    """What was mended, and what could not be and why, by subject."""
    mended: dict[str, str] = {}
    refused: dict[str, str] = {}
    for one in found:
        if one.status == "ok" or one.mend is None:
            continue
        try:
            mended[one.subject] = one.mend()
        except (VectorKeepError, psycopg.Error, redis.RedisError, OSError) as exc:
            refused[one.subject] = _line(exc)
            logger.warning("doctor.not_fixed", extra={"check": check.name, "reason": _line(exc)})
    return mended, refused


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())
