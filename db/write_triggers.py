"""Triggers that log every write to the tables in `write_log`, for SQL that goes past the library.

What the library writes is logged by its own transaction. SQL beside it must call `store.record_write`, or a cached
answer outlives what it changed; with these triggers it need not. They run after each statement, whoever it is from and
by whatever way the rows came (COPY, MERGE, a foreign key, TRUNCATE), and log the sources and workspaces that its rows
had before and have after. What the library writes is logged by them, too: each of its statements costs one more row
of the log, and a copy of the rows that it touched until it ends.
"""

import logging
from collections.abc import Iterator
from typing import Any, LiteralString

from psycopg import Connection
from psycopg.sql import SQL, Composed, Identifier, Literal

from .config import Settings
from .engine import connect_directly
from .errors import translated
from .locks import limit_lock_waits
from .migrate import require_head
from .migration_locks import lock_in_stints
from .transactions import EVERYTHING, MAX_TAGS

logger = logging.getLogger("vectorkeep")

FUNCTION = "vectorkeep_log_statement"
TABLES = ("embeddings", "chunks")
# What a statement leaves, or has found, as tables of its rows.
_ROWS: dict[LiteralString, LiteralString] = {
    "insert": "REFERENCING NEW TABLE AS new_rows",
    "update": "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows",
    "delete": "REFERENCING OLD TABLE AS old_rows",
    "truncate": "",
}

# It writes as the owner of the tables: a tenant's rows are logged though no tenant may read the log.
_MAKE_FUNCTION = SQL("""
    CREATE OR REPLACE FUNCTION {function}() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp AS $function$
    DECLARE
        touched text[] := ARRAY[]::text[];
    BEGIN
        IF TG_OP = 'TRUNCATE' THEN
            touched := ARRAY[{everything}];
        END IF;
        IF TG_OP IN ('INSERT', 'UPDATE') THEN
            touched := ARRAY(SELECT DISTINCT touching.tag FROM new_rows, {tags});
        END IF;
        IF TG_OP IN ('DELETE', 'UPDATE') THEN
            touched := ARRAY(SELECT unnest(touched) UNION SELECT touching.tag FROM old_rows, {tags});
        END IF;
        IF cardinality(touched) > {most} THEN
            touched := ARRAY[{everything}];
        END IF;
        IF cardinality(touched) > 0 THEN
            INSERT INTO write_log (tags) VALUES (touched || 'store'::text);
        END IF;
        RETURN NULL;
    END
    $function$
""")
# Qualified: the tables may have columns of any other name.
_TAGS = SQL("""
    unnest(ARRAY['source:' || source_id, 'workspace:' || workspace]) AS touching (tag) WHERE touching.tag IS NOT NULL
""")
_MAKE_TRIGGER = SQL("""
    CREATE OR REPLACE TRIGGER {name} AFTER {event} ON {table} {rows} FOR EACH STATEMENT EXECUTE FUNCTION {function}()
""")
# Whatever the table's schema: a rebuild keeps the tables that it replaced, with their triggers.
_CALLING = """
    SELECT quote_ident(tgname), tgrelid::regclass::text FROM pg_trigger
    WHERE tgfoid = to_regprocedure(%s) ORDER BY tgrelid, tgname
"""
_SCHEMA = """
    SELECT nspname, pg_get_userbyid(relowner) FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE pg_class.oid = 'embeddings'::regclass
"""


def set_write_triggers(url: str, *, wanted: bool) -> None:
    """Make the triggers on the tables of the store at `url`, or drop them. Safe to run again; one transaction.

    Raises BusyError where the tables' locks are not to be had within `lock_timeout_s`: for a moment nobody may write,
    nor read where triggers are dropped. PermissionDeniedError: the tables are another role's.
    """
    settings = Settings(database_url=url)
    with translated(), connect_directly(url, settings) as connection:
        require_head(connection)
        with connection.transaction():
            limit_lock_waits(connection, settings.lock_timeout_s)
            for statement in _made(connection) if wanted else _dropped(connection):
                connection.execute(statement)
    logger.info("write_triggers.made" if wanted else "write_triggers.dropped")


def _made(connection: Connection[Any]) -> Iterator[Composed]:
    connection.execute(lock_in_stints(*TABLES, mode="SHARE ROW EXCLUSIVE").encode())
    [(schema, owner)] = connection.execute(_SCHEMA).fetchall()
    function = Identifier(schema, FUNCTION)
    yield _MAKE_FUNCTION.format(
        function=function,
        schema=Identifier(schema),
        everything=Literal(EVERYTHING),
        most=Literal(MAX_TAGS),
        tags=_TAGS,
    )
    yield SQL("ALTER FUNCTION {}() OWNER TO {}").format(function, Identifier(owner))
    # Else anybody could have a table of theirs write into the log.
    yield SQL("REVOKE EXECUTE ON FUNCTION {}() FROM PUBLIC").format(function)
    for table in TABLES:
        for event, rows in _ROWS.items():
            yield _MAKE_TRIGGER.format(
                name=_name(event), event=SQL(event), table=Identifier(table), rows=SQL(rows), function=function
            )
            # A session that plays a replica fires no others.
            yield SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(Identifier(table), _name(event))


def _dropped(connection: Connection[Any]) -> Iterator[Composed]:
    if tables := sorted({table for _, table in _calling(connection)}):
        connection.execute(lock_in_stints(*tables, mode="ACCESS EXCLUSIVE").encode())
    for name, table in _calling(connection):  # once more: a rebuild may have exchanged the tables before the lock
        yield SQL("DROP TRIGGER {} ON {}").format(SQL(name), SQL(table))
    yield SQL("DROP FUNCTION IF EXISTS {}()").format(Identifier(FUNCTION))


def _calling(connection: Connection[Any]) -> list[tuple[Any, ...]]:
    """Name and table of each trigger that calls the function, both as the server quotes them."""
    return connection.execute(_CALLING, (f"{FUNCTION}()",)).fetchall()


def _name(event: LiteralString) -> Identifier:
    return Identifier(f"vectorkeep_log_{event}")
