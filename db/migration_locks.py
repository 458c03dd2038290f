"""Locks that a migration takes on tables in use: asked for a moment at a time, so that nobody queues behind it."""

# Shorter than PostgreSQL's deadlock_timeout (1 s): of a migration and a program that lock two tables in opposite
# order, none is cancelled for it.
_STINT_MS = 100
_PAUSE_S = 0.05

_IN_STINTS = """
DO $$
DECLARE
    patience text := current_setting('lock_timeout');
    give_up timestamptz := 'infinity';
BEGIN
    IF patience <> '0' THEN
        give_up := clock_timestamp() + patience::interval;
    END IF;
    PERFORM set_config('lock_timeout', '{stint_ms}ms', true);
    LOOP
        BEGIN
            LOCK TABLE {tables} IN {mode} MODE;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            IF clock_timestamp() >= give_up THEN
                RAISE;
            END IF;
        END;
        PERFORM pg_sleep({pause_s});
    END LOOP;
    PERFORM set_config('lock_timeout', patience, true);
END
$$
"""


def lock_in_stints(*tables: str, mode: str) -> str:
    """SQL that locks all of `tables`, or none, until the transaction ends; within it, `lock_timeout` in all.

    A statement that waits for such a lock makes all later ones wait behind it, readers too: for a moment here, then
    they go first. `tables` are names as in SQL, quoted where they must be; neither they nor `mode` are input.
    """
    return _IN_STINTS.format(tables=", ".join(tables), mode=mode, stint_ms=_STINT_MS, pause_s=_PAUSE_S)
