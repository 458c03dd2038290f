"""`vectorkeep benchmark`: how fast this is beside hand-written psycopg, on this machine and server."""

import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from .benchmark_load import measure_load
from .benchmarks.catalogue import NAMES, measure
from .benchmarks.machine import described, machine
from .benchmarks.plan import Run
from .benchmarks.report import COLUMNS, Figure
from .benchmarks.rows import SyntheticVectors, TextVectors
from .benchmarks.scratch import Scratch
from .command import Cli
from .exit_codes import ExitCode
from .opening import target_url

_ROWS = 20_000
_QUICK_ROWS = 2_000
_WIDE = 1536
_ROUNDS = 5
_LEAST_S = 20.0

_HOW = (
    "Both sides write the same rows, all columns of them, to the same table with the same indexes on the same server; "
    "that the rows are equal is checked.",
    "By hand is what a competent engineer writes with psycopg and pgvector: binary COPY with set_types and write_row, "
    "1,000 rows a transaction as batch_upsert writes them, the hashes of each row computed as part of the work; staged "
    "SQL is that COPY into a temporary table and INSERT … SELECT … ON CONFLICT DO UPDATE. 'No hashes' leaves them out.",
    "Each figure is the median of {rounds}, each ratio the median of the rounds' own ratios (lowest–highest in "
    "brackets); the sides take turns in alternating order, each after VACUUM (ANALYZE), {checkpoint} and Python's "
    "garbage collection. Autovacuum is off on the scratch tables: it would hit one side only.",
)


def benchmark(
    cli: Cli,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help=f"Measure only this; may be repeated. One of: {', '.join(NAMES)}."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=100, help=f"Rows that most measures write, {_ROWS:,} by default; large tables have more."),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=3,
            help=f"How often each side is timed. Default: {_ROUNDS} times, short ones until {_LEAST_S:.0f} s are over.",
            show_default=False,
        ),
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=4000,
            help="Synthetic vectors of so many dimensions. Default: real text vectors of 256, then "
            f"synthetic ones of {_WIDE:,} for some measures.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: about a minute, and noisier.")] = False,
    load: Annotated[
        bool,
        typer.Option("--load", help="Instead: one store under load, many threads that write and search at once."),
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, max=64, help="With --load: processes, 2 by default.", show_default=False)
    ] = None,
    writers: Annotated[
        int | None, typer.Option(min=0, help="With --load: threads that write in each process, 2 by default.")
    ] = None,
    readers: Annotated[
        int | None, typer.Option(min=0, help="With --load: threads that search in each process, 4 by default.")
    ] = None,
    seconds: Annotated[
        int | None, typer.Option(min=1, help="With --load: for how long, 60 by default; 600 to judge memory by.")
    ] = None,
) -> ExitCode | None:
    """Measure how fast this is, side by side with hand-written psycopg; with --load, how it bears many callers.

    Works in scratch databases on the server that is named, or the embedded one, and drops them at the end; no
    store is touched. A target that is missed is said, and is no error; a call that fails under load is one.
    """
    of_load = {"--processes": processes, "--writers": writers, "--readers": readers, "--seconds": seconds}
    if load:
        _refuse({"--only": only, "--rounds": rounds, "--quick": quick or None}, "means nothing with --load")
        return measure_load(cli, processes, writers, readers, seconds, rows or _ROWS, dimensions)
    _refuse(of_load, "means something only with --load")
    names = _checked_names(only)
    vectors = TextVectors() if dimensions is None else SyntheticVectors(dimensions)
    wide = SyntheticVectors(_WIDE) if dimensions is None else None
    started = time.perf_counter()
    with target_url(cli.options) as url:
        scratch = Scratch(url)
        with scratch.server() as connection:
            where = machine(connection)
        sizes = rows or (_QUICK_ROWS if quick else _ROWS), rounds or _ROUNDS
        least_s = 0.0 if rounds or quick else _LEAST_S
        run = Run(scratch, *sizes, vectors, wide, cli.output.say, least_s)
        measure(run, names)
    _print(cli, run, where, round(time.perf_counter() - started, 1))
    return None


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Raise BadParameter for an option that was given though it means nothing here."""
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(why, param_hint=name)


def _checked_names(only: Sequence[str] | None) -> Sequence[str]:
    unknown = [name for name in only or () if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of: {', '.join(NAMES)}", param_hint="--only")
    return only or NAMES


def _print(cli: Cli, run: Run, where: dict[str, object], duration_s: float) -> None:
    vectors = [f"{v.dimensions} dimensions: {v.described}" for v in (run.vectors, run.wide) if v is not None]
    checkpoint = "CHECKPOINT" if run.scratch.checkpoints else "no CHECKPOINT (the role may not)"
    more = " or more" if run.least_s else ""
    how = [line.format(checkpoint=checkpoint, rounds=f"{run.rounds} rounds{more}") for line in _HOW]
    cli.output.document(
        {
            "machine": where,
            "vectors": vectors,
            "rows": run.rows,
            "rounds": run.rounds,
            "how": how,
            "figures": [figure.as_json() for figure in run.figures],
            "missed": _missed(run.figures),
            "duration_s": duration_s,
        }
    )
    cli.output.rows(COLUMNS, [figure.as_row() for figure in run.figures])
    for note in dict.fromkeys(f"{f.measured}: {note}" for f in run.figures for note in f.notes):
        cli.output.line(note)
    for line in (described(where), *vectors, *how):
        cli.output.line(line)
    missed = _missed(run.figures)
    verdict = _verdict(run.figures, missed)
    cli.output.line(f"{run.rounds} rounds{more} of {run.rows:,} rows in {duration_s:.0f} s; {verdict}")


def _missed(figures: Sequence[Figure]) -> list[str]:
    return [figure.measured for figure in figures if figure.verdict == "MISSED"]


def _verdict(figures: Sequence[Figure], missed: Sequence[str]) -> str:
    with_target = sum(1 for figure in figures if figure.verdict)
    return f"{len(missed)} of {with_target} targets MISSED" if missed else f"all {with_target} targets met"
