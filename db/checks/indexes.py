"""The indexes: none invalid, none missing. Mended online: nobody who reads or writes is stopped."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from psycopg import Connection, sql
from sqlalchemy import Index, MetaData, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex

from ..embedding_model import Model
from ..errors import BusyError, PermissionDeniedError
from ..index_health import inspect_indexes
from ..locks import Purpose, advisory_lock, other_holders
from ..models import Base, vector_index_name
from ..psql import psql
from ..vector_index import INDEXED_TABLES, NOT_BEING_BUILT, REINDEX_LEFTOVER, UNSEEN_BUILDS, ensure_vector_indexes
from .base import Examination, Found, Needs, check, fail, ok, warn
from .schema import our_tables

# CREATE, REINDEX and DROP ... CONCURRENTLY wait for older transactions, which stops nobody.
_CONCURRENT_WAIT_MS = 600_000

_INVALID = sql.SQL("""
    SELECT class.relname, index.indexrelid::regclass::text, table_class.relname
    FROM pg_index AS index
    JOIN pg_class AS class ON class.oid = index.indexrelid
    JOIN pg_class AS table_class ON table_class.oid = index.indrelid
    WHERE NOT (index.indisvalid AND index.indisready AND index.indislive)
      AND index.indrelid IN (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name)
      AND {not_being_built}
    ORDER BY 1
""").format(not_being_built=NOT_BEING_BUILT)
_BUILDING = """
    SELECT index_relid::regclass::text, phase, pid,
           round(100.0 * coalesce(nullif(blocks_done, 0), tuples_done)
                 / nullif(coalesce(nullif(blocks_total, 0), tuples_total), 0))
    FROM pg_stat_progress_create_index
    WHERE datname = current_database() AND relid IN (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name)
