import signal
import subprocess

import psycopg
import pytest

from db.migrate import head_revision, upgrade
from db.migration_session import _LOCK_KEY

from .conftest import ROOT, command, environment, run_command


@pytest.fixture
def database_url(empty_database_url):
    return empty_database_url


def test_a_fresh_database_is_brought_to_head_and_again(vectorkeep):
    first = vectorkeep("migrate")
    assert first.fields == {"before": "none", "after": head_revision()}
    again = vectorkeep("migrate", "--json")
    assert again.json == {"before": head_revision(), "after": head_revision(), "model": None}
    assert vectorkeep("stats").fields["documents"] == "0"


def test_triggers_are_made_and_dropped(vectorkeep, database_url):
    def count():
        with psycopg.connect(database_url) as connection:
            return connection.execute("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal").fetchone()[0]

    assert vectorkeep("migrate", "--with-triggers").fields["triggers"] == "on"
    assert count() == 8
    assert "triggers" not in vectorkeep("migrate").fields
    assert count() == 8
    assert vectorkeep("migrate", "--without-triggers", "--json").json["triggers"] == "off"
    assert count() == 0
    for other in ("--check", "--print-sql --roles", "--adopt --model m"):
        assert "--with-triggers" in vectorkeep("migrate", "--with-triggers", *other.split(), code=2).err


def test_check_tells_and_changes_nothing(vectorkeep, database_url):
    behind = vectorkeep("migrate", "--check", "--json", code=4)
    assert behind.json == {"current": None, "head": head_revision(), "at_head": False}
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT to_regclass('embeddings')").fetchone() == (None,)
    vectorkeep("migrate")
    assert vectorkeep("migrate", "--check").fields == {"current": head_revision(), "head": head_revision()}


def test_every_other_command_says_how_to_migrate(vectorkeep):
    for arguments in (["stats"], ["search", "x"], ["cleanup"], ["maintain"], ["delete-source", "s", "--yes"]):
        ran = vectorkeep(*arguments, code=4)
        assert ran.out == ""
        assert ran.err.startswith("vectorkeep: the database has no vectorkeep schema")
        assert "vectorkeep migrate" in ran.err
        assert ran.err.count("\n") == 1


def test_a_model_is_registered_with_its_indexes(vectorkeep):
    ran = vectorkeep("migrate", "--model", "mine", "--dimensions", "3", "--distance", "l2")
    assert ran.fields["model"] == "mine"
    indexes = {index["name"] for index in vectorkeep("stats", "--json").json["indexes"]}
    assert indexes == {"embeddings_vector_idx", "chunks_vector_idx"}
    vectorkeep("migrate", "--model", "mine", "--dimensions", "3", "--distance", "l2")
    other = vectorkeep("migrate", "--model", "other", "--dimensions", "4", code=4)
    assert "mine" in other.err
    assert "other" in other.err


def test_dimensions_that_are_not_those_of_the_stored_vectors_are_refused_before_they_are_registered(
    vectorkeep, database_url
):
    upgrade(database_url, "0002")
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("INSERT INTO embeddings (id, text, embedding) VALUES ('a', 't', '[1,2,3]')")
    refused = vectorkeep("migrate", "--model", "minilm", "--dimensions", "4", code=6)
    assert "embeddings holds a vector of 3 dimensions, of 'a', and 'minilm' would have 4" in refused.err
    assert vectorkeep("migrate", "--model", "minilm", "--dimensions", "3").fields["model"] == "minilm"


def test_the_packaged_model_is_known_by_name(vectorkeep):
    ran = vectorkeep("migrate", "--model", "wordllama", "--json")
    assert ran.json["model"] == {"model_id": "wordllama-l2-supercat-256", "dimensions": 256, "distance": "cosine"}


@pytest.mark.parametrize(
    "arguments", [["--model", "mine"], ["--dimensions", "3"], ["--adopt"], ["--distance", "hamming"]]
)
def test_half_a_model_is_a_wrong_command_line(arguments):
    assert run_command("migrate", *arguments, env=environment()).code == 2


def test_tables_made_by_hand_are_adopted(vectorkeep, database_url):
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE EXTENSION vector")
        connection.execute("""
            CREATE TABLE embeddings (id text PRIMARY KEY, text text, embedding vector(3), metadata jsonb,
                                     source_id text, created_at timestamptz, updated_at timestamptz);
            CREATE TABLE chunks (id text PRIMARY KEY, document_id text, chunk_index int, text text,
                                 embedding vector(3), metadata jsonb, created_at timestamptz);
            INSERT INTO embeddings VALUES ('a', 'first', '[1,2,3]', '{}', 's', now(), now()),
                                          ('b', 'second', '[3,2,1]', '{}', 's', now(), now());
            INSERT INTO chunks VALUES ('a#0', 'a', 0, 'first', '[1,2,3]', '{}', now()),
                                      ('x#0', 'gone', 0, 'dangling', '[1,2,3]', '{}', now());
        """)
    adopted = vectorkeep("migrate", "--adopt", "--model", "mine", "--json").json
    assert (adopted["documents"], adopted["chunks"], adopted["dimensions"]) == (2, 2, 3)
    assert vectorkeep("stats").fields["documents"] == "2"
    assert vectorkeep("cleanup", "--dry-run").fields["orphaned_chunks"] == "1"


HELD_UP = {
    "an index that is built": ("0001", "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT 1"),
    "a lock within a transaction": ("0003", "LOCK TABLE embeddings IN ROW EXCLUSIVE MODE"),
    "another migration": (None, f"SELECT pg_advisory_lock({_LOCK_KEY['class']}, {_LOCK_KEY['purpose']})"),
}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("revision", "holding"), HELD_UP.values(), ids=HELD_UP)
def test_an_upgrade_that_is_interrupted_says_so_and_runs_again(env, database_url, revision, holding, number, code):
    if revision is not None:
        upgrade(database_url, revision)
    with psycopg.connect(database_url) as holder:
        holder.execute(holding)
        with subprocess.Popen(command("migrate"), cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            told = ""
            while str(holder.info.backend_pid) not in told:  # others of its own may be waited for before
                line = process.stderr.readline()
                assert line, told
                told += line
            process.send_signal(number)
            errors = process.communicate(timeout=60)[1]
    assert (process.returncode, "Traceback" in errors) == (code, False), errors
    assert upgrade(database_url)[1] == head_revision()


def test_the_distance_of_the_environment_is_that_of_a_new_model(vectorkeep, env):
    env["VECTORKEEP_DISTANCE"] = "l2"
    assert vectorkeep("migrate", "--model", "mine", "--dimensions", "3").fields["distance"] == "l2"
    assert vectorkeep("stats").fields


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--distance l2", "--distance"),
        ("--check --roles", "--roles"),
        ("--adopt --model m --roles", "--roles"),
        ("--check --model m --dimensions 3", "--model"),
        ("--roles --print-sql --model m --dimensions 3", "--model"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(vectorkeep, options, named):
    assert named in vectorkeep("migrate", *options.split(), code=2).err
