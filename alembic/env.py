"""How Alembic reaches the database. Nothing here is asynchronous, and everything works from async code:

    await connection.run_sync(lambda sync: upgrade_with(sync))

with the connection in `config.attributes["connection"]`. Without one it opens its own, to the database of
the library's settings; a `sqlalchemy.url` in the configuration wins over them.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.config import fileConfig
from typing import Any

import psycopg
import sqlalchemy
from alembic import context
from alembic.util import CommandError
from pgvector.sqlalchemy import VECTOR
from sqlalchemy import Connection, Engine, text
from sqlalchemy.types import TypeEngine

from db import faults
from db.config import Settings, libpq_url
from db.errors import SchemaError, VectorKeepError
from db.migration_session import BlockerWatch, direct_engine, explained, migration_session, request_to_end
from db.models import MAX_INDEXED_DIMENSIONS, Base, vector_index, vector_index_name

config = context.config
settings = Settings()
on_wait = config.attributes.get("on_wait")
lock_timeout_s = float(config.attributes.get("lock_timeout_s", settings.lock_timeout_s))

# Only the command line may set up logging: a program that calls Alembic has its own.
from_command_line = config.cmd_opts is not None
if from_command_line and config.config_file_name is not None:
    fileConfig(config.config_file_name, disable_existing_loggers=False)

VECTOR_INDEXES = {vector_index_name(name): Base.metadata.tables[name] for name in ("embeddings", "chunks")}
ACTIVE_MODEL = text("SELECT dimensions, distance FROM embedding_models WHERE active AND dimensions <= :most")
INDEX_DEFINITION = text("""
    SELECT concat_ws(' ', amname, coalesce(pg_get_expr(indexprs, indrelid), 'a column'), opcname)
    FROM pg_index
    JOIN pg_class ON pg_class.oid = indexrelid
    JOIN pg_am ON pg_am.oid = relam
    JOIN pg_opclass ON pg_opclass.oid = indclass[0]
    WHERE indexrelid = to_regclass(:name)
""")
CHANGING = ("upgrade", "downgrade", "do_stamp")


def main() -> None:
    outer = sys.exception()
    try:
        if context.is_offline_mode():
            migrate_offline()
        else:
            migrate_online()
    except Exception as exc:
        if (ending := request_to_end(exc, outer)) is not None:
            raise ending from None
        if from_command_line and isinstance(exc, VectorKeepError):
            raise CommandError(str(exc)) from exc
        raise


def migrate_offline() -> None:
    context.configure(
        dialect_name="postgresql",
        literal_binds=True,
        transaction_per_migration=True,
        target_metadata=Base.metadata,
    )
    check_rows_may_go()
    context.get_context().impl.static_output(f"SET lock_timeout = '{round(lock_timeout_s * 1000)}ms';")
    with context.begin_transaction():
        context.run_migrations()


def migrate_online() -> None:
    match config.attributes.get("connection"):
        case None:
            migrate_own_connection()
        case Engine() as engine:
            with engine.connect() as connection:
                migrate(connection)
        case connection:
            migrate(connection)


def migrate_own_connection() -> None:
    with database_url() as url, direct_engine(url, settings).connect() as connection:
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        connection.commit()
        with BlockerWatch(url, settings, pid, on_wait) as watch:
            migrate(connection, watch)


@contextmanager
def database_url() -> Iterator[str]:
    """The configured URL, else the settings' one, else that of the embedded server, up meanwhile."""
    url = config.get_main_option("sqlalchemy.url") or settings.maintenance_url
    url = libpq_url(url) if url else settings.postgres_url()
    if url is not None:
        yield url
        return
    from db.embedded import acquire

    servers = acquire(settings.home, settings=settings.embedded_settings, redis=False)
    try:
        yield servers.database_url
    finally:
        servers.release()


