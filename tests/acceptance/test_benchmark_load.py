"""`vectorkeep benchmark --load`: what it tells, what it refuses, and that nothing stays behind."""

import signal
import subprocess
from pathlib import Path
from secrets import token_hex

import pytest

from db.config import redacted

from .conftest import ROOT, SCRATCH, command, run_command

SMALL = ("--load", "--rows", "200", "--dimensions", "8", "--writers", "1", "--readers", "2")


@pytest.fixture
def env(benchmark_env):
    """Marked, so that the processes of this test are known by it. At the end none may have stayed."""
    mark = token_hex(8)
    yield benchmark_env | {"LOAD_MARK": mark}
    assert processes_of(mark) == []


def processes_of(mark):
    """Processes of the load that were given this environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ops.benchmarks.load" in (folder / "cmdline").read_bytes():
                found += [folder.name] * (f"LOAD_MARK={mark}".encode() in (folder / "environ").read_bytes())
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
    return found


def test_a_short_load_is_told_in_one_document(env):
    ran = run_command("benchmark", *SMALL, "--processes", "2", "--seconds", "3", "--json", env=env)
    assert ran.code == 0, ran.err
    report = ran.json
    assert report["errors"] == []
    operations = {row["operation"]: row for row in report["operations"]}
    assert any(name.startswith("write: upsert") for name in operations)
    assert {"search of 10, from the cache", "search of 10, not from the cache"} <= operations.keys()
    for row in operations.values():
        assert row["calls"] > 0
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["max_ms"] < 60_000
        assert row["per_second"] == pytest.approx(row["calls"] / report["seconds"])
    assert report["seconds"] >= 3
    assert report["pool"]["requests_num"] > sum(row["calls"] for row in operations.values()) / 2
    assert report["pool"]["requests_errors"] == 0
    assert [row["process"] for row in report["processes"]] == [0, 1]
    assert all(row["first_mb"] > 20 for row in report["processes"])
    assert 2 <= report["connections"]["most"] <= report["connections"]["allowed"] == 42
    assert report["load"]["cache"] == redacted(env["VECTORKEEP_REDIS_URL"])
    verdicts = {verdict["what"]: verdict["holds"] for verdict in report["verdicts"]}
    assert verdicts["no errors"] is verdicts["connections bounded"] is True
    assert verdicts["memory flat"] is verdicts["connections do not grow"] is None
    assert "topsecret" not in ran.out + ran.err


def test_calls_that_fail_are_counted_and_end_in_an_error(env):
    """Many writers take turns at one connection: longer than they wait, but who opens a store waits for nobody."""
    impatient = {"VECTORKEEP_POOL_MAX": "1", "VECTORKEEP_POOL_TIMEOUT_S": "1"}
    many = ("--processes", "1", "--writers", "48", "--seconds", "2")
    ran = run_command("benchmark", *SMALL, *many, "--json", env=env | impatient)
    assert ran.code == 1, ran.err
    assert sum(error["count"] for error in ran.json["errors"] if error["kind"] == "UnavailableError") > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--load", "--only", "first-load"], "--only"),
        (["--load", "--rounds", "3"], "--rounds"),
        (["--load", "--quick"], "--quick"),
        (["--load", "--writers", "0", "--readers", "0"], "at least one writer or reader"),
        (["--writers", "0"], "only with --load"),
        (["--seconds", "3"], "only with --load"),
    ],
)
def test_what_means_nothing_is_refused(env, arguments, said):
    ran = run_command("benchmark", *arguments, env=env)
    assert ran.code == 2
    assert said in " ".join(ran.err.split())


def test_ctrl_c_leaves_no_process_and_no_database(env, admin, role):
    arguments = command("benchmark", *SMALL, "--processes", "2", "--seconds", "300", "--redis-url", "none")
    with subprocess.Popen(arguments, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        while "for 300 s" not in (line := process.stderr.readline()):
            assert line, "it ended before the load began"
        assert len(processes_of(env["LOAD_MARK"])) == 2
        assert admin.execute(SCRATCH, (role,)).fetchone() == (1,)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
