import json
import os
import pty
import select
import signal
import subprocess
import time

import psycopg
import pytest
from psycopg import sql

from .conftest import ROOT, command, environment, run_command

NOWHERE = "postgresql://me:topsecret@127.0.0.1:1/nothing"


def test_an_unreachable_database_is_one_line_without_its_password():
    ran = run_command("stats", "--database-url", NOWHERE, env=environment())
    assert ran.code == 3
    assert ran.out == ""
    assert ran.err.startswith("vectorkeep: cannot connect to PostgreSQL")
    assert "postgresql://me@127.0.0.1:1/nothing" in ran.err
    assert ran.err.count("\n") == 1
    assert "topsecret" not in ran.err


def test_with_json_an_error_is_the_document():
    ran = run_command("cleanup", "--dry-run", "--json", env=environment(VECTORKEEP_DATABASE_URL=NOWHERE))
    assert ran.code == 3
    error = ran.json["error"]
    assert (error["kind"], error["exit_code"]) == ("UnavailableError", 3)
    assert "topsecret" not in ran.out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"VECTORKEEP_DATABASE_URL": "mysql://me:topsecret@host/db"}, "database URL begins with 'mysql'"),
        ({"VECTORKEEP_DATABASE_URL": NOWHERE, "VECTORKEEP_EF_SEARCH": "lots"}, "ef_search"),
    ],
)
def test_a_bad_setting_is_told(settings, told):
    ran = run_command("stats", env=environment(**settings))
    assert ran.code == 6
    assert told in ran.err
    assert "topsecret" not in ran.err


@pytest.mark.parametrize("switch", [{}, {"VECTORKEEP_DEBUG": "1"}])
def test_a_traceback_is_shown_only_when_asked_for(switch):
    arguments = ["stats", "--database-url", NOWHERE] + ([] if switch else ["--debug"])
    ended = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(**switch), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 3
    assert "Traceback" in ended.stderr
    assert "topsecret" not in ended.stderr


def test_a_role_without_rights_is_told_so(vectorkeep, database_url, env):
    role = f"vk_reader_{os.getpid()}"
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'topsecret'").format(sql.Identifier(role)))
        owner.execute(sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}").format(sql.Identifier(role)))
    try:
        info = psycopg.conninfo.conninfo_to_dict(database_url) | {"user": role, "password": "topsecret"}
        url = f"postgresql://{role}:topsecret@/{info['dbname']}?host={info['host']}&port={info.get('port', 5432)}"
        ran = vectorkeep("delete-source", "s", "--yes", "--database-url", url, code=5)
        assert "permission denied" in ran.err
        assert "topsecret" not in ran.err
    finally:
        with psycopg.connect(database_url, autocommit=True) as owner:
            owner.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


def test_a_reader_that_leaves_is_no_error(env):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        command("stats"), cwd=ROOT, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert ended.returncode == 141
    assert ended.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_ends_in_order(env, number, code):
    record = '{"id": "first", "text": "t", "embedding": [1, 2, 3]}'
    arguments = command("ingest", "-", "--batch-size", "1", "--model", "mine")
    with subprocess.Popen(
        arguments, cwd=ROOT, env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(record + "\n")
        process.stdin.flush()
        _wait_for_document(env["VECTORKEEP_DATABASE_URL"])  # it has come so far, and waits for the next line
        process.send_signal(number)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert "Traceback" not in errors


def _wait_for_document(url):
    with psycopg.connect(url, autocommit=True) as connection:
        deadline = time.monotonic() + 30
        while not connection.execute("SELECT id FROM embeddings").fetchall():
            assert time.monotonic() < deadline, "the command never stored what it was given"
            time.sleep(0.02)


def test_a_terminal_gets_colours_and_a_table(vectorkeep, folder, env):
    vectorkeep("ingest", folder, "--source", "handbook")
    master, slave = pty.openpty()
    shown = env | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(command("search", "owls"), cwd=ROOT, env=shown, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    output = b""
    while select.select([master], [], [], 60)[0]:
        try:
            output += os.read(master, 4096)
        except OSError:  # the other end is closed
            break
    os.close(master)
    assert process.wait(timeout=30) == 0
    assert b"\x1b[1mscore" in output
    assert b"On owls" in output


def test_a_full_disk_for_the_result_is_told(env):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        for options in ([], ["--json"]):
            ran = subprocess.run(command("stats", *options), cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE)
            assert ran.returncode == 1
            assert ran.stderr.decode().splitlines()[-1] == "vectorkeep: cannot write to stdout: No space left on device"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_is_closed_is_no_defect(env, closed):
    shell = f'exec "$@" {closed}'
    ran = subprocess.run(["sh", "-c", shell, "sh", *command("stats")], cwd=ROOT, env=env, capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_nobody_to_ask_is_a_wrong_command_line(env):
    shell = 'exec "$@" <&-'
    ran = subprocess.run(["sh", "-c", shell, "sh", *command("reset")], cwd=ROOT, env=env, capture_output=True)
    assert (ran.returncode, b"--yes" in ran.stderr) == (2, True)


def test_nobody_who_reads_the_messages_ends_no_work(vectorkeep, folder, env):
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        command("ingest", str(folder), "--json", "-v"), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=writer
    )
    os.close(writer)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)["inserted"]) == (0, 3)


def test_a_document_is_utf8_in_any_locale(vectorkeep, folder, env):
    (folder / "cats.md").write_text("# Caf\xe9 \U0001f600\n\nCats.\n")
    vectorkeep("ingest", folder)
    for encoding in ("ascii", "latin-1"):
        ran = subprocess.run(
            command("search", "cats", "--json"), cwd=ROOT, env=env | {"PYTHONIOENCODING": encoding}, capture_output=True
        )
        assert "Caf\xe9 \U0001f600" in json.dumps(json.loads(ran.stdout.decode()), ensure_ascii=False)


def test_a_path_that_is_no_utf8_is_told_in_a_document(env):
    del env["VECTORKEEP_DATABASE_URL"]
    env["VECTORKEEP_HOME"] = os.fsdecode(b"/proc/\xff")
    ran = subprocess.run(command("stats", "--json"), cwd=ROOT, env=env, capture_output=True)
    assert (ran.returncode, json.loads(ran.stdout)["error"]["exit_code"]) == (3, 3)


def test_an_empty_url_is_refused(vectorkeep):
    assert "it is empty" in vectorkeep("stats", "--database-url", "", code=6).err


@pytest.mark.parametrize("name", ["PGSERVICE", "PGHOSTADDR"])
def test_variables_that_lead_elsewhere_are_named(env, name):
    del env["VECTORKEEP_DATABASE_URL"]
    ran = subprocess.run(command("stats"), cwd=ROOT, env=env | {name: "127.0.0.1"}, capture_output=True)
    assert (ran.returncode, ran.stderr.startswith(f"vectorkeep: {name} is set".encode())) == (6, True)


def test_what_was_tried_is_named_and_not_what_the_settings_say_elsewhere(vectorkeep, env):
    env["VECTORKEEP_MAINTENANCE_URL"] = "postgresql://u:topsecret@127.0.0.1:1/direct"
    said = vectorkeep("pause", "why", code=3).err
    assert "tried postgresql://u@127.0.0.1:1/direct" in said
    env |= {"VECTORKEEP_DATABASE_URL": "postgresql://u@127.0.0.1:1/none", "VECTORKEEP_HOME": "/proc/nope"}
    assert "tried the embedded server in /proc/nope/demo" in vectorkeep("demo", code=3).err
