"""Roles: who may do what in a store. Four groups without login, to which an operator grants login roles.

owner: the tables are its own; it migrates, builds indexes and rebuilds. app: reads and writes through the library, and
vacuums from PostgreSQL 17 on. reader: reads. tenant: reads and writes the documents and chunks of its workspaces alone,
as row-level security shows them; `tenant_workspaces` says which login role has which, and only the owner writes it.

Nothing here needs a superuser: whoever owns the tables and may create roles can do all of it. Columns that count by
themselves need no right to their sequence, and all but one of the functions are anybody's.
"""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from psycopg import Connection
from psycopg import errors as pg
from psycopg.sql import SQL, Composable, Identifier

from .config import Settings
from .engine import connect_directly
from .errors import PermissionDeniedError, ValidationError, translated
from .locks import Purpose, advisory_lock, limit_lock_waits
from .migrate import require_head
from .migration_locks import lock_in_stints
from .role_facts import SEPARATED, Facts, look
from .role_rights import BY_DEFAULT, GRANTS, MAINTAINED, POLICIES, STILL_TRUE

logger = logging.getLogger("vectorkeep")

DEFAULT_PREFIX = "vectorkeep"
KINDS = ("owner", "app", "reader", "tenant")
_MAX_PREFIX_BYTES = 50  # an identifier has 63

# What the owner of the tables alone may not do.
_FOR_ADMINISTRATORS = re.compile(r"CREATE ROLE|GRANT \S+ TO|GRANT [A-Z, ]+ ON (DATABASE|SCHEMA)")

_LOCK_WAIT_S = 60.0
_TRIES = 5
# Roles are the whole server's: a run for another database may make the same ones at this moment.
_COLLISIONS = (pg.UniqueViolation, pg.DuplicateObject, pg.DeadlockDetected, pg.SerializationFailure, pg.InternalError_)


@dataclass(frozen=True, slots=True)
class RolesPlan:
    """The four roles of a store. `tenants`: row-level security is on; a store that has it keeps it."""

    prefix: str = DEFAULT_PREFIX
    tenants: bool = False

    def __post_init__(self) -> None:
        if not 0 < len(self.prefix.encode()) <= _MAX_PREFIX_BYTES or "\0" in self.prefix:
            raise ValidationError(f"role prefix {self.prefix!r}; expected 1 to {_MAX_PREFIX_BYTES} bytes of text")
        if self.prefix.startswith("pg_"):
            raise ValidationError(f"role prefix {self.prefix!r}; PostgreSQL keeps names that begin with pg_ for itself")

    def name(self, kind: str) -> str:
        return f"{self.prefix}_{kind}"

    @property
    def names(self) -> dict[str, str]:
        return {kind: self.name(kind) for kind in KINDS}


@dataclass(frozen=True, slots=True)
class RolesResult:
    """The roles by kind, whether tenants' row-level security is on, and the SQL that made it so, in order.

    notes: what these roles cannot do here, and the SQL with which an administrator lets them.
    """

    roles: dict[str, str]
    tenants: bool
    statements: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def roles_sql(url: str, plan: RolesPlan) -> RolesResult:
    """The SQL that `make_roles` would run in the store at `url`; nothing is changed."""
    settings = Settings(database_url=url)
    with translated(), connect_directly(url, settings) as connection:
        require_head(connection)
        return _planned(connection, plan, _look(connection, plan))


def make_roles(url: str, plan: RolesPlan) -> RolesResult:
    """Make the roles, the tables the owner's, and grant each role what it needs and nothing else.

    Safe to run again and by several at once: it is one transaction. Raises PermissionDeniedError that names the SQL
    for an administrator where this role may not do it, BusyError where the tables' locks are not to be had within
    `lock_timeout_s`.
    """
    settings = Settings(database_url=url)
    with translated(), connect_directly(url, settings) as connection:
        require_head(connection)
        with advisory_lock(connection, Purpose.ROLES, wait_s=_LOCK_WAIT_S):
            result = _made(connection, plan, settings.lock_timeout_s)
    logger.info("roles.made", extra={"roles": result.roles, "tenants": result.tenants})
    return result


