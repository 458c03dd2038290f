"""Passwords: in no output, log, error, metric, repr or process title, whether things work or fail."""

import logging
import pickle
import re
import secrets
import subprocess
import traceback
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
import pytest
import redis
from psycopg import sql

import db
from db.config import OpenAISettings, Settings, redacted
from ops.command import Cli, Common
from ops.output import Output
from tests.servers import database_of

from .conftest import ROOT, environment, forked, run_command

VECTOR = [1.0, *[0.0] * 7]
COMMANDS = [
    ["migrate", "--model", "wordllama"],
    ["migrate", "--check"],
    ["migrate", "--roles", "--print-sql"],
    ["ingest", "{folder}"],
    ["search", "cats"],
    ["stats"],
    ["doctor"],
    ["maintain"],
    ["cleanup"],
    ["pause", "a test", "--ttl-s", "5"],
    ["resume"],
    ["rebuild", "--dry-run"],
    ["delete-source", "nothing", "--yes"],
    ["reset", "--yes", "--force"],
]


@pytest.fixture
def secret():
    return f"s3cret{secrets.token_hex(6)}"


@pytest.fixture
def password(secret):
    """One that every kind of URL has to encode."""
    return f"{secret}@/:?#%41 é"


def with_user(url, user, password):
    parts = urlsplit(url)
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{parts.netloc.rpartition('@')[2]}").geturl()


