"""The server: reachable, new enough, safe settings, room for connections, transaction ids left."""

from collections.abc import Iterator, Mapping

import psycopg

from ..config import pool_session, session_conninfo
from ..engine import MIN_PGVECTOR, MIN_POSTGRES
from ..errors import VectorKeepError
from ..psql import psql
from .base import Examination, Found, Needs, age, check, fail, ok, warn

# What is wrong with pgvector before each version, and so with every server that runs an older one.
PGVECTOR_DEFECTS = {
    (0, 8, 2): "can overflow a buffer in parallel HNSW builds",
    (0, 8, 3): "can corrupt an HNSW index in vacuum",
    (0, 8, 4): "can leave an HNSW graph unrepaired",
}
_UPDATE_EXTENSION = "psql -c 'ALTER EXTENSION vector UPDATE'"
_WRAPAROUND_FAIL = 1_500_000_000  # of 2.1 billion: from here on the server begins to warn by itself
_SETTINGS = "SELECT name, setting FROM pg_settings WHERE name = ANY(%s)"
_PERSON = "SELECT quote_ident(session_user), quote_ident(current_database())"
_DURABILITY = ("fsync", "full_page_writes", "synchronous_commit", "data_checksums")


@check(
    "server",
    Needs.NOTHING,
    f"PostgreSQL is reachable, {MIN_POSTGRES} or newer, and takes writes",
)
def server(examination: Examination) -> Iterator[Found]:
    store = examination.settings.home / "servers"
    if examination.settings.postgres_url() is None and not store.exists():
        examination.trouble = "there is no store"
        yield fail(
            f"no database is named, and there is no embedded one in {examination.settings.home}",
            "set VECTORKEEP_DATABASE_URL, or run 'vectorkeep ingest' to begin with an embedded one",
        )
        return
    try:
        examination.open()
    except VectorKeepError as exc:
        examination.trouble = "the database cannot be reached"
        yield fail(
            " ".join(str(exc).split()), "start the server, or correct VECTORKEEP_DATABASE_URL; then run it again"
        )
        return
    number = examination.connection.info.server_version
    [(up_s, standby)] = examination.rows(
        "SELECT extract(epoch FROM now() - pg_postmaster_start_time())::float8, pg_is_in_recovery()"
    )
    evidence = (
        f"PostgreSQL {number // 10_000}.{number % 10_000}, up for {age(up_s)}, at {examination.database.location}"
    )
    if number < MIN_POSTGRES * 10_000:
        yield fail(f"{evidence}; at least {MIN_POSTGRES} is needed", f"upgrade the server to PostgreSQL {MIN_POSTGRES}")
    elif standby:
        yield warn(f"{evidence}; a standby, which takes no writes", "name the primary in VECTORKEEP_DATABASE_URL")
    else:
        yield ok(evidence)


@check(
    "pgvector",
    Needs.SERVER,
    "pgvector is installed, free of the known defects of HNSW, and as new as its files",
)
def pgvector(examination: Examination) -> Iterator[Found]:
    [(installed, available)] = examination.rows("""
        SELECT (SELECT extversion FROM pg_extension WHERE extname = 'vector'),
               (SELECT default_version FROM pg_available_extensions WHERE name = 'vector')
    """)
    yield from judge_pgvector(installed, available)


