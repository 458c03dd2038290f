"""The schema's revision: what it is, what it should be, and the way from one to the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import Connection
from psycopg.pq import TransactionStatus

from .config import Settings, libpq_url, session_conninfo
from .errors import SchemaError, translated

if TYPE_CHECKING:
    from alembic.config import Config

OnWait = Callable[[str], None]

# The newest revision. Known without loading any: every opening of a store compares with it.
_HEAD = "0007"

# Alembic's own name for its table: another program's revisions may be in it.
_OURS = re.compile(r"\d{4}")

_CURRENT = "SELECT version_num FROM alembic_version"


def migrations_path() -> Path:
    """The folder of the migrations: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "_alembic"
    return installed if installed.is_dir() else package.parent / "alembic"


def alembic_config(url: str | None = None) -> Config:
    """Alembic's configuration for the database at `url`, or for that of the settings where it is None."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", _escaped(str(migrations_path())))
    config.set_main_option("path_separator", "os")
    if url is not None:
        config.set_main_option("sqlalchemy.url", _escaped(libpq_url(url)))
    return config


def _escaped(value: str) -> str:
    return value.replace("%", "%%")


def head_revision() -> str:
    """The revision that this version of the library works on."""
    return _HEAD


def current_revision(connection: Connection[Any]) -> str | None:
    """The revision of the database, or None where no migration ever ran. One query."""
    # Inside a caller's transaction a missing table must not spoil what comes after.
    protected = nullcontext() if connection.autocommit and not _in_transaction(connection) else connection.transaction()
    try:
        with protected:
            row = connection.execute(_CURRENT).fetchone()
    except psycopg.errors.UndefinedTable:
        return None
    return row[0] if row else None


def _in_transaction(connection: Connection[Any]) -> bool:
    return connection.info.transaction_status != TransactionStatus.IDLE


def require_head(connection: Connection[Any]) -> None:
    """Raise SchemaError, naming both revisions, where the database is not at head."""
    current = current_revision(connection)
    if current == _HEAD:
        return
    if current is None:
        found = "has no vectorkeep schema"
    elif not _OURS.fullmatch(current):
        raise SchemaError(
            f"alembic_version holds {current!r}, which is no revision of vectorkeep: another program's migrations use "
            "this schema; name its table of revisions differently (Alembic's version_table), or use another database"
        )
    elif current > _HEAD:
        raise SchemaError(
            f"the database is at revision {current}, newer than {_HEAD}, which this vectorkeep works on; "
            "upgrade vectorkeep"
        )
    else:
        found = f"is at revision {current}"
    raise SchemaError(f"the database {found}, this vectorkeep works on {_HEAD}; run 'vectorkeep migrate'")


def upgrade(
    url: str, revision: str = "head", *, lock_timeout_s: float = 5, on_wait: OnWait | None = None
) -> tuple[str | None, str]:
    """Bring the schema to `revision`. Returns the revisions before and after.

    Of two upgrades at once one waits for the other. `on_wait` is told, in words, whom this one waits for.
    Safe to run again after any failure. Raises BusyError where a lock of a table was not to be had within
    `lock_timeout_s`, SchemaError where the database is not fit for it.
    """
    before = _revision_at(url)
    if revision in ("head", _HEAD) and before == _HEAD:
        return before, before
    from alembic import command

    config = alembic_config(url)
    config.attributes.update(lock_timeout_s=lock_timeout_s, on_wait=on_wait)
    with _alembic_errors():
        command.upgrade(config, revision)
    return before, _revision_at(url) or "base"


def downgrade(url: str, revision: str, *, drop_rows: bool = False) -> None:
    """Take the schema back to `revision`, "base" for none.

    Raises SchemaError, before anything is changed, where rows would be dropped and `drop_rows` is False.
    """
    from alembic import command

    config = alembic_config(url)
    config.attributes.update(drop_rows=drop_rows)
    with _alembic_errors():
        command.downgrade(config, revision)


def _revision_at(url: str) -> str | None:
    conninfo = session_conninfo(libpq_url(url), Settings(), maintenance=True)
    with translated(), psycopg.connect(conninfo, autocommit=True) as connection:
        return current_revision(connection)


@contextmanager
def _alembic_errors() -> Iterator[None]:
    from alembic.util import CommandError

    try:
        with translated():
            yield
    except CommandError as exc:
        raise SchemaError(
            f"{exc}; the database was migrated by a newer vectorkeep, or by another program, whose table of revisions "
            "needs another name then (Alembic's version_table)"
        ) from exc
