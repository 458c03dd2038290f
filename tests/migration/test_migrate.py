"""`db.migrate` and the environment: whom they wait for, what they say, which database they mean."""

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import sqlalchemy
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import create_async_engine

from db.config import Settings
from db.errors import BusyError, SchemaError, UnavailableError
from db.migrate import alembic_config, current_revision, head_revision, require_head, upgrade
from db.migration_session import _LOCK_KEY, direct_engine
from tests.servers import database_of

ROOT = Path(__file__).parents[2]
HEAD = head_revision()
LOCK = "SELECT pg_advisory_lock(%(class)s, %(purpose)s)"
UNLOCK = "SELECT pg_advisory_unlock(%(class)s, %(purpose)s)"


def revision_at(url: str) -> str | None:
    with psycopg.connect(url, autocommit=True) as connection:
        return current_revision(connection)


def eventually(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.02)


# ---- alone


@pytest.mark.every_server
def test_two_upgrades_at_once_both_succeed(empty_database_url, empty):
    empty.execute(LOCK, _LOCK_KEY)  # both find the lock taken, then race for it
    environment = {**os.environ, "VECTORKEEP_DATABASE_URL": empty_database_url}
    upgrades = [
        subprocess.Popen(
            [sys.executable, "-m", "alembic", "upgrade", "head"],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        # each has a session that waits and one that watches
        eventually(lambda: any(process.poll() is not None for process in upgrades) or sessions(empty) == 4)
        assert "alembic_version" not in str(empty.execute("SELECT relname FROM pg_class").fetchall())
    finally:
        empty.execute(UNLOCK, _LOCK_KEY)
    errors = [process.communicate(timeout=60)[1] for process in upgrades]
    assert [process.returncode for process in upgrades] == [0, 0], errors
    assert sum("Running upgrade 0001 -> 0002" in error for error in errors) == 1
    assert current_revision(empty) == HEAD


def sessions(connection: psycopg.Connection) -> int:
    row = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'vectorkeep maintenance'"
    ).fetchone()
    return row[0] if row else 0


def test_a_waiting_upgrade_says_for_whom(empty_database_url, empty):
    empty.execute("SET application_name = 'the other one'")
    empty.execute(LOCK, _LOCK_KEY)
    messages: list[str] = []

    def let_go(message: str) -> None:
        messages.append(message)
        empty.execute(UNLOCK, _LOCK_KEY)

    assert upgrade(empty_database_url, on_wait=let_go) == (None, HEAD)
    assert len(messages) == 1
    assert f"process {empty.info.backend_pid} (the other one, " in messages[0]


def test_a_waiting_upgrade_holds_no_snapshot(empty_database_url, empty):
    """Else the upgrade that it waits for could not finish a CREATE INDEX CONCURRENTLY."""
    empty.execute("CREATE TABLE unrelated (id int)")
    empty.execute(LOCK, _LOCK_KEY)
    waits = threading.Event()
    waiter = threading.Thread(target=upgrade, args=(empty_database_url,), kwargs={"on_wait": lambda _: waits.set()})
    waiter.start()
    try:
        assert waits.wait(30)
        empty.execute("SET lock_timeout = '10s'")
        empty.execute("CREATE INDEX CONCURRENTLY unrelated_idx ON unrelated (id)")
    finally:
        empty.execute(UNLOCK, _LOCK_KEY)
        waiter.join()
    assert revision_at(empty_database_url) == HEAD


def test_a_lock_that_is_not_to_be_had_names_its_holder(empty_database_url):
    upgrade(empty_database_url, "0001")
    messages: list[str] = []
    with psycopg.connect(empty_database_url, application_name="a reader") as reader:
        reader.execute("SELECT FROM embeddings")
        with pytest.raises(BusyError, match=rf"2 s.*process {reader.info.backend_pid} \(a reader, .*safe"):
            upgrade(empty_database_url, lock_timeout_s=2, on_wait=messages.append)
        assert any("a reader" in message for message in messages)
    assert revision_at(empty_database_url) == "0001"
    assert upgrade(empty_database_url) == ("0001", HEAD)


def test_the_lock_is_given_back_after_a_failure(empty_database_url, empty):
    empty.execute("CREATE TABLE embeddings (id text)")
    for _ in range(2):  # a lock left behind would keep the second waiting
        with pytest.raises(SchemaError, match="--adopt"):
            upgrade(empty_database_url, on_wait=lambda message: pytest.fail(message))
    assert current_revision(empty) is None


# ---- refusals


def plain_role(url: str) -> str:
    """The URL of a new role that may only connect."""
    name = f"plain_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'plain'")
    parts = urlsplit(url)
    at = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{name}:plain@{at}").geturl()


