"""Settings and connection strings: where they come from, what is refused, and that passwords stay hidden."""

import pytest
from psycopg.conninfo import conninfo_to_dict

from db.config import Settings, libpq_url, redacted, session_conninfo
from db.errors import ValidationError

SECRET = "s3cr3t/@:%"
QUOTED = "s3cr3t%2F%40%3A%25"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("HOST", "PORT", "DB", "USER", "PASSWORD"):
        monkeypatch.delenv(f"POSTGRES_{name}", raising=False)
    for name in ("DATABASE_URL", "REDIS_URL", "MAINTENANCE_URL", "MODEL_ID", "DIMENSIONS", "DEBUG", "HOME"):
        monkeypatch.delenv(f"VECTORKEEP_{name}", raising=False)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgres+psycopg"])
def test_every_form_of_url_becomes_libpqs(scheme):
    assert Settings.load({"database_url": f"{scheme}://u@h/d"}).postgres_url() == "postgresql://u@h/d"


@pytest.mark.parametrize(
    "url", ["mysql://u:pass-word@h/d", "sqlite:///x", "u:pass-word@h/d", "postgresql", "host=h password=pass-word"]
)
def test_another_scheme_is_refused_and_the_password_not_shown(url):
    with pytest.raises(ValidationError, match="expected postgres://, postgresql:// or") as refused:
        libpq_url(url)
    assert "pass-word" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["postgresql://u:hush@[::1/d", "postgresql://u:hush%zz@h/d", "postgresql://u:hush hush@h/d"]
)
def test_a_url_that_cannot_be_read_is_refused_without_its_password(url):
    with pytest.raises(ValidationError, match="database URL") as refused:
        libpq_url(url)
    told = [refused.value, refused.value.__cause__, refused.value.__context__]
    assert not any("hush" in str(exc) for exc in told)


def test_the_maintenance_url_may_have_any_form_too():
    settings = Settings.load({"database_url": "postgres://h/d", "maintenance_url": "postgresql+psycopg://direct/d"})
    assert settings.direct_url() == "postgresql://direct/d"
    assert Settings.load({"database_url": "postgres://h/d"}).direct_url() is None


def test_the_environment_gives_what_the_call_does_not(monkeypatch):
    monkeypatch.setenv("VECTORKEEP_DATABASE_URL", "postgresql://env/d")
    monkeypatch.setenv("VECTORKEEP_POOL_MAX", "3")
    monkeypatch.setenv("VECTORKEEP_REDIS_URL", "redis://env")
    settings = Settings.load({"pool_max": 4})
    assert (settings.postgres_url(), settings.pool_max, settings.redis_url) == ("postgresql://env/d", 4, "redis://env")


def test_separate_postgres_variables_make_a_url(monkeypatch):
    for name, value in {"HOST": "db.local", "PORT": "5433", "DB": "my db", "USER": "me@x", "PASSWORD": SECRET}.items():
        monkeypatch.setenv(f"POSTGRES_{name}", value)
    url = Settings.load({}).postgres_url()
    assert conninfo_to_dict(url) == {
        "host": "db.local", "port": "5433", "dbname": "my db", "user": "me@x", "password": SECRET,
    }  # fmt: skip


def test_a_url_wins_over_separate_variables(monkeypatch):
    monkeypatch.setenv("POSTGRES_HOST", "other")
    assert Settings.load({"database_url": "postgres://h/d"}).postgres_url() == "postgresql://h/d"


def test_a_socket_folder_is_a_host(monkeypatch):
    monkeypatch.setenv("POSTGRES_HOST", "/run/my sockets")
    monkeypatch.setenv("POSTGRES_USER", "me")
    assert conninfo_to_dict(Settings.load({}).postgres_url()) == {
        "host": "/run/my sockets", "port": "5432", "user": "me",
    }  # fmt: skip


def test_without_a_server_the_embedded_one_is_meant():
    assert Settings.load({}).postgres_url() is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"pool_max": 0}, "pool_max: "),
        ({"distance": "hamming"}, "distance: "),
        ({"dimensions": 16_001}, "dimensions: "),
        ({"ef_search": 1001}, "ef_search: "),
        ({"statement_timeout_s": 0}, "statement_timeout_s: "),
        ({"pool_size": 3}, "pool_size: "),
    ],
)
def test_a_bad_setting_is_named(given, told):
    with pytest.raises(ValidationError, match=f"bad settings: {told}"):
        Settings.load(given)


def test_all_bad_settings_are_named_at_once():
    with pytest.raises(ValidationError, match=r"pool_max: .*; .*distance|distance: .*; .*pool_max"):
        Settings.load({"pool_max": 0, "distance": "x"})