@pytest.fixture
def urls(database_url, redis_url, password):
    """PostgreSQL and Redis as users of that password."""
    name = database_of(database_url)
    with psycopg.connect(database_url, autocommit=True) as owner, redis.Redis.from_url(redis_url) as admin:
        role = sql.Identifier(name)
        owner.execute(sql.SQL("CREATE ROLE {} SUPERUSER LOGIN PASSWORD {}").format(role, password))
        admin.execute_command("ACL", "SETUSER", name, "on", f">{password}", "~*", "&*", "+@all")
        yield with_user(database_url, name, password), with_user(redis_url, name, password)
        admin.execute_command("ACL", "DELUSER", name)
        owner.execute(sql.SQL("REASSIGN OWNED BY {0} TO CURRENT_USER; DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def in_processes(secret):
    """Command lines of all processes of this machine that name it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return [line for line in found if secret.encode() in line]


# ---- the command line


def test_no_command_that_works_tells(urls, folder, secret, tmp_path):
    env = environment(
        VECTORKEEP_DATABASE_URL=urls[0], VECTORKEEP_REDIS_URL=urls[1], VECTORKEEP_MAINTENANCE_URL=urls[0],
        VECTORKEEP_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    for number, arguments in enumerate(COMMANDS):
        arguments = [argument.format(folder=folder) for argument in arguments]
        ran = run_command(*arguments, "--debug", *(["--json"] if number % 2 else []), env=env)
        assert ran.code in (0, 1), f"{arguments}: {ran.err}"
        assert ran.out + ran.err
        assert secret not in ran.out + ran.err, arguments


def elsewhere(address):
    """Makes a URL one of `address`; one of a socket names its folder in the query."""
    return lambda url: re.sub(r"@[^/?]*([^?]*).*", rf"@{address}\1", url)


FAULTS = {
    "wrong password": lambda url: url.replace("s3cret", "s3cretwrong"),
    "nobody listens": elsewhere("127.0.0.1:9"),
    "no such host": elsewhere("nowhere.invalid"),
    "port is no number": elsewhere("127.0.0.1:port"),
    "not encoded": lambda url: re.sub(r"%2F|%3A|%40", "/", url),
    "other scheme": lambda url: url.replace("://", "ql://"),
    "unknown option": lambda url: f"{url}{'&' if '?' in url else '?'}nonsense=1",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_command_that_fails_tells(urls, secret, fault, tmp_path):
    spoil = FAULTS[fault]
    for postgres, redis_ in ((spoil(urls[0]), urls[1]), (urls[0], spoil(urls[1]))):
        env = environment(
            VECTORKEEP_DATABASE_URL=postgres, VECTORKEEP_REDIS_URL=redis_, VECTORKEEP_HOME=str(tmp_path / "home")
        )
        for arguments in (["stats", "--json"], ["doctor"], ["migrate"]):
            ended = _run_even_with_a_traceback(*arguments, "--debug", env=env)
            assert secret not in ended, (fault, arguments)


def _run_even_with_a_traceback(*arguments, env):
    ended = subprocess.run(forked(*arguments), cwd=ROOT, env=env, capture_output=True, timeout=120, check=False)
    told = (ended.stdout + ended.stderr).decode()
    assert told
    return told


# ---- the library


def everything_about(exc):
    """An exception with all that led to it, as any handler could print it."""
    told = "".join(traceback.format_exception(exc))
    while exc is not None:
        told += repr(exc)
        if isinstance(exc, db.VectorKeepError):  # psycopg's own has the connection with all that it was told
            told += str(vars(exc))
        exc = exc.__cause__ or exc.__context__
    return told


def records(caplog):
    return str([(record.getMessage(), vars(record)) for record in caplog.records])


@pytest.mark.parametrize("debug", [False, True])
def test_a_store_tells_nobody(urls, secret, caplog, debug):
    caplog.set_level(logging.DEBUG)
    with db.connect(
        *urls, model_id="test-model", dimensions=8, debug=debug, maintenance_on_close=False, maintenance_url=urls[0]
    ) as store:
        store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}, {"id": "b", "text": "\0"}])
        for _ in range(2):
            store.search(VECTOR, 1)
        with pytest.raises(db.ValidationError) as refused:
            store.search([1.0], 1)
        store.maintain()
        told = [
            store.get_diagnostics(), store.get_statistics(), store.doctor(), store.settings, store, store.pool,
            store.engine, store.engine.url, store.cache_client, store._parts.database, everything_about(refused.value),
        ]  # fmt: skip
        assert secret not in repr(told) + str(told)
        assert in_processes(secret) == []
        with store.pool.connection() as connection:
            ours = "SELECT * FROM pg_stat_activity WHERE application_name LIKE 'vectorkeep%'"
            told = connection.execute(ours).fetchall()
            assert told
            assert secret not in repr([told, connection, connection.info.dsn])
    with psycopg.connect(urls[0]) as connection:
        assert connection.execute("SELECT count(*) FROM performance_metrics").fetchone() > (0,)
        for table in ("performance_metrics", "maintenance_runs", "write_log", "index_builds"):
            assert secret not in repr(connection.execute(f"SELECT * FROM {table}").fetchall())
    assert secret not in records(caplog)
    with redis.Redis.from_url(urls[1]) as client:
        assert secret not in repr([(key, client.get(key)) for key in client.scan_iter("vectorkeep:*")])


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_tells_nobody(urls, secret, caplog, fault):
    caplog.set_level(logging.DEBUG)
    told = ""
    try:
        db.connect(FAULTS[fault](urls[0]), urls[1]).close()
    except db.VectorKeepError as exc:
        told = everything_about(exc)
    assert told or (fault == "wrong password" and "host=" in urls[0]), "a socket asks for no password"
    assert secret not in told
    told = ""
    try:
        with db.connect(urls[0], FAULTS[fault](urls[1]), model_id="m", dimensions=8) as store:
            store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])
            store.search(VECTOR, 1)
    except db.ValidationError as exc:
        told = everything_about(exc)
    assert secret not in told
    assert secret not in records(caplog)


def test_settings_and_options_hide_it(urls, secret, monkeypatch):
    monkeypatch.setenv("VECTORKEEP_OPENAI_API_KEY", secret)
    monkeypatch.setenv("POSTGRES_HOST", "h")
    monkeypatch.setenv("POSTGRES_PASSWORD", secret)
    options = Common(database_url=urls[0], redis_url=urls[1])
    shown = [
        Settings(database_url=urls[0], maintenance_url=urls[0], redis_url=urls[1]),
        OpenAISettings(model="m", dimensions=3),
        options,
        Cli(options, Output()),
        redacted(urls[0]),
        redacted(urls[1]),
        redacted(f"postgresql://h/d?password={secret}&sslpassword={secret}&host=h"),
        redacted(f"unix:///s.sock?password={secret}"),
    ]
    assert secret not in repr(shown) + str(shown)
    assert "postgresql://" in redacted(urls[0])
    for wrong in ({"databse_url": urls[0]}, {"pool_max": urls[0]}, {"redis_url": [urls[1]]}):
        with pytest.raises(db.ValidationError) as refused:
            Settings.load(wrong)
        assert secret not in everything_about(refused.value)


def test_an_error_that_travels_between_processes_tells_nobody(urls, secret):
    with pytest.raises(db.UnavailableError) as refused:
        db.connect(FAULTS["nobody listens"](urls[0]))
    assert secret.encode() not in pickle.dumps(refused.value)
