"""Storage of the server: autovacuum at work, and not far behind."""

from collections.abc import Iterator

from ..psql import psql
from .base import Examination, Found, Needs, check, fail, warn
from .schema import our_tables

_SWITCHED_OFF = """
    SELECT relname FROM pg_class, pg_options_to_table(reloptions)
    WHERE oid IN (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name)
      AND option_name = 'autovacuum_enabled' AND option_value IN ('false', 'off', 'no', '0')
    ORDER BY 1
"""
_BEHIND = """
    SELECT relname, n_live_tup, n_dead_tup, coalesce(last_autovacuum, last_vacuum)::timestamptz(0)::text
    FROM pg_stat_user_tables
    WHERE relid IN (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name)
      AND n_dead_tup > %s AND n_dead_tup > %s * (n_live_tup + n_dead_tup)
    ORDER BY n_dead_tup DESC
"""


@check(
    "autovacuum",
    Needs.SCHEMA,
    "autovacuum is on, for the server and each table, and not far behind",
    fine="autovacuum is on and keeps up",
)
def autovacuum(examination: Examination) -> Iterator[Found]:
    settings = dict(
        examination.rows("SELECT name, setting FROM pg_settings WHERE name IN ('autovacuum', 'track_counts')")
    )
    yield from judge_autovacuum(settings.get("autovacuum") == "on", settings.get("track_counts") == "on")
    for (table,) in examination.rows(_SWITCHED_OFF, our_tables()):
        yield warn(f"autovacuum is off for {table}", psql(f"ALTER TABLE {table} RESET (autovacuum_enabled)"))
    limits = examination.limits
    for table, live, dead, last in examination.rows(_BEHIND, our_tables(), limits.dead_rows, limits.dead_share):
        yield warn(
            f"{table} holds {dead} dead rows beside {live} live ones; last vacuumed: {last or 'never'}",
            f"vectorkeep maintain, or {psql(f'VACUUM (ANALYZE) {table}')}",
        )


def judge_autovacuum(on: bool, counts: bool) -> Iterator[Found]:
    """What the server's own settings mean."""
    if not on or not counts:
        name = "track_counts" if on else "autovacuum"
        yield fail(
            f"{name} is off on the server: dead rows stay, and transaction ids run out in the end",
            f"{psql(f'ALTER SYSTEM SET {name} = on', 'SELECT pg_reload_conf()')}, as a superuser",
        )


CHECKS = (autovacuum,)