def _made(connection: Connection[Any], plan: RolesPlan, lock_timeout_s: float) -> RolesResult:
    for attempt in range(_TRIES):
        try:
            with connection.transaction():
                limit_lock_waits(connection, lock_timeout_s)
                return _run(connection, plan)
        except _COLLISIONS:
            if attempt == _TRIES - 1:
                raise
        time.sleep(0.05 * 2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _run(connection: Connection[Any], plan: RolesPlan) -> RolesResult:
    facts = _look(connection, plan)
    result = _planned(connection, plan, facts)
    _lock_altered(connection, plan, facts, tenants=result.tenants)
    for statement in result.statements:
        try:
            connection.execute(statement.encode())
        except pg.InsufficientPrivilege as exc:
            reason = exc.diag.message_primary or ""
            raise _denied(connection.info.user, reason, result.statements, statement) from exc
    # Where a right is not the grantor's to give, the server only warns.
    if lacking := _lacking(connection, plan, tenants=result.tenants):
        reason = "the server granted nothing: " + ", ".join(lacking)
        raise _denied(connection.info.user, reason, result.statements, result.statements[0])
    return result


def _lock_altered(connection: Connection[Any], plan: RolesPlan, facts: Facts, *, tenants: bool) -> None:
    """Lock the tables whose owner, policies or row-level security are to change, so that nobody queues behind that."""
    tables = [name for kind, name in facts.strange if kind == "TABLE"]
    if tenants and list(_separate(plan, facts)):
        tables += SEPARATED
    if tables:
        # Who may not lock a table may not alter it either: the statement that is refused says who may.
        with suppress(pg.InsufficientPrivilege), connection.transaction():
            connection.execute(lock_in_stints(*tables, mode="ACCESS EXCLUSIVE").encode())


def _denied(user: str, reason: str, statements: list[str], refused: str) -> PermissionDeniedError:
    """What an administrator has to run first: the making of roles where that is refused, else the statement."""
    first = [s for s in statements if _FOR_ADMINISTRATORS.match(s)]
    named = "; ".join(first if refused in first else [*first, refused])
    return PermissionDeniedError(
        f"{reason} (role {user!r}); nothing was changed; as a superuser run: {named}; then run this again, or have all "
        "of 'vectorkeep migrate --roles --print-sql' run by a superuser"
    )


# -- the plan ------------------------------------------------------------------------------------------------


def _look(connection: Connection[Any], plan: RolesPlan) -> Facts:
    return look(connection, plan.names, [*GRANTS["app"], "tenant_workspaces"])


def _planned(connection: Connection[Any], plan: RolesPlan, facts: Facts) -> RolesResult:
    tenants = plan.tenants or facts.row_security
    parts = [_make(plan, facts), _own(plan, facts), _open(plan, facts)]
    if tenants:
        parts.append(_separate(plan, facts))
    parts.append(_grant(plan, facts, tenants=tenants))
    statements = [statement.as_string(connection) for part in parts for statement in part]
    return RolesResult(plan.names, tenants, statements, list(_notes(connection, plan, facts)))


def _make(plan: RolesPlan, facts: Facts) -> Iterator[Composable]:
    """The roles that are missing, and whoever runs this among the owners."""
    for kind in KINDS:
        if plan.name(kind) not in facts.roles:
            yield SQL("CREATE ROLE {} NOLOGIN").format(Identifier(plan.name(kind)))
    if not (facts.superuser or facts.is_owner):
        yield SQL("GRANT {} TO {} WITH INHERIT TRUE, SET TRUE").format(
            Identifier(plan.name("owner")), Identifier(facts.user)
        )


def _own(plan: RolesPlan, facts: Facts) -> Iterator[Composable]:
    """Everything that the migrations and rebuilds made becomes the owner's."""
    owner = Identifier(plan.name("owner"))
    if not facts.owner_may_make_tables:
        yield SQL("GRANT USAGE, CREATE ON SCHEMA {} TO {}").format(Identifier(facts.schema), owner)
    if facts.may_let_create and not facts.owner_may_create:
        yield SQL("GRANT CREATE ON DATABASE {} TO {}").format(Identifier(facts.database), owner)
    for kind, name in facts.strange:  # both as the server quotes them
        yield SQL("ALTER {} {} OWNER TO {}").format(SQL(kind), SQL(name), owner)


def _open(plan: RolesPlan, facts: Facts) -> Iterator[Composable]:
    """The way to the tables: the database, their schema and that of the extension; and tables yet to come."""
    database, schema = Identifier(facts.database), Identifier(facts.schema)
    for kind in ("app", "reader", "tenant"):
        role = Identifier(plan.name(kind))
        rights = "CONNECT" if kind == "reader" else "CONNECT, TEMPORARY"
        if plan.name(kind) not in facts.connecting:
            yield SQL("GRANT {} ON DATABASE {} TO {}").format(SQL(rights), database, role)
        for place in {facts.schema, facts.extension_schema} - {"pg_catalog"}:
            if (plan.name(kind), place) not in facts.using:
                yield SQL("GRANT USAGE ON SCHEMA {} TO {}").format(Identifier(place), role)
    for kind, rights in BY_DEFAULT.items():
        maintain = ", MAINTAIN" if kind == "app" and facts.has_maintain else ""
        yield SQL("ALTER DEFAULT PRIVILEGES FOR ROLE {} IN SCHEMA {} GRANT {} ON TABLES TO {}").format(
            Identifier(plan.name("owner")), schema, SQL(rights + maintain), Identifier(plan.name(kind))
        )


def _separate(plan: RolesPlan, facts: Facts) -> Iterator[Composable]:
    """Policies, then row-level security: the owner is exempt, so that its dump is whole."""
    for kind, policies in POLICIES.items():
        name = plan.name(kind)
        for table, rule in policies.items():
            if (table, name) not in facts.policies:
                head, _, condition = rule.partition("USING")
                yield SQL("CREATE POLICY {0} ON {1} {2} TO {0} USING {3}").format(
                    Identifier(name), Identifier(facts.schema, table), SQL(head), SQL(condition)
                )
    for table in facts.without_row_security:
        yield SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY").format(Identifier(facts.schema, table))


def _grant(plan: RolesPlan, facts: Facts, *, tenants: bool) -> Iterator[Composable]:
    """Each role's rights from scratch: what one had beyond them goes. Nobody sees the moment between."""
    for kind, tables in GRANTS.items():
        role = Identifier(plan.name(kind))
        yield SQL("REVOKE ALL ON {} FROM {}").format(
            SQL(", ").join(Identifier(facts.schema, table) for table in facts.tables), role
        )
        for table, rights in tables.items() if kind != "tenant" or tenants else ():
            more = ", MAINTAIN" if kind == "app" and facts.has_maintain and table in MAINTAINED else ""
            yield SQL("GRANT {} ON {} TO {}").format(SQL(rights + more), Identifier(facts.schema, table), role)
    if tenants:
        role = Identifier(plan.name("tenant"))
        yield SQL("GRANT EXECUTE ON FUNCTION {}.{} TO {}").format(Identifier(facts.schema), SQL(STILL_TRUE), role)


def _notes(connection: Connection[Any], plan: RolesPlan, facts: Facts) -> Iterator[str]:
    if not (facts.may_let_create or facts.owner_may_create):
        grant = SQL("GRANT CREATE ON DATABASE {} TO {}").format(
            Identifier(facts.database), Identifier(plan.name("owner"))
        )
        yield f"for 'vectorkeep rebuild' the owner needs more than this role may give: {grant.as_string(connection)}"
    if not facts.has_maintain:
        yield f"before PostgreSQL 17 only {plan.name('owner')} may VACUUM: run cleanup and maintain as one of it"


# -- what was granted ----------------------------------------------------------------------------------------

_LACKING_TABLE = """
    SELECT privilege FROM unnest(%(privileges)s::text[]) AS privilege
    WHERE NOT has_table_privilege(%(role)s, %(table)s, privilege)
"""
_LACKING_PLACE = """
    SELECT right_ FROM (VALUES
        (has_database_privilege(%(role)s, current_database(), 'CONNECT'), 'CONNECT on the database'),
        (%(reads)s OR has_database_privilege(%(role)s, current_database(), 'TEMPORARY'), 'TEMPORARY on the database'),
        (has_schema_privilege(%(role)s, current_schema(), 'USAGE'), 'USAGE on the schema')) AS held (is_held, right_)
    WHERE NOT is_held
"""


def _lacking(connection: Connection[Any], plan: RolesPlan, *, tenants: bool) -> list[str]:
    """Rights that were to be granted and are not held."""
    found: list[str] = []
    for kind, tables in GRANTS.items():
        role = plan.name(kind)
        places = connection.execute(_LACKING_PLACE, {"role": role, "reads": kind == "reader"}).fetchall()
        found += [f"{right} to {role}" for (right,) in places]
        for table, rights in tables.items() if kind != "tenant" or tenants else ():
            asked = {"role": role, "table": table, "privileges": _whole(rights)}
            found += [f"{right} on {table} to {role}" for (right,) in connection.execute(_LACKING_TABLE, asked)]
    return found


def _whole(rights: str) -> list[str]:
    """The rights to all columns among `rights`."""
    return re.sub(r"\w+ \([^)]*\)", "", rights).replace(",", " ").split()


__all__ = ["DEFAULT_PREFIX", "GRANTS", "KINDS", "RolesPlan", "RolesResult", "make_roles", "roles_sql"]
