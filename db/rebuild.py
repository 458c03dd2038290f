"""Rebuild: the tables made again beside the live ones, checked, and swapped in, without downtime.

Ingestion is paused while the shadow is filled: what is written in between would be lost. Searches go on in the live
tables until one short transaction exchanges the two. Whatever stops a rebuild before that, the live store is as it
was; the replaced tables are kept, and `roll_back` exchanges them once more.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import psycopg
from psycopg import Connection
from psycopg.sql import SQL, Identifier

from . import faults
from .config import Settings
from .embedding import TextEmbedder
from .embedding_model import Model
from .engine import Database
from .errors import ValidationError, translated
from .ingestion import Ingestion
from .locks import Purpose, advisory_lock
from .opening import OpenParts
from .pause import MAX_TTL_S
from .rebuild_plan import Items, RebuildPlan, RebuildResult, target_model
from .rebuild_runs import (
    FAILED,
    SWAPPED,
    advance_run,
    begin_run,
    clear_remains_locked,
    end_run,
    model_to,
    previous_oids,
    require_lock,
)
from .registry import StoreModel
from .shadow import (
    SHADOW,
    TABLES,
    add_foreign_keys,
    build_indexes,
    create_schema,
    create_tables,
    definitions_of,
    drop_schema,
    home_of,
    in_shadow,
    shadow_database,
    size_of,
)
from .shadow_checks import Side, measured_recall, neighbour_overlap
from .shadow_fill import Revectoring, carry_over, copy_rows, count_kept, count_rows, warm_vector_cache
from .swap import PREVIOUS, Exchange, Swap
from .tally import Tally
from .types import Embedder, Item

logger = logging.getLogger("vectorkeep")

# Recall may be this much lower than the live store's: a sample does not tell closer.
_RECALL_SLACK = 0.05
_BATCH = 1000
_SHOWN_FAILURES = 5
_LAST_WRITE = "SELECT coalesce(max(id), 0) FROM write_log"
_RECORDS = ("index_builds", "recall_measurements")
_RECORD_COLUMNS = """
    SELECT attname FROM pg_attribute
    WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped AND attidentity = ''
