"""The schema: at head, whole, its constraints validated."""

from collections.abc import Iterator

from psycopg import sql

from .. import migrate
from ..errors import SchemaError
from ..models import Base
from ..orphans import FOREIGN_KEY
from ..psql import psql
from .base import Examination, Found, Needs, check, fail, ok

_LOCK_TIMEOUT_MS = 2000

_MISSING_COLUMNS = """
    SELECT wanted.name FROM unnest(%s::text[]) AS wanted (name)
    WHERE NOT EXISTS (SELECT FROM pg_attribute
                      WHERE attrelid = to_regclass(split_part(wanted.name, '.', 1))
                        AND attname = split_part(wanted.name, '.', 2) AND NOT attisdropped)
"""
_UNVALIDATED = """
    SELECT conname, conrelid::regclass::text, relname, pg_get_constraintdef(pg_constraint.oid)
    FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid
    WHERE NOT convalidated AND conrelid IN (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name)
    ORDER BY 1
"""
_HAS_FOREIGN_KEY = "SELECT EXISTS (SELECT FROM pg_constraint WHERE conname = %s AND conrelid = to_regclass('chunks'))"
_DANGLING = """
    SELECT count(*) FROM chunks WHERE document_id IS NOT NULL
    AND NOT EXISTS (SELECT FROM embeddings WHERE embeddings.id = chunks.document_id)
"""


def our_tables() -> list[str]:
    return [table.name for table in Base.metadata.sorted_tables]


_ADD_FOREIGN_KEY = (
    f"ALTER TABLE chunks ADD CONSTRAINT {FOREIGN_KEY} FOREIGN KEY (document_id) "
    "REFERENCES embeddings (id) ON DELETE CASCADE NOT VALID"
)


@check("schema", Needs.SERVER, "migrations are at head, there is one head, and every table and column is there")
def schema(examination: Examination) -> Iterator[Found]:
    heads = migration_heads()
    if heads != [migrate.head_revision()]:
        yield fail(
            f"the migrations end in {', '.join(heads)}; this vectorkeep works on {migrate.head_revision()}",
            "install vectorkeep anew: its files are of several versions",
        )
    try:
        examination.look_at_schema()
    except SchemaError as exc:
        yield fail(str(exc), "vectorkeep migrate")
        return
    if (revisions := examination.value("SELECT count(*) FROM alembic_version")) != 1:
        yield fail(f"alembic_version holds {revisions} revisions, expected one", "alembic heads; alembic merge")
    columns = [f"{table.name}.{column.name}" for table in Base.metadata.sorted_tables for column in table.columns]
    if missing := [name for (name,) in examination.rows(_MISSING_COLUMNS, columns)]:
        examination.schema_trouble = "the schema is not whole"
        yield fail(
            f"missing although the schema is at {migrate.head_revision()}: {', '.join(missing)}",
            "restore the database from a backup, or 'vectorkeep reset' and ingest again",
        )
        return
    yield ok(f"at {migrate.head_revision()}, the newest; {len(our_tables())} tables")


def migration_heads() -> list[str]:
    """The newest revisions among the migrations that are installed; there should be one."""
    from alembic.script import ScriptDirectory

    return sorted(ScriptDirectory.from_config(migrate.alembic_config()).get_heads())


@check(
    "constraints",
    Needs.SCHEMA,
    "no constraint is unvalidated, the foreign key from chunks to documents among them",
    fix="validates them where no row is in the way",
    fine="all constraints are validated",
)
def constraints(examination: Examination) -> Iterator[Found]:
    for name, shown, table, definition in examination.rows(_UNVALIDATED, our_tables()):
        evidence = f"{name} of {shown} is not validated: {definition}"
        remedy = f"vectorkeep doctor --fix, or {psql(f'ALTER TABLE {shown} VALIDATE CONSTRAINT {name}')}"
        if name == FOREIGN_KEY and (dangling := examination.value(_DANGLING)):
            yield fail(f"{evidence}; {dangling} chunks have no document", "vectorkeep cleanup", subject=name)
            continue

        def mend(name: str = name, table: str = table) -> str:
            return _validate(examination, table, name)

        yield fail(evidence, remedy, subject=name, mend=mend)
    if not examination.value(_HAS_FOREIGN_KEY, FOREIGN_KEY):
        yield fail(
            "chunks have no foreign key to their documents",
            f"{psql(_ADD_FOREIGN_KEY)}, then vectorkeep cleanup",
            subject="missing",
        )


def _validate(examination: Examination, table: str, name: str) -> str:
    """Validate a constraint: it reads the table while others read and write it."""
    with examination.mending() as connection:
        connection.execute(f"SET lock_timeout = {_LOCK_TIMEOUT_MS}")
        connection.execute(
            sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(sql.Identifier(table), sql.Identifier(name))
        )
    return f"{name} validated"


CHECKS = (schema, constraints)
