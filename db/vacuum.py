"""VACUUM, and whether it happened: where the role may not, PostgreSQL only warns."""

from typing import Any

import psycopg
from psycopg import Connection, sql


def vacuum(connection: Connection[Any], *tables: str) -> list[str]:
    """VACUUM (ANALYZE) `tables` on a maintenance connection. Returns the warnings: each is a table that was skipped."""
    warnings: list[str] = []

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        if diagnostic.severity_nonlocalized == "WARNING":
            warnings.append(diagnostic.message_primary or "")

    connection.add_notice_handler(note)
    try:
        names = sql.SQL(", ").join(map(sql.Identifier, tables))
        connection.execute(sql.SQL("VACUUM (ANALYZE) {}").format(names))
    finally:
        connection.remove_notice_handler(note)
    return warnings
