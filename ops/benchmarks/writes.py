"""Writing: first loads, appends and upserts, with and without a vector index, against hand-written psycopg."""

from typing import Literal

import db

from .plan import Run, UnequalWork
from .report import Target, rate_figure
from .rows import Vectors, documents
from .timing import Side

OURS = "batch_upsert"
COPY = "COPY by hand"
STAGED = "staged SQL by hand"
COPY_ONCE = "COPY by hand, all rows in one transaction"
COPY_UNHASHED = "COPY by hand, no hashes"
STAGED_UNHASHED = "staged SQL by hand, no hashes"
COPY_AND_INDEX = "COPY + CREATE INDEX by hand"
COPY_LIVE = "COPY by hand beside the live index"

FIRST_LOAD_TARGET = Target(0.80)
UPSERT_TARGET = Target(0.95)
BULK_TARGET = Target(0.80)
LIVE_TARGET = Target(4)
# Fewer rows than this are written beside a live index even into an empty store.
_MIN_BULK_ROWS = 1000


def measure_first_load(run: Run) -> None:
    """Rows into an empty table without a vector index."""
    for vectors, rows in run.variants():
        _first_load(run, vectors, rows)


def _first_load(run: Run, vectors: Vectors, rows: int) -> None:
    given = list(documents(vectors, 0, rows))
    with run.scratch.database(vectors) as database, database.store() as store:
        database.drop_vector_indexes()
        times = run.compete(
            [database],
            {
                OURS: lambda _round: upsert(store, given, bulk=False),
                COPY: lambda _round: database.by_hand.copy(given),
                COPY_ONCE: lambda _round: database.by_hand.copy(given, batch_size=rows),
                COPY_UNHASHED: lambda _round: database.by_hand.copy(given, hashed=False),
            },
            prepare=lambda _side: database.truncate(),
            equal=(OURS, COPY, COPY_ONCE),
            repeated=True,
        )
    measured = f"first load, no vector index, {size(rows, vectors)}"
    for other, target in ((COPY, FIRST_LOAD_TARGET), (COPY_ONCE, None), (COPY_UNHASHED, None)):
        run.add(rate_figure("first-load", measured, times, rows, side=OURS, other=other, target=target))


def measure_upsert_new(run: Run) -> None:
    """New rows into a table that holds as many, without a vector index."""
    for vectors, rows in run.variants():
        _upsert_new(run, vectors, rows)


def _upsert_new(run: Run, vectors: Vectors, rows: int) -> None:
    given = list(documents(vectors, rows, rows))
    with run.scratch.database(vectors) as database, database.store() as store:
        database.drop_vector_indexes()
        database.by_hand.copy(documents(vectors, 0, rows))
        database.save()
        times = run.compete(
            [database],
            {
                OURS: lambda _round: upsert(store, given, bulk=False),
                STAGED: lambda _round: database.by_hand.upsert(given),
                COPY: lambda _round: database.by_hand.copy(given),
                STAGED_UNHASHED: lambda _round: database.by_hand.upsert(given, hashed=False),
            },
            prepare=lambda _side: database.restore(),
            equal=(OURS, STAGED, COPY),
            repeated=True,
        )
    measured = f"upsert of all-new rows beside as many, no vector index, {size(rows, vectors)}"
    for other, target in ((STAGED, UPSERT_TARGET), (COPY, None), (STAGED_UNHASHED, None)):
        run.add(rate_figure("upsert-new", measured, times, rows, side=OURS, other=other, target=target))


def measure_upsert_changed(run: Run) -> None:
    """Rows that all are stored with another text, vector and metadata, without a vector index."""
    for vectors, rows in run.variants():
        _upsert_changed(run, vectors, rows)


