"""Roles of one test: named after its database, because roles are the whole server's, and dropped with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg.sql import SQL, Identifier

from db.roles import KINDS, RolesPlan, make_roles
from tests.servers import database_of

PASSWORD = "pass-of-a-role"


class Roles:
    """The four roles of a store, and login roles granted to them."""

    def __init__(self, admin: psycopg.Connection[Any], database_url: str) -> None:
        self.admin = admin
        self.database_url = database_url
        self.prefix = database_of(database_url)
        self._logins: list[str] = []

    def make(self, *, tenants: bool = False) -> None:
        make_roles(self.database_url, RolesPlan(self.prefix, tenants))

    def name(self, kind: str) -> str:
        return f"{self.prefix}_{kind}"

    def login(self, name: str, kind: str | None = None, *workspaces: str, options: str = "") -> str:
        """The URL of a new login role; of the group `kind`, and mapped to `workspaces`."""
        role = f"{self.prefix}_{name}_login"
        self.admin.execute(SQL("CREATE ROLE {} LOGIN {} PASSWORD {}").format(Identifier(role), SQL(options), PASSWORD))
        self._logins.append(role)
        if kind is not None:
            self.admin.execute(SQL("GRANT {} TO {}").format(Identifier(self.name(kind)), Identifier(role)))
        for workspace in workspaces:
            self.map(role, workspace)
        return self.url(role)

    def url(self, role: str) -> str:
        parts = urlsplit(self.database_url)
        return parts._replace(netloc=f"{role}:{PASSWORD}@{parts.netloc.rpartition('@')[2]}").geturl()

    def map(self, role: str, workspace: str) -> None:
        self.admin.execute("INSERT INTO tenant_workspaces VALUES (%s, %s)", (role, workspace))

    def drop(self) -> None:
        for role in [*reversed(self._logins), *(self.name(kind) for kind in KINDS)]:
            if self.admin.execute("SELECT FROM pg_roles WHERE rolname = %s", (role,)).fetchone():
                self.admin.execute(SQL("DROP OWNED BY {} CASCADE").format(Identifier(role)))
                self.admin.execute(SQL("DROP ROLE {}").format(Identifier(role)))


@contextmanager
def roles_of(database_url: str) -> Iterator[Roles]:
    """The roles of the test that has the database, gone at its end."""
    with psycopg.connect(database_url, autocommit=True) as admin:
        roles = Roles(admin, database_url)
        try:
            yield roles
        finally:
            roles.drop()