"""
_HAS_KEY = "SELECT EXISTS (SELECT FROM pg_constraint WHERE conname = %s AND conrelid = to_regclass(%s))"
_EXISTS = "SELECT to_regclass(%s) IS NOT NULL"
_VECTORS = sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE embedding IS NOT NULL)")


@check(
    "invalid indexes",
    Needs.SCHEMA,
    "no index is invalid, as an interrupted build leaves one, and no _ccnew or _ccold is left of a REINDEX",
    fix="drops what is left over, builds what is invalid again, online",
    fine="every index is valid",
)
def invalid_indexes(examination: Examination) -> Iterator[Found]:
    for name, phase, pid, percent in examination.rows(_BUILDING, our_tables()):
        yield ok(f"{name} is being built by process {pid}: {phase}, {percent or 0:.0f} %")
    unseen = [pid for (pid,) in examination.rows(UNSEEN_BUILDS)]
    for name, shown, table in examination.connection.execute(_INVALID, (our_tables(),)).fetchall():
        if unseen:
            yield warn(
                f"{shown} on {table} is invalid, left of an interrupted build or what process {unseen[0]} builds: "
                "not permitted to see that; left alone",
                "run it as a role that may, or GRANT pg_monitor to this one",
                subject=name,
            )
            continue
        leftover = re.search(REINDEX_LEFTOVER, name) is not None
        what = "left of an interrupted REINDEX" if leftover else "invalid: its build was interrupted"
        way = "DROP" if leftover else "REINDEX"

        def mend(name: str = name, table: str = table, leftover: bool = leftover) -> str:
            return _drop(examination, name) if leftover else _build_again(examination, name, table)

        yield fail(
            f"{shown} on {table} is {what}; it slows writes and serves no search",
            f"vectorkeep doctor --fix, or {psql(f'{way} INDEX CONCURRENTLY {shown}')}",
            subject=name,
            mend=mend,
        )


@check(
    "missing indexes",
    Needs.SCHEMA,
    "every index and unique key of the schema is there",
    fix="builds indexes online; of a key it tells the SQL",
    fine="every index is there",
)
def missing_indexes(examination: Examination) -> Iterator[Found]:
    for table in Base.metadata.sorted_tables:
        for index in sorted(table.indexes, key=lambda one: str(one.name)):
            if examination.value(_EXISTS, index.name):
                continue

            def mend(index: Index = index) -> str:
                return _create(examination, index)

            yield fail(
                f"{index.name} on {table.name} is missing",
                f"vectorkeep doctor --fix, or {psql(_create_statement(index))}",
                subject=str(index.name),
                mend=mend,
            )
        yield from _missing_keys(examination, table)


def _missing_keys(examination: Examination, table: Table) -> Iterator[Found]:
    keys = {str(one.name): one for one in table.constraints if one.__visit_name__ == "unique_constraint"}
    keys[f"{table.name}_pkey"] = table.primary_key
    for name, key in keys.items():
        if examination.value(_HAS_KEY, name, table.name):
            continue
        columns = ", ".join(column.name for column in key.columns)  # type: ignore[attr-defined]
        kind = "PRIMARY KEY" if name.endswith("_pkey") else "UNIQUE"
        yield fail(
            f"the {kind.lower()} {name} ({columns}) of {table.name} is missing",
            psql(
                f"CREATE UNIQUE INDEX CONCURRENTLY {name} ON {table.name} ({columns})",
                f"ALTER TABLE {table.name} ADD CONSTRAINT {name} {kind} USING INDEX {name}",
            ),
            subject=name,
        )


@check(
    "vector indexes",
    Needs.SCHEMA,
    "each table with vectors has its vector index; an interrupted bulk load leaves it without",
    fix="finishes the bulk load: builds the index online",
)
def vector_indexes(examination: Examination) -> Iterator[Found]:
    model = examination.model
    if model is None or not model.indexed:
        yield ok("no model is registered" if model is None else f"{model.dimensions} dimensions: searches are exact")
        return
    missing = [t for t in INDEXED_TABLES if not examination.value(_EXISTS, vector_index_name(t.name))]
    loaders = other_holders(examination.connection, Purpose.BULK_LOAD)
    for table in missing:
        name = vector_index_name(table.name)
        if loaders:
            yield ok(f"a bulk load runs in process {loaders[0]}; {name} is built at its end")
            continue
        [(filled,)] = examination.connection.execute(_VECTORS.format(sql.Identifier(table.name))).fetchall()

        def mend(table: Table = table, model: Model = model) -> str:
            return _build_vector_index(examination, table, model)

        yield (fail if filled else warn)(
            f"{name} is missing, left out by an interrupted bulk load or never built: searches compare all rows",
            "vectorkeep doctor --fix, or vectorkeep maintain, as the owner of the tables",
            subject=name,
            mend=mend,
        )
    if not missing:
        yield ok(f"{' and '.join(vector_index_name(t.name) for t in INDEXED_TABLES)} are there")


# Told by the checks above, which also mend it.
_TOLD = ("no-index", "invalid")


@check("index health", Needs.SCHEMA, "no rule of 'vectorkeep stats' says that a vector index is degraded or critical")
def index_health(examination: Examination) -> Iterator[Found]:
    reports = inspect_indexes(examination.connection, examination.model)
    reasons = [(report, reason) for report in reports for reason in report.findings if reason.rule not in _TOLD]
    for report, reason in reasons:
        judged = fail if reason.verdict == "critical" else warn
        ways = dict.fromkeys((reason.command, psql(*reason.sql.split("; "))))  # for some rules the command is that SQL
        yield judged(f"{report.name} is {reason.verdict}: {reason.evidence}", ", or ".join(ways))
    if not reasons:
        valid = ", ".join(
            f"{report.name}: {'about ' if report.estimated else ''}{report.indexed_rows} rows"
            for report in reports
            if report.valid
        )
        yield ok(valid or "there is no vector index to be judged")


@contextmanager
def _building(examination: Examination) -> Iterator[Connection[Any]]:
    """A connection that may build. Raises BusyError where a load, a maintenance, a rebuild or another builder runs."""
    with ExitStack() as stack:
        connection = stack.enter_context(examination.mending())
        for purpose in (Purpose.MAINTENANCE, Purpose.BULK_LOAD, Purpose.INDEX_BUILD):
            stack.enter_context(advisory_lock(connection, purpose, wait_s=0))
        connection.execute(f"SET lock_timeout = {_CONCURRENT_WAIT_MS}")
        yield connection


def _require_invalid(connection: Connection[Any], name: str) -> None:
    """Raise BusyError where the index is valid or gone by now, or where somebody builds it or may be building it."""
    invalid = {found for found, *_ in connection.execute(_INVALID, (our_tables(),)).fetchall()}
    if name not in invalid:
        raise BusyError(f"{name} is no longer invalid, or somebody builds it now")
    for (pid,) in connection.execute(UNSEEN_BUILDS).fetchall():
        raise BusyError(f"process {pid} builds an index that this role is not permitted to see; it may be {name}")


def _drop(examination: Examination, name: str) -> str:
    with _building(examination) as connection:
        _require_invalid(connection, name)
        connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(name)))
    return f"{name} dropped"


def _build_again(examination: Examination, name: str, table: str) -> str:
    model = examination.model
    ours = {vector_index_name(one.name): one for one in INDEXED_TABLES}
    if name in ours and model is not None:
        _drop(examination, name)
        return _build_vector_index(examination, ours[name], model)
    with _building(examination) as connection:
        _require_invalid(connection, name)
        # Serves indexes under a constraint too, which cannot be dropped; it leaves no copy where it succeeds.
        connection.execute(sql.SQL("REINDEX INDEX CONCURRENTLY {}").format(sql.Identifier(name)))
    return f"{name} on {table} built again"


def _build_vector_index(examination: Examination, table: Table, model: Model) -> str:
    """Build it as a bulk load does at its end. Raises BusyError, PermissionDeniedError."""
    with _building(examination) as connection:
        if not ensure_vector_indexes(connection, model, [table]):
            raise PermissionDeniedError("this role may not build it, or another session holds the table for long")
    return f"{vector_index_name(table.name)} built"


def _create(examination: Examination, index: Index) -> str:
    with _building(examination) as connection:
        connection.execute(_create_statement(index).encode())
    return f"{index.name} built"


def _create_statement(index: Index) -> str:
    """CREATE INDEX CONCURRENTLY of an index of the schema."""
    assert index.table is not None
    copies = MetaData(naming_convention=Base.metadata.naming_convention)
    copy = {one.name: one for one in index.table.to_metadata(copies).indexes}[index.name]
    copy.dialect_options["postgresql"]["concurrently"] = True
    statement = CreateIndex(copy).compile(dialect=postgresql.dialect())  # type: ignore[no-untyped-call]
    return " ".join(str(statement).split())


CHECKS = (invalid_indexes, missing_indexes, vector_indexes, index_health)