def _upsert_changed(run: Run, vectors: Vectors, rows: int) -> None:
    given = list(documents(vectors, 0, rows, revision=1))
    with run.scratch.database(vectors) as database, database.store() as store:
        database.drop_vector_indexes()
        database.by_hand.copy(documents(vectors, 0, rows))
        database.save()
        times = run.compete(
            [database],
            {
                OURS: lambda _round: upsert(store, given, bulk=False),
                STAGED: lambda _round: database.by_hand.upsert(given),
                STAGED_UNHASHED: lambda _round: database.by_hand.upsert(given, hashed=False),
            },
            prepare=lambda _side: database.restore(),
            equal=(OURS, STAGED),
            repeated=True,
        )
    measured = f"upsert of all-changed rows, no vector index, {size(rows, vectors)}"
    for other in (STAGED, STAGED_UNHASHED):
        run.add(rate_figure("upsert-changed", measured, times, rows, side=OURS, other=other))


def measure_live_index(run: Run) -> None:
    """A tenth as many rows, new and changed, into a table whose vector index stays in use."""
    rows = max(run.rows // 10, 1)
    _live_index(run, "all-new", list(documents(run.vectors, 2 * rows, rows)), stored=2 * rows)
    _live_index(run, "all-changed", list(documents(run.vectors, 0, rows, revision=1)), stored=2 * rows)


def _live_index(run: Run, kind: str, given: list[db.Document], stored: int) -> None:
    with run.scratch.database(run.vectors) as database, database.store() as store:
        database.drop_vector_indexes()
        database.by_hand.copy(documents(run.vectors, 0, stored))
        database.save()

        def restore(_side: str) -> None:
            database.drop_vector_indexes()
            database.restore()
            database.build_index(stored)

        times = run.compete(
            [database],
            {
                OURS: lambda _round: upsert(store, given, bulk=False),
                STAGED: lambda _round: database.by_hand.upsert(given),
            },
            prepare=restore,
            equal=(OURS, STAGED),
        )
    measured = f"upsert of {kind} rows beside a live vector index on {stored:,}, {size(len(given), run.vectors)}"
    run.add(rate_figure("live-index", measured, times, len(given), side=OURS, other=STAGED))


def measure_bulk_load(run: Run) -> None:
    """Rows into an empty store, its vector index ready at the end."""
    for vectors, rows in run.variants():
        _bulk_load(run, vectors, max(rows, _MIN_BULK_ROWS), live=vectors is run.vectors)


def _bulk_load(run: Run, vectors: Vectors, rows: int, *, live: bool) -> None:
    """`live`: measure writing beside the live index as well, which takes long."""
    given = list(documents(vectors, 0, rows))
    with run.scratch.database(vectors) as database, database.store() as store:

        def empty(_side: str) -> None:
            database.drop_vector_indexes()
            database.truncate()
            database.build_index(0)

        def copy_and_index() -> None:
            database.drop_vector_indexes()
            database.by_hand.copy(given)
            database.build_index(rows)

        sides: dict[str, Side] = {
            OURS: lambda _round: upsert(store, given, bulk="auto"),
            COPY_AND_INDEX: lambda _round: copy_and_index(),
        }
        if live:
            sides[COPY_LIVE] = lambda _round: database.by_hand.copy(given)
        times = run.compete([database], sides, prepare=empty, equal=list(sides))
    measured = f"load into an empty store, index ready at the end, {size(rows, vectors)}"
    for other, target in ((COPY_AND_INDEX, BULK_TARGET), (COPY_LIVE, LIVE_TARGET)):
        if other in sides:
            run.add(rate_figure("bulk-load", measured, times, rows, side=OURS, other=other, target=target))


def upsert(store: db.VectorStore, given: list[db.Document], *, bulk: bool | Literal["auto"]) -> None:
    """`bulk` False: beside the vector index that there is, or none."""
    result = store.batch_upsert(given, bulk=bulk)
    if result.inserted + result.updated != len(given):
        raise UnequalWork(f"of {len(given)} documents not all were written: {result}")


def size(rows: int, vectors: Vectors) -> str:
    return f"{rows:,} × {vectors.dimensions}"
