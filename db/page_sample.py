"""A part of a large table's pages, for who wants a few of its rows and not to read all."""

from typing import Any

from psycopg import Connection, sql

# Rows of one page were written together: from this many pages for each row that is wanted, few share one.
_PAGES_PER_ROW = 8

_PAGES = "SELECT pg_relation_size(to_regclass(%s)) / current_setting('block_size')::bigint"


def page_samples(
    connection: Connection[Any], table: str, rows: int, *, repeatable: bool = False
) -> list[sql.Composable]:
    """What follows `table` in FROM, each to be tried until one brings so many `rows`.

    Of a large table first a part of its pages, at random, or where `repeatable` the same ones as long as none is
    added; then nothing, for one that is mostly empty pages is read whole after all.
    """
    whole = sql.SQL("")
    [(pages,)] = connection.execute(_PAGES, (table,)).fetchall()
    if pages <= 2 * _PAGES_PER_ROW * rows:
        return [whole]
    percent = sql.Literal(100.0 * _PAGES_PER_ROW * rows / pages)
    part = sql.SQL("TABLESAMPLE SYSTEM ({})").format(percent)
    return [part + sql.SQL(" REPEATABLE (0)") if repeatable else part, whole]