"""


def rebuild(settings: Settings, plan: RebuildPlan, embedder: Embedder | None = None) -> RebuildResult:
    """Make the tables again as `plan` says, and swap them in.

    Raises BusyError where another rebuild, a maintenance or a bulk load runs, or the tables' locks are not to be had;
    ValidationError where the new tables do not pass the checks; PermissionDeniedError, SchemaError. The store is then
    as it was.
    """
    with rebuild_session(settings) as (parts, lead):
        return _Rebuild(parts, lead, plan, embedder).run()


@contextmanager
def rebuild_session(settings: Settings) -> Iterator[tuple[OpenParts, Connection[Any]]]:
    """An open store and the leading connection, which keeps out all that would be in the way."""
    settings = settings.model_copy(update={"model_id": None, "dimensions": None})
    with translated(), ExitStack() as stack:
        parts = OpenParts(settings)
        stack.callback(parts.close)
        lead = stack.enter_context(parts.database.maintenance())
        for purpose in (Purpose.REBUILD, Purpose.MAINTENANCE, Purpose.BULK_LOAD):
            stack.enter_context(advisory_lock(lead, purpose, wait_s=0))
        lead.execute("SET row_security = off")  # rows that a policy hides must fail the copy, not be missing from it
        yield parts, lead


class _Rebuild:
    """One rebuild."""

    def __init__(self, parts: OpenParts, lead: Connection[Any], plan: RebuildPlan, embedder: Embedder | None) -> None:
        self.parts = parts
        self.lead = lead
        self.plan = plan
        self.live_model = parts.model.registered
        self.model = target_model(self.live_model, plan, embedder, parts.settings)
        self.embedder = None if embedder is None else TextEmbedder(parts.database, embedder, parts.chunker)
        self.details: list[str] = []
        self.started = time.monotonic()
        self.run_id = 0
        self.swap: Swap | None = None
        self.counts = {"copied": 0, "ingested": 0}
        self.figures: dict[str, float | None] = {}

    def run(self) -> RebuildResult:
        self.home, self.owner = home_of(self.lead)
        self._clear_earlier()
        self._warn_of_space()
        self.run_id = begin_run(self.lead, self.model, {"sources": sorted(self.plan.sources)})
        try:
            self._step("measuring", None)  # of the live store, before anybody is kept waiting
            if self.live_model is not None:
                self.figures["recall_before"] = measured_recall(self._live_side(self.live_model), self._target_recall)
            self._step("pausing", "waits for the writes under way")
            pause = self.parts.pause.begin("the tables are rebuilt", ttl_s=MAX_TTL_S)
            paused_at = time.monotonic()
            [(last_write,)] = self.lead.execute(_LAST_WRITE).fetchall()
            self._step("creating", None)
            definitions = definitions_of(self.lead)
            create_tables(self.lead, self.owner, self.model)
            with shadow_database(self.parts.database, self.lead) as shadow:
                self._fill(shadow)
                self._index_and_check(shadow)
            assert pause.owner_pid is not None
            self._swap(Exchange(self.home, definitions, self.live_model, self.model, last_write, pause.owner_pid))
        except BaseException as exc:
            if self.swap is not None and self.swap.done:
                self._tidy()
            else:
                self._give_up(exc)
            raise
        self._tidy()
        return self._result(time.monotonic() - paused_at)

    # -- the steps -------------------------------------------------------------------------------------

    def _step(self, name: str, details: str | None) -> None:
        """Record and tell that the step `name` begins; the one before is over."""
        faults.point(f"rebuild.{name}")
        advance_run(self.lead, self.run_id, name)
        logger.info("rebuild.step", extra={"step": name, "details": details})
        self._tell(name, details)

    def _tell(self, name: str, details: str | None) -> None:
        if self.plan.on_progress is not None:
            self.plan.on_progress(name, details)

    def _clear_earlier(self) -> None:
        if remains := clear_remains_locked(self.lead):
            self.details.append(f"cleared what an earlier rebuild left: {remains}")

    def _warn_of_space(self) -> None:
        """The disk can be looked at where the server is ours."""
        needed = size_of(self.lead)
        if self.parts.settings.postgres_url() is None:
            free = shutil.disk_usage(self.parts.settings.home).free
            if free < needed:
                warning = f"the new tables need about {needed:,} bytes and the disk has {free:,} free"
                logger.warning("rebuild.space", extra={"needed_bytes": needed, "free_bytes": free})
                self.details.append(warning)

    def _fill(self, shadow: Database) -> None:
        self._step("filling", None)
        left_out = sorted(self.plan.sources)
        copied = self._copy(shadow, left_out)
        for table in TABLES:
            if copied[table] != (live := count_kept(self.lead, table, left_out)):
                raise ValidationError(f"{copied[table]} rows of {table} were copied, {live} are there; run it again")
        self.counts["copied"] = copied["embeddings"]
        if self.plan.sources:
            copied["embeddings"] += self._ingest(shadow)
            carry_over(self.lead, left_out)
        self.counts |= {table: count_rows(self.lead, SHADOW, table) for table in TABLES}
        if self.counts["embeddings"] != copied["embeddings"]:
            raise _mixed("embeddings", self.counts["embeddings"], copied["embeddings"])

    def _copy(self, shadow: Database, left_out: list[str]) -> dict[str, int]:
        def on_copied(table: str, rows: int) -> None:
            self._tell("filling", f"{rows:,} rows of {table}")

        if not self.plan.new_model:
            return {table: copy_rows(self.lead, table, left_out, on_copied) for table in TABLES}
        assert self.embedder is not None
        return Revectoring(self.lead, self.embedder, _model_in(shadow), left_out, on_copied).run()

    def _ingest(self, shadow: Database) -> int:
        """Chunk, embed and store the sources that are given, in the shadow, as if it were a store of its own.

        Returns how many documents that added.
        """
        assert self.embedder is not None
        embedder = TextEmbedder(shadow, self.embedder.embedder, self.embedder.chunker)
        if not self.plan.new_model:
            warm_vector_cache(self.lead, list(self.plan.sources), embedder.model_id, embedder.embedder.dimensions)
        ingestion = Ingestion(shadow, _model_in(shadow), lambda _write: None)
        tally = Tally(None, self._on_ingested)
        for source, items in self.plan.sources.items():
            before = tally["inserted"] + tally["updated"]
            ingestion.embed(_of_source(items(), source), embedder, _BATCH, tally)
            if tally.errors:
                shown = "; ".join(f"{id_}: {reason}" for id_, reason in tally.errors[:_SHOWN_FAILURES])
                raise ValidationError(f"{tally['failed']} documents of {source!r} cannot be stored: {shown}")
            if tally["inserted"] + tally["updated"] == before:
                raise ValidationError(f"the source {source!r} holds no documents; to remove it use delete-source")
        self.counts["ingested"] = tally["inserted"] + tally["updated"]
        self.embedder.cache_hits += embedder.cache_hits
        self.embedder.embedded += embedder.embedded
        return tally["inserted"]

    def _on_ingested(self, done: int, _total: int | None) -> None:
        """Between batches: without the lead's lock another rebuild may have made its own shadow of the same name."""
        require_lock(self.lead)
        self._tell("filling", f"{done:,} documents of sources")

    def _index_and_check(self, shadow: Database) -> None:
        with shadow.maintenance() as connection:
            self._step("indexing", None)
            build_indexes(connection, self.home, self.model)
            add_foreign_keys(connection, self.home)
            self._step("checking", None)
            self._check(connection)

    def _check(self, connection: Connection[Any]) -> None:
        """Raise ValidationError where the new tables find less than they must."""
        settings = self.parts.settings
        if self.model is None:
            return
        new = Side(connection, self.model, self.model.ef_search_of(settings))
        after = self.figures["recall"] = measured_recall(new, self._target_recall)
        if self.live_model is not None and self.plan.new_model:
            self._check_overlap(neighbour_overlap(self._live_side(self.live_model), new))
        before = self.figures.get("recall_before") or 0
        least = before - _RECALL_SLACK if self.plan.min_recall is None else self.plan.min_recall
        if after is not None and after < least:
            raise ValidationError(
                f"searches of the new tables find {after:.3f} of the nearest rows, expected at least {least:.3f}; "
                "nothing was changed: raise ef_search, or lower --min-recall"
            )

    def _live_side(self, model: Model) -> Side:
        return Side(self.lead, model, model.ef_search_of(self.parts.settings))

    @property
    def _target_recall(self) -> float:
        return self.parts.settings.target_recall

    def _check_overlap(self, overlap: float | None) -> None:
        self.figures["overlap"] = overlap
        if overlap is not None and overlap < self.plan.min_overlap:
            raise ValidationError(
                f"the new model agrees on {overlap:.3f} of the nearest neighbours, expected at least "
                f"{self.plan.min_overlap:.3f}; nothing was changed: look at what it finds, or lower --min-overlap"
            )

    def _swap(self, what: Exchange) -> None:
        for table in TABLES:  # not in the exchange: while it lasts every search waits
            if (found := count_rows(self.lead, SHADOW, table)) != self.counts[table]:
                raise _mixed(table, found, self.counts[table])
        self._step("swapping", "waits for the searches under way")
        create_schema(self.lead, PREVIOUS, self.owner)
        self.swap = Swap(self.parts, self.lead, what)
        self.swap.run(wait_s=self.plan.swap_wait_s, conclude=self._conclude)

    def _conclude(self) -> None:
        """In the transaction of the swap: the record of the run, and those made in the shadow."""
        for table in _RECORDS:
            rows = self.lead.execute(_RECORD_COLUMNS, (table,)).fetchall()
            columns = SQL(", ").join(Identifier(name) for (name,) in rows)
            statement = SQL("INSERT INTO {} ({}) SELECT {} FROM {}")
            self.lead.execute(statement.format(Identifier(table), columns, columns, in_shadow(table)))
        [(log_id,)] = self.lead.execute(_LAST_WRITE).fetchall()
        end_run(
            self.lead,
            self.run_id,
            SWAPPED,
            log_id=log_id,
            previous_model=model_to(self.live_model),
            previous_oids=previous_oids(self.lead),
            **self.counts,
            **self.figures,
        )

    def _give_up(self, exc: BaseException) -> None:
        """Leave the live store as it was, and nothing of the shadow."""
        with suppress(psycopg.Error):
            drop_schema(self.lead, SHADOW)
            end_run(self.lead, self.run_id, FAILED, reason=f"{type(exc).__name__}: {exc}"[:500])
        self.parts.pause.close()

    def _tidy(self) -> None:
        """Let writers in, and drop what is left of the shadow. The swap is done: this can wait for the next rebuild."""
        self.parts.pause.close()
        with suppress(psycopg.Error):
            drop_schema(self.lead, SHADOW)

    def _result(self, paused_s: float) -> RebuildResult:
        assert self.swap is not None
        return RebuildResult(
            documents=self.counts["embeddings"],
            chunks=self.counts["chunks"],
            copied=self.counts["copied"],
            ingested=self.counts["ingested"],
            embedded=self.embedder.embedded if self.embedder else 0,
            cache_hits=self.embedder.cache_hits if self.embedder else 0,
            model_id=self.model.model_id if self.model else None,
            dimensions=self.model.dimensions if self.model else None,
            recall=self.figures.get("recall"),
            recall_before=self.figures.get("recall_before"),
            overlap=self.figures.get("overlap"),
            paused_s=paused_s,
            swap_ms=self.swap.ms,
            duration_ms=(time.monotonic() - self.started) * 1000,
            details=self.details,
        )


def _mixed(table: str, found: int, filled: int) -> ValidationError:
    return ValidationError(
        f"{found} rows are in the new {table}, {filled} were filled in: another process writes there too; "
        "nothing was changed: run it again when that has ended"
    )


def _model_in(shadow: Database) -> StoreModel:
    model = StoreModel(shadow)
    model.load()
    return model


def _of_source(items: Items, source: str) -> Iterator[Item | Mapping[str, Any]]:
    for given in items:
        if isinstance(given, Item):
            yield replace(given, source_id=source)
        else:
            yield {**given, "source_id": source}
