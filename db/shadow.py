"""The shadow store: tables of the same names in a schema of their own, filled and indexed beside the live ones.

A connection whose search path begins with that schema finds a whole store there: the tables of documents and chunks,
and small ones of its own for the write log, the pause, the models and the records of builds. What ingests, searches
and measures works on it unchanged, and touches nothing of the live store but the vector cache. Constraints and indexes
have their final names from the start: names need be unique only within a schema.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from psycopg import Connection
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.sql import SQL, Identifier

from . import faults, table_dress
from .embedding_model import Model
from .engine import Database
from .errors import PermissionDeniedError, SchemaError
from .models import vector_index_name
from .vector_index import INDEXED_TABLES, build_unused_index

SHADOW = "vectorkeep_shadow"
TABLES = ("embeddings", "chunks")
_SIDE_TABLES = ("write_log", "ingestion_pause", "embedding_models", "index_builds", "recall_measurements")

_HOME = """
    SELECT quote_ident(nspname), pg_get_userbyid(relowner), pg_has_role(relowner, 'USAGE'), relkind
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = to_regclass(%s)
"""
# What knows a table by its identity and not by its name would stay with the table that goes.
_DEPENDENTS = """
    SELECT DISTINCT pg_describe_object(classid, objid, 0)
    FROM pg_depend
    WHERE ((refclassid = 'pg_class'::regclass AND refobjid = ANY (%(tables)s::regclass[]))
           OR (refclassid = 'pg_type'::regclass
               AND refobjid IN (SELECT reltype FROM pg_class WHERE oid = ANY (%(tables)s::regclass[]))))
      AND NOT (classid = 'pg_class'::regclass AND objid IN (
          SELECT oid FROM pg_class WHERE relkind IN ('i', 'S', 't') OR oid = ANY (%(tables)s::regclass[])))
      AND classid <> 'pg_attrdef'::regclass AND NOT (classid = 'pg_type'::regclass AND deptype = 'i')
      AND NOT (classid = 'pg_type'::regclass AND objid IN (
          SELECT typarray FROM pg_type JOIN pg_class ON reltype = pg_type.oid
          WHERE pg_class.oid = ANY (%(tables)s::regclass[])))
      AND objid NOT IN (SELECT oid FROM pg_constraint WHERE conrelid = ANY (%(tables)s::regclass[])
                        UNION ALL SELECT oid FROM pg_trigger WHERE tgrelid = ANY (%(tables)s::regclass[])
                        UNION ALL SELECT oid FROM pg_policy WHERE polrelid = ANY (%(tables)s::regclass[]))
    ORDER BY 1
"""
_COLUMNS = """
    SELECT attname FROM pg_attribute
    WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum
"""
_COLUMN_DEFINITIONS = """
    SELECT attname, concat_ws(' ', format_type(atttypid, atttypmod), attcollation, attnotnull, attidentity,
                              attgenerated, attstorage, attcompression, pg_get_expr(adbin, adrelid))
    FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""
# Of NOT NULL constraints, which PostgreSQL 18 lists too, LIKE takes care.
_CONSTRAINTS = """
    SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid = %s::regclass AND contype = ANY (%s) ORDER BY contype DESC, conname
"""
_INDEXES = """
    SELECT relname, pg_get_indexdef(indexrelid) FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE indrelid = %s::regclass AND indisvalid AND relname <> %s
      AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid AND conrelid = indrelid)
"""
_PLACE = """
    SELECT relpersistence = 'u', (SELECT spcname FROM pg_tablespace WHERE oid = reltablespace)
    FROM pg_class WHERE oid = %s::regclass
"""
_SCHEMA_EXISTS = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = %s)"
_SIZE = "SELECT sum(pg_total_relation_size(name::regclass))::bigint FROM unnest(%s::text[]) AS name"