@pytest.mark.parametrize("where", ["call", "environment"])
def test_no_password_is_in_what_settings_show(where, monkeypatch):
    given = {
        "database_url": f"postgresql://u:{QUOTED}@h/d",
        "maintenance_url": f"postgresql://u:{QUOTED}@h2/d",
        "redis_url": f"redis://u:{QUOTED}@r:6379/0",
    }
    monkeypatch.setenv("POSTGRES_PASSWORD", SECRET)
    if where == "environment":
        for name, value in given.items():
            monkeypatch.setenv(f"VECTORKEEP_{name.upper()}", value)
        given = {}
    shown = repr(Settings.load(given)) + str(Settings.load(given))
    assert "s3cr3t" not in shown


def test_a_bad_setting_beside_a_password_does_not_show_it():
    with pytest.raises(ValidationError) as refused:
        Settings.load({"database_url": 7, "redis_url": ["s3cr3t"], "pool_max": "s3cr3t"})
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"postgresql://u:{QUOTED}@h:5433/d", "postgresql://u@h:5433/d"),
        ("postgresql://h/d?user=u&password=s3cr3t", "postgresql://u@h:5432/d"),
        ("postgresql://u@h/d?sslmode=require&sslpassword=s3cr3t&passfile=s3cr3t", "postgresql://u@h:5432/d"),
        ("postgresql:///d?host=/run/sock&password=s3cr3t", "postgresql:///d?host=/run/sock"),
        ("postgresql://", "postgresql://localhost:5432/"),
        (f"redis://u:{QUOTED}@r:6379/0", "redis://u@r:6379/0"),
        (f"redis://:{QUOTED}@r/0", "redis://r/0"),
        ("rediss://r/0?password=s3cr3t", "rediss://r/0"),
    ],
)
def test_a_redacted_url_says_where_but_not_the_password(url, shown):
    assert redacted(url) == shown
    assert "s3cr3t" not in redacted(url)


def test_a_session_has_its_timeouts_and_its_name():
    settings = Settings.load({"statement_timeout_s": 1.5, "idle_in_transaction_timeout_s": 7})
    parts = conninfo_to_dict(session_conninfo("postgresql://h/d?options=-c%20geqo%3Doff", settings))
    assert parts["options"].startswith(
        "-c geqo=off -c statement_timeout=1500 -c idle_in_transaction_session_timeout=7000 "
    )
    assert parts["application_name"] == "vectorkeep"


def test_a_maintenance_session_has_its_timeouts_off():
    parts = conninfo_to_dict(session_conninfo("postgresql://h/d", Settings.load({}), maintenance=True))
    assert "-c statement_timeout=0 -c idle_in_transaction_session_timeout=0" in parts["options"]
    assert parts["application_name"] == "vectorkeep maintenance"


def test_a_name_and_a_timeout_in_the_url_stay():
    parts = conninfo_to_dict(
        session_conninfo("postgresql://h/d?application_name=mine&connect_timeout=9", Settings.load({}))
    )
    assert (parts["application_name"], parts["connect_timeout"]) == ("mine", "9")


@pytest.mark.parametrize(
    ("host", "read"),
    [
        ("db.example", {"host": "db.example"}),
        ("::1", {"host": "::1"}),
        ("[::1]", {"host": "::1"}),
        ("fe80::1%eth0", {"host": "fe80::1%eth0"}),
        ("a:1,b", {"host": "a,b", "port": "1,5432"}),
    ],
)
def test_a_host_is_a_name_or_an_address(monkeypatch, host, read):
    monkeypatch.setenv("POSTGRES_HOST", host)
    assert read.items() <= conninfo_to_dict(Settings.load({}).postgres_url()).items()


@pytest.mark.parametrize("host", ["[::1] ", "[::1", "db/prod", "db?x", "u@db", "a b", "db#1", "::zz", "db:5433"])
def test_what_is_no_host_is_refused_without_the_password(monkeypatch, host):
    monkeypatch.setenv("POSTGRES_HOST", host)
    monkeypatch.setenv("POSTGRES_PASSWORD", "s3cret")
    with pytest.raises(ValidationError, match=r"POSTGRES_HOST is .*expected a host name") as refused:
        Settings.load({}).postgres_url()
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("name", ["database_url", "maintenance_url"])
def test_an_empty_url_is_no_wish_for_another_store(name):
    with pytest.raises(ValidationError, match=f"{name}: .*it is empty"):
        Settings.load({name: ""})


def test_a_url_is_utf8():
    with pytest.raises(ValidationError, match="surrogate"):
        Settings.load({"database_url": "postgresql://h/\udcff"})


def test_a_home_below_ones_own_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VECTORKEEP_HOME", "~/vk")
    assert Settings.load({}).home == tmp_path / "vk"
    monkeypatch.setenv("VECTORKEEP_HOME", "~nobody-of-this-name/vk")
    with pytest.raises(ValidationError, match="home: "):
        Settings.load({})


def test_settings_that_are_no_json_are_named(monkeypatch):
    monkeypatch.setenv("VECTORKEEP_EMBEDDED_SETTINGS", "work_mem=8MB")
    with pytest.raises(ValidationError, match="bad settings: embedded_settings: it is no JSON"):
        Settings.load({})