def judge_pgvector(installed: str | None, available: str | None) -> Iterator[Found]:
    """What the version of the extension, and that of its files on the server, mean."""
    if installed is None:
        remedy = "psql -c 'CREATE EXTENSION vector', as a superuser, or 'vectorkeep migrate'"
        if available is None:
            remedy = "install pgvector's package on the server (Debian: postgresql-NN-pgvector), then " + remedy
        yield fail("the extension vector is not installed in this database", remedy)
        return
    update = f"{_UPDATE_EXTENSION}, as its owner"
    if available is None or _version(available) < (0, 8, 4):
        update = f"install pgvector 0.8.4 or newer on the server, then {update}"
    defects = [what for fixed_in, what in PGVECTOR_DEFECTS.items() if _version(installed) < fixed_in]
    if _version(installed)[:2] < MIN_PGVECTOR:
        defects.insert(0, "has no iterative index scans, which searches need")
    if defects:
        yield fail(
            f"pgvector {installed} {', '.join(defects)}",
            f"{update}, then psql -c 'REINDEX INDEX CONCURRENTLY embeddings_vector_idx' (and chunks_vector_idx)",
        )
    elif available is not None and _version(installed) < _version(available):
        yield warn(f"pgvector {installed} is older than its files on the server, {available}", update)
    else:
        yield ok(f"pgvector {installed}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


@check(
    "durability",
    Needs.SERVER,
    "fsync, full_page_writes, synchronous_commit and data checksums are on",
)
def durability(examination: Examination) -> Iterator[Found]:
    yield from judge_durability(dict(examination.rows(_SETTINGS, list(_DURABILITY))))


def judge_durability(settings: Mapping[str, str]) -> Iterator[Found]:
    """What these settings, name to value, mean for data that was acknowledged."""
    alter = "psql -c \"ALTER SYSTEM SET {} = on\" -c 'SELECT pg_reload_conf()', as a superuser"
    for name in ("fsync", "full_page_writes"):
        if settings.get(name) == "off":
            yield fail(f"{name} is off: a crash of the machine can destroy the database", alter.format(name))
    if settings.get("synchronous_commit") == "off":
        yield warn(
            "synchronous_commit is off: a crash loses the last acknowledged writes", alter.format("synchronous_commit")
        )
    if settings.get("data_checksums") == "off":
        yield warn(
            "data checksums are off: a damaged page is read as if it were sound",
            "stop the server in a quiet hour and run pg_checksums --enable -D its data folder",
        )
    if all(settings.get(name) not in ("off", None) for name in _DURABILITY):
        yield ok(", ".join(f"{name} {settings[name]}" for name in _DURABILITY))


@check(
    "connections",
    Needs.SERVER,
    "connections are left on the server; of an open store also whether callers wait for one of its pool",
)
def connections(examination: Examination) -> Iterator[Found]:
    [(used, most, ours)] = examination.rows("""
        SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
               current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,
               (SELECT count(*) FROM pg_stat_activity
                WHERE application_name LIKE 'vectorkeep%%' AND datname = current_database())
    """)
    evidence = f"{used} of {most} connections in use, {ours} of them ours"
    if used > examination.limits.connections_share * most:
        yield warn(evidence, "lower VECTORKEEP_POOL_MAX, put PgBouncer in front, or raise max_connections")
    else:
        yield ok(evidence)
    if examination.opened_store is not None:
        stats = examination.opened_store.pool.get_stats()
        waiting, size = stats.get("requests_waiting", 0), stats.get("pool_max", 0)
        if waiting:
            yield warn(f"{waiting} callers of this store wait for one of its {size} connections", _LARGER_POOL)


_LARGER_POOL = "raise VECTORKEEP_POOL_MAX, or have fewer threads in one process"


@check(
    "pool",
    Needs.SCHEMA,
    "no caller waited in vain for a connection of a store's pool in the last day",
    fine="no caller waited in vain in the last day",
)
def pool(examination: Examination) -> Iterator[Found]:
    [(times, last)] = examination.rows("""
        SELECT count(*), max(created_at)::timestamptz(0)::text FROM performance_metrics
        WHERE NOT success AND created_at > now() - interval '1 day' AND starts_with(error_message, 'PoolTimeout')
    """)
    if times:
        yield warn(f"{times} calls in the last day got no connection of their pool, the last at {last}", _LARGER_POOL)


@check(
    "session settings",
    Needs.SERVER,
    "sessions have the timeouts and the plan_cache_mode that the settings say, behind a pooler too",
    fine="sessions have the timeouts and the plan_cache_mode of the settings",
)
def session_settings(examination: Examination) -> Iterator[Found]:
    wanted = pool_session(examination.settings)
    try:
        with psycopg.connect(session_conninfo(examination.database.url, examination.settings)) as connection:
            seen: dict[str, str] = dict(connection.execute(_SETTINGS, (list(wanted),)).fetchall())
            [(role, database)] = connection.execute(_PERSON).fetchall()
    except psycopg.OperationalError as exc:
        yield warn(f"could not look: {' '.join(str(exc).split())}", "see the check 'connections'")
        return
    if other := {name: value for name, value in wanted.items() if seen.get(name) != value}:
        alter = [f"ALTER ROLE {role} IN DATABASE {database} SET {name} = '{other[name]}'" for name in other]
        yield warn(
            f"a pooler, such as PgBouncer with ignore_startup_parameters = options, keeps these from the server: "
            f"{', '.join(f'{name} is {seen.get(name)}, expected {value}' for name, value in other.items())}",
            f"{psql(*alter)}, then make the pooler connect anew",
        )


@check("wraparound", Needs.SERVER, "transaction ids are far from running out")
def wraparound(examination: Examination) -> Iterator[Found]:
    [(xids, multixacts, limit)] = examination.rows("""
        SELECT age(datfrozenxid), mxid_age(datminmxid), current_setting('autovacuum_freeze_max_age')::bigint
        FROM pg_database WHERE datname = current_database()
    """)
    yield judge_wraparound(max(xids, multixacts), limit)


def judge_wraparound(oldest: int, freeze_max_age: int) -> Found:
    """What the age of the oldest unfrozen transaction id means, against autovacuum_freeze_max_age."""
    evidence = (
        f"the oldest transaction id is {oldest:,} old; autovacuum acts at {freeze_max_age:,}, 2.1 billion is the end"
    )
    remedy = "end what holds vacuum back (see the checks of transactions and slots), then run psql -c 'VACUUM (FREEZE)'"
    if oldest > _WRAPAROUND_FAIL:
        return fail(evidence, remedy)
    if oldest > 1.5 * freeze_max_age:
        return warn(evidence, remedy)
    return ok(evidence)


CHECKS = (server, pgvector, durability, connections, session_settings, wraparound)
SCHEMA_CHECKS = (pool,)