def migrate(connection: Connection, watch: BlockerWatch | None = None) -> None:
    try:
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            transaction_per_migration=True,
            compare_type=differs_in_type,
            compare_server_default=True,
            include_name=include_name,
            on_version_apply=end_of_step,
        )
        if context.get_context().opts["fn"].__name__ not in CHANGING:
            with context.begin_transaction():
                context.run_migrations()
            return
        with migration_session(connection, lock_timeout_s=lock_timeout_s, on_wait=on_wait):
            check_rows_may_go()
            with context.begin_transaction():
                context.run_migrations()
    except (sqlalchemy.exc.DBAPIError, psycopg.Error) as exc:
        ours = explained(
            exc,
            lambda query: connection.exec_driver_sql(query).one(),
            lock_timeout_s=lock_timeout_s,
            blockers=watch.seen if watch else "",
        )
        if ours is None:
            raise
        raise ours from exc


def end_of_step(*, step: Any, **_: object) -> None:
    """All of a step is done, and not yet committed."""
    faults.point(f"migrate.{step.up_revision_id}")


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    """Whether autogenerate and `alembic check` compare this.

    Not the tables of other programs in the same database. Not a vector index that is as the registered
    model wants it: no migration makes it. One that differs is reported, one that is missing is not (searches
    are exact without it, and the doctor tells).
    """
    if kind == "table":
        return name in Base.metadata.tables
    if kind == "index" and name in VECTOR_INDEXES:
        return not fits_registered_model(context.get_context().connection, name)
    return True


def differs_in_type(
    _context: object, _column: object, _model: object, actual: TypeEngine[Any], wanted: TypeEngine[Any]
) -> bool | None:
    """Whether a vector column has other dimensions than the model's; None leaves it to Alembic.

    Alembic takes vector(8) for vector: it compares lengths only where both have one.
    """
    if isinstance(wanted, VECTOR):
        return not isinstance(actual, VECTOR) or actual.dim != wanted.dim
    return None


def fits_registered_model(connection: Connection, index_name: str) -> bool:
    if connection.execute(text("SELECT to_regclass('embedding_models')")).scalar_one() is None:
        return False
    model = connection.execute(ACTIVE_MODEL, {"most": MAX_INDEXED_DIMENSIONS}).first()
    actual = connection.execute(INDEX_DEFINITION, {"name": index_name}).scalar_one_or_none()
    if model is None or actual is None:
        return False
    expected = vector_index(VECTOR_INDEXES[index_name], model.dimensions, model.distance)
    return bare(actual) == bare(f"hnsw {expected.expressions[0]}")


def bare(definition: str) -> str:
    """`definition` without blanks and parentheses, of which PostgreSQL adds some of its own."""
    return re.sub(r"[\s()]", "", definition)


def check_rows_may_go() -> None:
    """Raise SchemaError where the planned downgrade would drop rows and nobody said that it may.

    Before the first step, so that a refused downgrade leaves everything as it was.
    """
    migration = context.get_context()
    plan = migration.opts["fn"]
    allowed = config.attributes.get("drop_rows") or x_argument("drop-rows") == "yes"
    if plan.__name__ != "downgrade" or allowed:
        return
    if migration.as_sql:
        raise SchemaError("a downgrade as SQL cannot look for rows first; say -x drop-rows=yes to let them go")
    steps = plan(migration.get_current_heads(), migration)
    tables = [table for step in steps for table in step.revision.module.drops]
    counts = {table: count_rows(migration.connection, table) for table in tables}
    migration.connection.commit()
    lost = ", ".join(f"{count} of {table}" for table, count in counts.items() if count)
    if lost:
        raise SchemaError(
            f"this downgrade would drop rows: {lost}; nothing was changed; "
            "say -x drop-rows=yes (alembic) or drop_rows=True (db.migrate.downgrade) to let them go"
        )


def x_argument(name: str) -> str | None:
    return context.get_x_argument(as_dictionary=True).get(name)


def count_rows(connection: Connection, table: str) -> int:
    return connection.execute(
        sqlalchemy.select(sqlalchemy.func.count()).select_from(sqlalchemy.table(table))
    ).scalar_one()


main()