@pytest.fixture
def plain_url(empty_database_url):
    url = plain_role(empty_database_url)
    yield url
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        role = urlsplit(url).username
        connection.execute(f"DROP OWNED BY {role} CASCADE")
        connection.execute(f"DROP ROLE {role}")


@pytest.mark.every_server
def test_a_role_that_may_not_create_the_extension_is_told_who_can(plain_url, empty_database_url):
    database = database_of(empty_database_url)
    with pytest.raises(SchemaError) as refused:
        upgrade(plain_url)
    message = str(refused.value)
    assert urlsplit(plain_url).username in message
    assert "superuser" in message
    assert f"psql -d {database} -c 'CREATE EXTENSION vector'" in message


@pytest.mark.every_server
def test_a_plain_role_migrates_where_the_extension_is(plain_url, empty):
    empty.execute("CREATE EXTENSION vector")
    empty.execute(f"GRANT CREATE ON SCHEMA public TO {urlsplit(plain_url).username}")
    assert upgrade(plain_url) == (None, HEAD)


def test_the_command_prints_the_message_and_no_traceback(plain_url, run_alembic):
    done = run_alembic("upgrade", "head", VECTORKEEP_DATABASE_URL=plain_url)
    assert done.returncode != 0
    assert "CREATE EXTENSION vector" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_require_head_names_both_revisions_and_the_command(empty_database_url, empty):
    with pytest.raises(SchemaError, match=rf"no vectorkeep schema.*{HEAD}.*'vectorkeep migrate'"):
        require_head(empty)
    upgrade(empty_database_url, "0002")
    with pytest.raises(SchemaError, match=rf"0002.*{HEAD}.*'vectorkeep migrate'"):
        require_head(empty)
    upgrade(empty_database_url)
    require_head(empty)