def home_of(connection: Connection[Any]) -> tuple[str, str]:
    """The schema of the live tables, quoted where it must be, and their owner.

    Raises PermissionDeniedError, and SchemaError where these tables cannot be replaced.
    """
    found = [connection.execute(_HOME, (table,)).fetchone() for table in TABLES]
    if None in found:
        raise SchemaError("there is no store to rebuild; run 'vectorkeep migrate'")
    schemas, owners, owned, kinds = zip(*(row for row in found if row), strict=True)
    if not all(owned):
        raise PermissionDeniedError(f"only {owners[0]}, the owner of the tables, may rebuild them; run it as that role")
    if len(set(schemas)) > 1 or len(set(owners)) > 1 or set(kinds) != {"r"}:
        raise SchemaError("embeddings and chunks are not two plain tables of one owner in one schema; expected that")
    dependents = connection.execute(_DEPENDENTS, {"tables": list(TABLES)}).fetchall()
    if dependents:
        raise SchemaError(
            f"these would stay with the tables that a rebuild replaces: {', '.join(name for (name,) in dependents)}; "
            "drop them, and make them again afterwards"
        )
    return schemas[0], owners[0]


def size_of(connection: Connection[Any]) -> int:
    """Bytes of the live tables with their indexes: about what the shadow takes."""
    [(size,)] = connection.execute(_SIZE, (list(TABLES),)).fetchall()
    return int(size)


def columns_of(connection: Connection[Any], table: str) -> list[str]:
    """The columns of `table` that a row is written with."""
    return [name for (name,) in connection.execute(_COLUMNS, (table,))]


def definitions_of(connection: Connection[Any]) -> dict[str, str]:
    """The live tables' columns, constraints and valid indexes by kind and name, as a rebuild makes them again.

    Without the vector indexes, which go by the model.
    """
    found: dict[str, str] = {}
    for table in TABLES:
        for kind, query, values in (
            ("column", _COLUMN_DEFINITIONS, ()),
            ("constraint", _CONSTRAINTS, (["p", "u", "c", "x", "f"],)),
            ("index", _INDEXES, (vector_index_name(table),)),
        ):
            rows = connection.execute(query.encode(), (table, *values)).fetchall()
            found |= {f"{kind} {table}.{name}": definition for name, definition in rows}
    return found


def in_shadow(table: str) -> Identifier:
    return Identifier(SHADOW, table)


def schema_exists(connection: Connection[Any], name: str) -> bool:
    [(exists,)] = connection.execute(_SCHEMA_EXISTS, (name,)).fetchall()
    return bool(exists)


def create_schema(connection: Connection[Any], name: str, owner: str) -> None:
    """Make the schema `name` where there is none. Raises PermissionDeniedError that says what to grant."""
    if schema_exists(connection, name):
        return
    try:
        connection.execute(SQL("CREATE SCHEMA {} AUTHORIZATION {}").format(Identifier(name), Identifier(owner)))
    except pg.InsufficientPrivilege as exc:
        grant = SQL("GRANT CREATE ON DATABASE {} TO {}").format(Identifier(connection.info.dbname), Identifier(owner))
        raise PermissionDeniedError(
            f"a rebuild needs the schema {name}, and this role may not make it; as a superuser run: "
            f"psql -d {connection.info.dbname} -c '{grant.as_string(connection)}'"
        ) from exc


