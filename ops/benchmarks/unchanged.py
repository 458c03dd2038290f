"""Change detection: rows that did not change at all, and rows of which only the metadata did."""

import random
from collections.abc import Callable, Mapping, Sequence

import db

from .plan import Run, UnequalWork
from .report import Figure, Target, rate_figure
from .rows import KnownVectors, documents, items
from .scratch import ScratchDatabase, Writes
from .timing import Times
from .writes import size, upsert

UNCHANGED_TARGET = Target(8)
HOT_TARGET = Target(95)

_EMBED = "embed_batch, all unchanged"
_UPSERT = "batch_upsert, all unchanged"
_FIRST_EMBED = "first load by embed_batch, vectors ready"
_FIRST_UPSERT = "first load by batch_upsert"

_INDEXED = "embed_batch"
_PLAIN = "the same, no vector index"

Pick = Callable[[int, int], Sequence[int]]  # (number of the round, rows stored) -> the tenth that changes


def measure_unchanged(run: Run) -> None:
    """The same rows once more, against their first load, without a vector index."""
    given = list(documents(run.vectors, 0, run.rows))
    again = items(range(run.rows))
    embedder = KnownVectors(run.vectors, given)
    with run.scratch.database(run.vectors) as database, database.store(embedder) as store:
        database.drop_vector_indexes()

        def prepare(side: str) -> None:
            database.truncate()
            if side in (_EMBED, _UPSERT):
                database.by_hand.copy(given)

        times = run.compete(
            [database],
            {
                _EMBED: lambda _round: _claim_skipped(store.embed_batch(again, bulk=False), run.rows),
                _UPSERT: lambda _round: _claim_unchanged(store.batch_upsert(given, bulk=False), run.rows),
                _FIRST_UPSERT: lambda _round: upsert(store, given, bulk=False),
                _FIRST_EMBED: lambda _round: store.embed_batch(again, bulk=False),
            },
            prepare=prepare,
            repeated=True,
        )
    with run.scratch.database(run.vectors) as database:
        conditions = _conditions_of_unchanged(database, run, given, again)
    measured = f"all rows unchanged, {size(run.rows, run.vectors)}"
    for side, other, target in (
        (_EMBED, _FIRST_UPSERT, None),
        (_EMBED, _FIRST_EMBED, UNCHANGED_TARGET),
        (_UPSERT, _FIRST_UPSERT, None),
    ):
        name = f"{measured}, {side.partition(',')[0]}"
        held = conditions if side == _EMBED else {}
        figure = rate_figure("unchanged", name, times, run.rows, side=side, other=other, target=target, conditions=held)
        run.add(figure)


def _conditions_of_unchanged(
    database: ScratchDatabase, run: Run, given: Sequence[db.Document], again: Sequence[db.Item]
) -> dict[str, bool]:
    """What an `embed_batch` of unchanged rows wrote and asked for, in a database that nobody else looks at."""
    database.drop_vector_indexes()
    database.by_hand.copy(given)
    embedder = KnownVectors(run.vectors)
    before = database.writes()
    with database.store(embedder) as store:
        _claim_skipped(store.embed_batch(again, bulk=False), run.rows)
    written = database.writes().since(before)
    return {"no row written": written == Writes(0, 0, 0, 0), "embedder never called": embedder.asked == 0}


def _claim_skipped(result: db.EmbedResult, rows: int) -> None:
    if result.skipped != rows:
        raise UnequalWork(f"{rows} items did not change, but not all were skipped: {result}")


def _claim_unchanged(result: db.UpsertResult, rows: int) -> None:
    if result.unchanged != rows:
        raise UnequalWork(f"{rows} documents did not change, but were not all taken so: {result}")


def measure_metadata(run: Run) -> None:
    """Metadata of a tenth of five times as many rows changed, with and without a vector index."""
    stored = 5 * run.rows
    with run.scratch.database(run.vectors) as plain:
        plain.drop_vector_indexes()
        plain.by_hand.copy(documents(run.vectors, 0, stored))
        plain.settle()
        with run.scratch.copy_of(plain) as indexed:
            run.say(f"  building a vector index on {stored:,} rows")
            indexed.build_index(stored)
            for place, (name, pick) in enumerate(_PATTERNS.items()):
                _metadata(run, {_INDEXED: indexed, _PLAIN: plain}, stored, name, pick, 1 + place * run.rounds)


def _metadata(
    run: Run,
    databases: Mapping[str, ScratchDatabase],
    stored: int,
    pattern: str,
    pick: Pick,
    first_revision: int,
) -> None:
    changed = [items(pick(number, stored), metadata_revision=first_revision + number) for number in range(run.rounds)]
    embedder = KnownVectors(run.vectors)
    before = databases[_INDEXED].writes()
    with databases[_INDEXED].store(embedder) as indexed, databases[_PLAIN].store(embedder) as plain:
        times = run.compete(
            list(databases.values()),
            {
                _INDEXED: lambda number: _update(indexed, changed[number]),
                _PLAIN: lambda number: _update(plain, changed[number]),
            },
        )
    written = databases[_INDEXED].writes().since(before)
    _add_metadata_figures(run, times, written, stored, pattern, never_asked=embedder.asked == 0)


def _add_metadata_figures(
    run: Run, times: Times, written: Writes, stored: int, pattern: str, *, never_asked: bool
) -> None:
    rows = stored // 10
    measured = f"metadata of {rows:,} of {stored:,} × {run.vectors.dimensions} rows changed, {pattern}"
    share = 100 * written.hot_updated / max(written.updated, 1)
    target = None if pattern == _NEIGHBOURS else HOT_TARGET
    conditions = {"embedder never called": never_asked, "each row updated once": written.updated == rows * run.rounds}
    run.add(
        Figure("metadata", f"{measured}: HOT updates", share, "%", target=target, conditions=conditions),
        rate_figure("metadata", measured, times, rows, side=_INDEXED, other=_PLAIN),
    )


def _update(store: db.VectorStore, changed: Sequence[db.Item]) -> None:
    result = store.embed_batch(changed, bulk=False)
    if result.updated != len(changed):
        raise UnequalWork(f"the metadata of {len(changed)} items changed, but the result is {result}")


def _drawn(number: int, stored: int) -> Sequence[int]:
    return random.Random(number).sample(range(stored), stored // 10)


def _every_tenth(number: int, stored: int) -> Sequence[int]:
    return range(number % 10, stored, 10)[: stored // 10]


def _neighbours(number: int, stored: int) -> Sequence[int]:
    start = number % 10 * (stored // 10)
    return range(start, start + stored // 10)


_NEIGHBOURS = "neighbours"
_PATTERNS: dict[str, Pick] = {
    "scattered, every tenth": _every_tenth,
    "scattered, drawn at random": _drawn,
    _NEIGHBOURS: _neighbours,
}
