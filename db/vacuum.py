"""VACUUM, and whether it may happen: where the role may not, PostgreSQL only warns, as it does about other things."""

import logging
from typing import Any

import psycopg
from psycopg import Connection, sql

logger = logging.getLogger("vectorkeep")

# As PostgreSQL judges it: the owner of the table or of the database, and from version 17 who may MAINTAIN the table.
_DENIED = """
    SELECT name FROM unnest(%s::text[]) AS name JOIN pg_class ON pg_class.oid = to_regclass(name)
    WHERE NOT pg_has_role(relowner, 'USAGE')
      AND NOT pg_has_role((SELECT datdba FROM pg_database WHERE datname = current_database()), 'USAGE')
"""
_NO_MAINTAIN = " AND NOT has_table_privilege(pg_class.oid, 'MAINTAIN')"


def vacuum(connection: Connection[Any], *tables: str) -> list[str]:
    """VACUUM (ANALYZE) `tables` on a maintenance connection. Returns a sentence for each that this role may not.

    What else PostgreSQL warns about is logged: that table was vacuumed.
    """
    statement = _DENIED + (_NO_MAINTAIN if connection.info.server_version >= 170000 else "")
    denied = [name for (name,) in connection.execute(statement.encode(), (list(tables),)).fetchall()]
    if permitted := [name for name in tables if name not in denied]:  # without a name it would be every table
        _vacuum(connection, permitted)
    return [f"permission denied to vacuum {name}" for name in denied]


def _vacuum(connection: Connection[Any], tables: list[str]) -> None:
    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        if diagnostic.severity_nonlocalized == "WARNING":
            logger.warning("vacuum.warned", extra={"tables": tables, "reason": diagnostic.message_primary})

    connection.add_notice_handler(note)
    try:
        names = sql.SQL(", ").join(map(sql.Identifier, tables))
        connection.execute(sql.SQL("VACUUM (ANALYZE) {}").format(names))
    finally:
        connection.remove_notice_handler(note)