def test_a_schema_of_a_newer_version_is_not_called_behind(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(SchemaError, match=r"9999.*newer"):
            require_head(connection)
    with pytest.raises(SchemaError, match=r"9999.*newer"):
        upgrade(database_url)


def test_another_programs_revision_is_not_taken_for_a_newer_one(empty_database_url, empty):
    empty.execute("CREATE TABLE alembic_version (version_num varchar(32)); INSERT INTO alembic_version VALUES ('ab12')")
    with pytest.raises(SchemaError, match=r"ab12.*another program.*version_table"):
        require_head(empty)
    with pytest.raises(SchemaError, match=r"ab12.*another program.*version_table"):
        upgrade(empty_database_url)
    assert empty.execute("SELECT to_regclass('embeddings')").fetchone() == (None,)


def test_current_revision_leaves_an_open_transaction_usable(empty_database_url):
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("CREATE TABLE kept (id int)")
        assert current_revision(connection) is None
        connection.execute("INSERT INTO kept VALUES (1)")


def test_a_server_that_is_not_there_is_unavailable():
    with pytest.raises(UnavailableError):
        upgrade("postgresql://nobody@127.0.0.1:1/nothing")


# ---- quiet and quick


@pytest.mark.parametrize("with_file", [False, True])
def test_a_program_that_upgrades_keeps_its_logging(empty_database_url, with_file):
    loggers = [logging.getLogger(name) for name in (None, "alembic", "alembic.runtime.migration")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    if with_file:
        config = Config(ROOT / "alembic.ini")
        config.set_main_option("sqlalchemy.url", empty_database_url.replace("%", "%%"))
        command.upgrade(config, "head")
    else:
        upgrade(empty_database_url)
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before
    assert not logging.getLogger("vectorkeep").disabled


def test_at_head_nothing_is_loaded(database_url):
    code = (
        "import sys\n"
        "from db.migrate import upgrade\n"
        f"assert upgrade({database_url!r}) == ({HEAD!r}, {HEAD!r})\n"
        "assert 'alembic' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# ---- which database


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("VECTORKEEP_DATABASE_URL", "postgres"),
        ("VECTORKEEP_DATABASE_URL", "postgresql"),
        ("VECTORKEEP_MAINTENANCE_URL", "postgresql+psycopg"),  # and it comes first
    ],
)
def test_the_command_takes_each_form_of_url(empty_database_url, run_alembic, name, scheme):
    given = empty_database_url.replace("postgresql", scheme, 1)
    environment = {"VECTORKEEP_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing", name: given}
    done = run_alembic("upgrade", "head", **environment)
    assert done.returncode == 0, done.stderr
    assert revision_at(empty_database_url) == HEAD


def test_the_command_takes_postgres_variables(empty_database_url, run_alembic):
    info = psycopg.conninfo.conninfo_to_dict(empty_database_url)
    names = {"host": "HOST", "port": "PORT", "dbname": "DB", "user": "USER", "password": "PASSWORD"}
    done = run_alembic(
        "upgrade", "head", **{f"POSTGRES_{names[key]}": str(value) for key, value in info.items() if key in names}
    )
    assert done.returncode == 0, done.stderr
    assert revision_at(empty_database_url) == HEAD


def test_without_a_url_the_command_means_the_embedded_server(run_alembic):
    acquire = pytest.importorskip("db.embedded").acquire
    with tempfile.TemporaryDirectory(prefix="vk-") as home:
        Path(home).chmod(0o711)  # as root the server runs as a user that has to pass through
        done = run_alembic("upgrade", "head", VECTORKEEP_HOME=home)
        assert done.returncode == 0, done.stderr
        servers = acquire(Path(home), redis=False)
        try:
            assert revision_at(servers.database_url) == HEAD
        finally:
            servers.release()


def test_a_configured_url_wins(empty_database_url, monkeypatch):
    monkeypatch.setenv("VECTORKEEP_MAINTENANCE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    command.upgrade(alembic_config(empty_database_url), "head")
    assert revision_at(empty_database_url) == HEAD


def test_a_percent_sign_in_the_url_survives(empty_database_url):
    joint = "&" if "?" in empty_database_url else "?"
    upgrade(f"{empty_database_url}{joint}application_name=a%20b")
    assert revision_at(empty_database_url) == HEAD


# ---- a caller's connection


def test_a_connection_passed_in_is_used_and_given_back_as_it_was(empty_database_url):
    engine = direct_engine(empty_database_url, Settings())
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("SET statement_timeout = '7s'"))
        connection.execute(sqlalchemy.text("SET lock_timeout = '8s'"))
        connection.commit()
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        assert not connection.in_transaction()
        assert connection.execute(sqlalchemy.text("SHOW statement_timeout")).scalar_one() == "7s"
        assert connection.execute(sqlalchemy.text("SHOW lock_timeout")).scalar_one() == "8s"
        held = sqlalchemy.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
        assert connection.execute(held).scalar_one() == 0
    assert revision_at(empty_database_url) == HEAD


def test_a_connection_in_a_transaction_is_refused(empty_database_url):
    with direct_engine(empty_database_url, Settings()).begin() as connection:
        connection.execute(sqlalchemy.text("SELECT 1"))
        config = alembic_config()
        config.attributes["connection"] = connection
        with pytest.raises(SchemaError, match=r"engine\.connect\(\)"):
            command.upgrade(config, "head")


def test_upgrade_from_async_code(empty_database_url):
    pytest.importorskip("greenlet", reason="SQLAlchemy's asyncio needs it")

    async def migrate() -> None:
        engine = create_async_engine(
            "postgresql+psycopg://", async_creator=lambda: psycopg.AsyncConnection.connect(empty_database_url)
        )
        async with engine.connect() as connection:
            config = alembic_config()

            def run(sync_connection: sqlalchemy.Connection) -> None:
                config.attributes["connection"] = sync_connection
                command.upgrade(config, "head")
                command.check(config)

            await connection.run_sync(run)
        await engine.dispose()

    asyncio.run(migrate())
    assert revision_at(empty_database_url) == HEAD


# ---- installed


def test_the_wheel_carries_the_migrations(empty_database_url, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    [wheel] = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    assert (installed / "db" / "_alembic" / "env.py").is_file()
    assert not (installed / "alembic").exists()
    code = f"from db.migrate import upgrade, migrations_path; upgrade({empty_database_url!r}); print(migrations_path())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == str(installed / "db" / "_alembic"), done.stderr
    assert revision_at(empty_database_url) == HEAD
