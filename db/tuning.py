"""Tuning: the lowest ef_search that meets the target recall, measured, stored with its reason, used by searches."""

import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

from psycopg import Connection

from .config import Settings
from .embedding_model import Model
from .errors import ValidationError
from .models import vector_index_name
from .recall import RecallRequest, measure_recall
from .recall_history import newest_measurement
from .recall_sample import has_vectors
from .search import ALWAYS_EXACT_ROWS, TABLE_OF, Searcher
from .types import Level, RecallReport

# Measured again after so large a share of the rows has changed.
CHANGED_SHARE = 0.2
# A figure from fewer queries would only be noise.
_MIN_QUERIES = 20
_LEAST_S = 1.0
_DEFAULT: int = Settings.model_fields["ef_search"].default

_STATE = """
    SELECT coalesce(index.indisvalid, false), greatest(reltuples, coalesce(n_live_tup, 0))::bigint,
           n_tup_ins + n_tup_upd - n_tup_hot_upd + n_tup_del
    FROM pg_class LEFT JOIN pg_index AS index ON index.indexrelid = to_regclass(%s)
    LEFT JOIN pg_stat_user_tables AS tables ON tables.relid = pg_class.oid
    WHERE pg_class.oid = to_regclass(%s)
"""
_STORE = "UPDATE embedding_models SET ef_search = %s, ef_search_reason = %s WHERE model_id = %s"


@dataclass(frozen=True, slots=True)
class Tuning:
    """What searches are tuned to now. ef_search None: nothing was tuned, the setting counts.

    reports: what was measured before. confirmed: what was measured with the new value, where it is another.
    """

    ef_search: int | None
    reason: str
    reports: Mapping[Level, RecallReport] = field(default_factory=dict)
    confirmed: Mapping[Level, RecallReport] = field(default_factory=dict)


def tuning_due(connection: Connection[Any], model: Model, settings: Settings) -> Mapping[Level, str]:
    """The levels whose recall is to be measured, each with the reason; none where searches compare all rows."""
    due = {level: _why_due(connection, model, level, settings) for level in TABLE_OF}
    return {level: why for level, why in due.items() if why}


def _why_due(connection: Connection[Any], model: Model, level: Level, settings: Settings) -> str:
    state = _state(connection, level)
    if state is None:
        return ""
    rows, changes = state
    last = newest_measurement(connection, model.model_id, level)
    if last is None:
        return "not measured since the index was built"
    if last.target != settings.target_recall:
        return f"the target is {settings.target_recall:g} now, and was {last.target:g}"
    enough = last.recommended_ef_search
    if last.recall < last.target and enough is not None and (model.ef_search is None or model.ef_search < enough):
        return f"it was {last.recall:.3f} with ef_search {last.ef_search}, below the target of {last.target:g}"
    # Sessions tell late what they wrote: it is no change, and after an ANALYZE the server counts those rows twice.
    if changes is None or last.changes is None or changes < last.changes:  # the counters began anew
        changed = abs(rows - last.rows)
    else:
        changed = changes - max(last.changes, last.rows)
    share = changed / max(1, last.rows)
    return f"{share:.0%} of the rows have changed since it was measured" if share > CHANGED_SHARE else ""


def _state(connection: Connection[Any], level: Level) -> tuple[int, int | None] | None:
    """Rows, and changes; None where searches compare all rows, and where there is no vector to search for."""
    table = TABLE_OF[level]
    [(valid, rows, changes)] = connection.execute(_STATE, (vector_index_name(table), table)).fetchall()
    return (rows, changes) if valid and rows > ALWAYS_EXACT_ROWS and has_vectors(connection, level) else None


def tune_ef_search(
    connection: Connection[Any],
    model: Model,
    settings: Settings,
    *,
    k: int = 10,
    sample: int = 200,
    deadline_s: float = 300.0,
    cancel: Event | None = None,
) -> Tuning:
    """Store the lowest ef_search with which both levels meet `target_recall`, and why; open stores take it over.

    Levels whose searches compare all rows are left out. Where no ef_search meets the target, what was tuned
    before stays, and the reason says so. A new value is measured again, with other queries. `connection` is a
    maintenance one, of a role that may update the registry. Raises what `measure_recall` raises.
    """
    ends = time.monotonic() + deadline_s
    request = RecallRequest(
        ef_search=model.ef_search_of(settings), target=settings.target_recall, k=k, sample=sample, cancel=cancel
    )
    reports = _measure_levels(connection, model, request, _searched_by_index(connection), ends)
    tuning = _chosen(model, reports)
    if tuning.reports:
        connection.execute(_STORE, (tuning.ef_search, tuning.reason, model.model_id))
    used = replace(model, ef_search=tuning.ef_search).ef_search_of(settings)
    if used != request.ef_search:
        confirmed = replace(request, ef_search=used)
        tuning = replace(tuning, confirmed=_measure_levels(connection, model, confirmed, tuning.reports, ends))
    return tuning


def _measure_levels(
    connection: Connection[Any], model: Model, request: RecallRequest, levels: Collection[Level], ends: float
) -> dict[Level, RecallReport]:
    """A report of each level; the time that is left is shared among them."""
    searcher, reports = Searcher(), {}
    for waiting, level in zip(range(len(levels), 0, -1), levels, strict=True):
        left_s = (ends - time.monotonic()) / waiting
        if left_s > _LEAST_S and not (request.cancel and request.cancel.is_set()):
            asked = replace(request, level=level, deadline_s=left_s)
            with suppress(ValidationError):  # all its vectors are zero, for one: there is nothing to measure
                reports[level] = measure_recall(connection, searcher, model, asked)
    return reports


def _searched_by_index(connection: Connection[Any]) -> list[Level]:
    return [level for level in TABLE_OF if _state(connection, level)]


def _chosen(model: Model, measured: Mapping[Level, RecallReport]) -> Tuning:
    reports = {level: r for level, r in measured.items() if r.through_index >= _MIN_QUERIES}
    if not reports:
        return Tuning(model.ef_search, f"fewer than {_MIN_QUERIES} searches were measured through an index")
    reason = "; ".join(_sentence(report) for report in reports.values())
    wanted = [report.recommended_ef_search for report in reports.values()]
    met = [value for value in wanted if value is not None]
    if len(met) < len(wanted):
        return Tuning(model.ef_search, f"left as it was: {reason}", reports)
    asked = min(report.queries_from_searches for report in reports.values())
    if asked < _MIN_QUERIES and max(met) < _DEFAULT:
        note = f"not below {_DEFAULT}, for only {asked} queries of real searches are known and stored vectors flatter"
        return Tuning(_DEFAULT, f"{note}; {reason}", reports)
    return Tuning(max(met), reason, reports)


def _sentence(report: RecallReport) -> str:
    begin = f"{report.level}: of {report.sample} queries, recall@{report.k} was {report.recall:.3f} "
    begin += f"with ef_search {report.ef_search}"
    best = report.recommended_ef_search
    if best is None:
        most = max(report.recall_by_ef_search)
        found = report.recall_by_ef_search[most]
        return f"{begin} and is {found:.3f} with {most}, below the target of {report.target:g}: rebuild the index"
    return f"{begin}; {best} is the lowest that meets {report.target:g}, with {report.recall_by_ef_search[best]:.3f}"
