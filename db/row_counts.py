"""How many rows and vectors a table holds: counted, or of a large table as the server estimates it."""

from dataclasses import dataclass
from typing import Any

from psycopg import Connection, sql

# A count reads all of the table. Beyond this many rows, by the last VACUUM or ANALYZE, nobody waits for that.
COUNTED_ROWS = 1_000_000

# Whoever sees only some of the rows is not told how many there are.
_ESTIMATE = """
    SELECT class.reltuples::bigint, null_frac
    FROM pg_class AS class JOIN pg_namespace ON pg_namespace.oid = class.relnamespace
    JOIN pg_stats ON schemaname = nspname AND tablename = class.relname AND attname = 'embedding' AND NOT inherited
    WHERE class.oid = to_regclass(%s) AND class.reltuples > %s AND NOT row_security_active(class.oid)
"""
_COUNT = sql.SQL("SELECT count(*), count(embedding) FROM {}")


@dataclass(frozen=True, slots=True)
class RowCount:
    """Rows of a table, and of them those with a vector. estimated: as of the last VACUUM or ANALYZE, about."""

    rows: int
    vectors: int
    estimated: bool


def count_rows(connection: Connection[Any], table: str, known: dict[str, RowCount]) -> RowCount:
    """The count of `table` that is `known`, else a new one, which is known from then on."""
    if table not in known:
        known[table] = _estimated(connection, table) or _counted(connection, table)
    return known[table]


def _estimated(connection: Connection[Any], table: str) -> RowCount | None:
    row = connection.execute(_ESTIMATE, (table, COUNTED_ROWS)).fetchone()
    return RowCount(row[0], round(row[0] * (1 - row[1])), True) if row else None


def _counted(connection: Connection[Any], table: str) -> RowCount:
    [(rows, vectors)] = connection.execute(_COUNT.format(sql.Identifier(table))).fetchall()
    return RowCount(rows, vectors, False)