def create_tables(connection: Connection[Any], owner: str, model: Model | None) -> None:
    """Make the shadow's empty tables like the live ones, with the keys that ingestion relies on."""
    create_schema(connection, SHADOW, owner)
    for table in TABLES:
        [(unlogged, tablespace)] = connection.execute(_PLACE, (table,)).fetchall()
        connection.execute(
            SQL(
                "CREATE {} TABLE {} (LIKE {} INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING IDENTITY "
                "INCLUDING STORAGE INCLUDING COMPRESSION INCLUDING COMMENTS) {}"
            ).format(
                SQL("UNLOGGED" if unlogged else ""),
                in_shadow(table),
                Identifier(table),
                SQL("TABLESPACE {}").format(Identifier(tablespace)) if tablespace else SQL(""),
            )
        )
        table_dress.run(connection, table_dress.storage_of(connection, table, f"{SHADOW}.{table}"))
        for name, definition in connection.execute(_CONSTRAINTS, (table, ["p", "u", "c", "x"])).fetchall():
            _add_constraint(connection, table, name, definition)
        connection.execute(SQL("ALTER TABLE {} OWNER TO {}").format(in_shadow(table), Identifier(owner)))
    for table in _SIDE_TABLES:
        connection.execute(SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(in_shadow(table), Identifier(table)))
    if model is not None:
        connection.execute(
            SQL(
                "INSERT INTO {} (model_id, dimensions, distance, active, ef_search) VALUES (%s, %s, %s, true, %s)"
            ).format(in_shadow("embedding_models")),
            (model.model_id, model.dimensions, model.distance, model.ef_search),
        )


def build_indexes(connection: Connection[Any], home: str, model: Model | None) -> None:
    """Build what searches need, on a connection that finds the shadow first. Nobody else uses its tables yet."""
    for table in INDEXED_TABLES:
        connection.execute(SQL("VACUUM (ANALYZE) {}").format(in_shadow(table.name)))
        live = f"{home}.{table.name}"
        for _, definition in connection.execute(_INDEXES, (live, vector_index_name(table.name))).fetchall():
            connection.execute(definition.replace(f" ON {live} ", f" ON {SHADOW}.{table.name} ", 1).encode())
        if model is not None and model.indexed:
            count = SQL("SELECT count(*) FROM {} WHERE embedding IS NOT NULL").format(in_shadow(table.name))
            [(rows,)] = connection.execute(count).fetchall()
            build_unused_index(connection, table, model, rows)
        faults.point(f"rebuild.indexed_{table.name}")


def add_foreign_keys(connection: Connection[Any], home: str) -> None:
    """The foreign keys of the live tables, as valid as they are there, on a connection that finds the shadow first."""
    for table in TABLES:
        for name, definition in connection.execute(_CONSTRAINTS, (f"{home}.{table}", ["f"])).fetchall():
            for target in TABLES:  # on this path the live tables are named with their schema
                definition = definition.replace(f"REFERENCES {home}.{target}(", f"REFERENCES {SHADOW}.{target}(")
            _add_constraint(connection, table, name, definition)


def _add_constraint(connection: Connection[Any], table: str, name: str, definition: str) -> None:
    statement = SQL("ALTER TABLE {} ADD CONSTRAINT {} {{}}").format(in_shadow(table), Identifier(name))
    connection.execute(statement.as_string(connection).replace("{}", definition).encode())


@contextmanager
def shadow_database(live: Database, connection: Connection[Any]) -> Iterator[Database]:
    """Connections that find the shadow's tables first, then all that the live store's find."""
    [(path,)] = connection.execute("SELECT current_setting('search_path')").fetchall()
    url = live.settings.direct_url() or live.url
    options = conninfo_to_dict(url).get("options")
    escaped = re.sub(r"([\\\s])", r"\\\1", f"{SHADOW}, {path}")
    conninfo = make_conninfo(url, options=f"{options or ''} -c search_path={escaped}".strip())
    database = Database(conninfo, live.settings.model_copy(update={"maintenance_url": None}))
    database.open()
    try:
        yield database
    finally:
        database.close()


def drop_schema(connection: Connection[Any], name: str) -> bool:
    """Drop our tables in the schema `name`, and the schema where nothing else is in it. Whether there was one."""
    if not schema_exists(connection, name):
        return False
    tables = SQL(", ").join(Identifier(name, table) for table in (*reversed(TABLES), *_SIDE_TABLES))
    connection.execute(SQL("DROP TABLE IF EXISTS {}").format(tables))
    with suppress(pg.DependentObjectsStillExist, pg.InsufficientPrivilege):  # made beforehand, or used otherwise
        connection.execute(SQL("DROP SCHEMA {}").format(Identifier(name)))
    return True
