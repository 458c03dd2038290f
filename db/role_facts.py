"""What a store's roles, owners, policies and rights are now: what making its roles begins from."""

from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from . import write_triggers
from .shadow import SHADOW
from .swap import PREVIOUS

FUNCTIONS = ("vectorkeep_scope", "vectorkeep_still_true", write_triggers.FUNCTION)
SEPARATED = ["embeddings", "chunks"]

_SESSION = """
    SELECT current_user::text, current_database()::text, nspname::text,
           (SELECT rolsuper FROM pg_roles WHERE rolname = current_user),
           (SELECT nspname::text FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace
            WHERE extname = 'vector'),
           has_database_privilege(current_database(), 'CREATE WITH GRANT OPTION')
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = 'embeddings'::regclass
"""
_ROLES = "SELECT rolname::text FROM pg_roles WHERE rolname = ANY (%s)"
_IS_OWNER = """
    SELECT pg_has_role(%(owner)s, 'USAGE') AND pg_has_role(%(owner)s, 'SET'),
           has_database_privilege(%(owner)s, current_database(), 'CREATE'),
           has_schema_privilege(%(owner)s, %(schema)s, 'CREATE')
           AND has_schema_privilege(%(owner)s, %(schema)s, 'USAGE')
"""
_CONNECTING = """
    SELECT role FROM unnest(%(roles)s::text[]) AS role
    WHERE has_database_privilege(role, current_database(), 'CONNECT')
      AND has_database_privilege(role, current_database(), 'TEMPORARY')
"""
_USING = """
    SELECT role, schema FROM unnest(%(roles)s::text[]) AS role, unnest(%(schemas)s::text[]) AS schema
    WHERE has_schema_privilege(role, schema, 'USAGE')
"""
_TABLES = "SELECT name FROM unnest(%s::text[]) WITH ORDINALITY AS given (name, n) WHERE to_regclass(name) IS NOT NULL"
# What is ours and another's than the owner's: schemas before what is in them.
_STRANGE = """
    SELECT kind, name FROM (
        SELECT 1 AS turn, 'SCHEMA' AS kind, quote_ident(nspname) AS name, nspowner AS owner
        FROM pg_namespace WHERE nspname = ANY (%(aside)s)
        UNION ALL
        SELECT 2, 'TABLE', format('%%I.%%I', nspname, relname), relowner
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE relkind IN ('r', 'p') AND relname = ANY (%(tables)s) AND nspname = ANY (%(aside)s || %(schema)s::text)
        UNION ALL
        SELECT 3, 'FUNCTION', format('%%I.%%I(%%s)', nspname, proname, pg_get_function_identity_arguments(pg_proc.oid)),
               proowner
        FROM pg_proc JOIN pg_namespace ON pg_namespace.oid = pronamespace
        WHERE proname = ANY (%(functions)s) AND nspname = %(schema)s) AS ours
    WHERE owner IS DISTINCT FROM to_regrole(quote_ident(%(owner)s)) ORDER BY turn, name
"""
_ROW_SECURITY = """
    SELECT relname::text, relrowsecurity FROM pg_class WHERE oid = ANY (%s::regclass[]) ORDER BY relname DESC
"""
_POLICIES = """
    SELECT relname::text, polname::text FROM pg_policy JOIN pg_class ON pg_class.oid = polrelid
    WHERE polrelid = ANY (%s::regclass[]) AND polroles = ARRAY[to_regrole(quote_ident(polname))::oid]
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is.

    strange: kind and quoted name of what is not the owner's yet. connecting: roles that may connect and make temporary
    tables. using: roles and the schemas that they may use. policies: table and name of those for the role of that name.
    """

    user: str
    database: str
    schema: str
    superuser: bool
    extension_schema: str
    may_let_create: bool
    has_maintain: bool
    roles: frozenset[str]
    is_owner: bool
    owner_may_create: bool
    owner_may_make_tables: bool
    connecting: frozenset[str]
    using: frozenset[tuple[str, str]]
    tables: list[str]
    strange: list[tuple[str, str]]
    row_security: bool
    without_row_security: list[str]
    policies: frozenset[tuple[str, str]]


def look(connection: Connection[Any], names: dict[str, str], tables: list[str]) -> Facts:
    """What there is of the roles `names`, by kind, and of `tables`."""
    user, database, schema, superuser, extension_schema, may_let_create = _one(connection, _SESSION)
    roles = [name for (name,) in connection.execute(_ROLES, (list(names.values()),))]
    is_owner, owner_may_create, owner_may_make_tables = False, False, False
    if names["owner"] in roles:
        owner = {"owner": names["owner"], "schema": schema}
        is_owner, owner_may_create, owner_may_make_tables = _one(connection, _IS_OWNER, owner)
    separated = connection.execute(_ROW_SECURITY, (SEPARATED,)).fetchall()
    policies = frozenset((table, name) for table, name in connection.execute(_POLICIES, (SEPARATED,)))
    given = {
        "roles": roles,
        "schemas": [schema, extension_schema],
        "aside": [SHADOW, PREVIOUS],
        "schema": schema,
        "tables": tables,
        "functions": list(FUNCTIONS),
        "owner": names["owner"],
    }
    return Facts(
        user=user,
        database=database,
        schema=schema,
        superuser=superuser,
        extension_schema=extension_schema,
        may_let_create=may_let_create,
        has_maintain=connection.info.server_version >= 17_00_00,
        roles=frozenset(roles),
        is_owner=is_owner,
        owner_may_create=owner_may_create,
        owner_may_make_tables=owner_may_make_tables,
        connecting=frozenset(role for (role,) in connection.execute(_CONNECTING, given)),
        using=frozenset((role, place) for role, place in connection.execute(_USING, given)),
        tables=[name for (name,) in connection.execute(_TABLES, (tables,))],
        strange=[(kind, name) for kind, name in connection.execute(_STRANGE, given)],
        row_security=any(enabled and (table, names["app"]) in policies for table, enabled in separated),
        without_row_security=[table for table, enabled in separated if not enabled],
        policies=policies,
    )


def _one(connection: Connection[Any], statement: str, values: dict[str, Any] | None = None) -> tuple[Any, ...]:
    row: tuple[Any, ...]
    [row] = connection.execute(statement.encode(), values).fetchall()
    return row
