"""The doctor itself: it looks where no store can be opened, at everything, and stops at no fault."""

import re
import shutil
from pathlib import Path

import psycopg
import pytest

import db
from db import checks, doctor, migrate
from db.checks.base import Needs, check, warn
from tests.integration.examining import Examiner

NAMES = [one.name for one in checks.CHECKS]
DOCUMENT = Path(__file__).parents[2] / "docs" / "health.md"


@pytest.fixture
def examine(database_url, redis_url):
    return Examiner(database_url, redis_url)


def test_names_are_unique_and_every_check_says_something_of_a_sound_store(store):
    assert len(set(NAMES)) == len(NAMES)
    store.batch_upsert([{"id": "a", "text": "t", "embedding": [1.0] * 8}])
    findings = store.doctor()
    assert list(dict.fromkeys(found.check for found in findings)) == NAMES
    # The servers of the tests are fast, not durable; their Redis has no limit. Anything else would be a fault.
    expected = {"durability", "redis memory"}
    assert {found.check for found in findings if found.status != "ok"} <= expected
    assert all(found.remedy for found in findings if found.status != "ok")
    assert not any(found.fixed for found in store.doctor(fix=True))


def test_a_server_that_is_not_there_is_a_finding(redis_url):
    examine = Examiner("postgresql://nobody@127.0.0.1:9/nothing", redis_url)
    found = examine.one("server")
    assert (found.status, "cannot connect" in found.evidence) == ("fail", True)
    assert examine.statuses()["redis"] == "ok"
    assert examine.findings[-1].check == checks.NOT_LOOKED_AT
    assert "pgvector" in examine.findings[-1].evidence


def test_a_database_without_extension_or_schema_is_a_finding(empty_database_url):
    examine = Examiner(empty_database_url)
    found = examine.one("schema")
    assert (found.status, found.remedy) == ("fail", "vectorkeep migrate")
    assert "has no vectorkeep schema" in found.evidence
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("DROP EXTENSION IF EXISTS vector CASCADE")
    found = examine.one("pgvector")
    assert found.status == "fail"
    assert "CREATE EXTENSION vector" in found.remedy
    assert examine.statuses()["connections"] == "ok"
    assert "orphans" in examine.findings[-1].evidence


@pytest.mark.every_server
def test_a_schema_that_is_behind_is_a_finding_until_it_is_migrated(database_url):
    migrate.downgrade(database_url, "0003", drop_rows=True)
    examine = Examiner(database_url)
    found = examine.one("schema")
    assert (found.status, found.remedy) == ("fail", "vectorkeep migrate")
    assert "0003" in found.evidence
    assert examine.statuses()["server"] == "ok"
    migrate.upgrade(database_url)
    assert examine.one("schema").status == "ok"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("UPDATE alembic_version SET version_num = '9999'", "newer"),
        ("INSERT INTO alembic_version VALUES ('other')", "2 revisions"),
        ("ALTER TABLE chunks DROP COLUMN text_hash", "chunks.text_hash"),
        ("DROP TABLE vector_cache", "vector_cache.key"),
    ],
    ids=["newer", "two heads", "column", "table"],
)
def test_a_schema_that_is_not_ours_or_not_whole_is_a_finding(examine, sql, damage, told):
    assert examine.one("schema").status == "ok"
    sql(damage)
    assert any(found.status == "fail" and told in found.evidence for found in examine("schema"))


def test_migrations_with_two_heads_are_a_finding(examine, tmp_path, monkeypatch):
    shutil.copytree(migrate.migrations_path(), tmp_path / "alembic")
    second = "revision = 'x'\ndown_revision = '0004'\nbranch_labels = None\ndepends_on = None\n"
    (tmp_path / "alembic" / "versions" / "x_second.py").write_text(second)
    monkeypatch.setattr(migrate, "migrations_path", lambda: tmp_path / "alembic")
    found = next(found for found in examine("schema") if found.status == "fail")
    assert found.evidence.startswith(f"the migrations end in {migrate.head_revision()}, x;")


def test_a_check_that_raises_is_a_finding_and_the_others_go_on(examine, monkeypatch):
    @check("broken", Needs.SERVER, "raises")
    def broken(_examination):
        raise RuntimeError("its own fault")

    monkeypatch.setattr(doctor, "CHECKS", (*checks.CHECKS[:4], broken, *checks.CHECKS[4:]))
    found = examine.one("broken")
    assert found.status == "fail"
    assert "RuntimeError: its own fault" in found.evidence
    assert set(examine.statuses()) == {*NAMES, "broken"}


def test_a_check_that_cannot_mend_says_why_and_is_still_a_fault(examine, monkeypatch):
    def mend():
        raise db.BusyError("somebody is at it")

    @check("busy", Needs.NOTHING, "cannot be mended")
    def busy(_examination):
        yield warn("broken", "mend it", subject="a", mend=mend)
        yield warn("broken, too", "mend it", subject="b", mend=lambda: "did nothing")

    monkeypatch.setattr(doctor, "CHECKS", (busy,))
    first, second = examine("busy", fix=True)
    assert (first.status, first.fixed, first.evidence) == ("warn", False, "broken; not fixed: somebody is at it")
    assert (second.status, second.fixed, second.evidence) == ("warn", False, "broken, too")


def test_a_check_that_waits_for_a_lock_gives_up_and_says_so(examine, database_url):
    with psycopg.connect(database_url) as other:
        other.execute("LOCK TABLE chunks")
        found = examine.one("orphans")
    assert found.status == "warn"
    assert found.evidence.startswith("could not look: ")
    assert "lock timeout" in found.evidence
    assert examine.one("orphans").status == "ok"


def test_a_role_that_may_see_little_is_told_so_and_nothing_crashes(examine, sql, url_as, admin):
    [(name,)] = sql("SELECT current_database()")
    role = f"{name}_reader"
    sql(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    try:
        sql(f"GRANT SELECT ON embeddings, alembic_version TO {role}")
        weak = Examiner(url_as(role, "pw"), False)
        hidden = weak.one("privileges")
        assert hidden.status == "warn"
        assert "not permitted" in hidden.evidence
        [orphans] = [found for found in weak.findings if found.check == "orphans"]
        assert (orphans.status, orphans.evidence[:13]) == ("warn", "not permitted")
        assert [found.evidence for found in weak.findings if "itself failed" in found.evidence] == []
        assert set(weak.statuses()) == set(NAMES)
    finally:
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")


def test_every_check_is_in_the_document_with_what_it_looks_at_and_what_fix_does():
    rows = dict(re.findall(r"^\| `([a-z ]+)` \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE))
    for one in checks.CHECKS:
        assert rows.get(one.name) == f"{one.about} | {one.fix}".rstrip(), one.name
