import json
import os
import socket

import psycopg
import pytest

NO_VECTOR = {"id": "n", "text": "no vector is given here"}


def jsonl(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def stored(database_url, what="id"):
    with psycopg.connect(database_url) as connection:
        return dict(connection.execute(f"SELECT id, {what} FROM embeddings ORDER BY id").fetchall())


def test_a_folder_is_ingested_and_the_second_time_skipped(vectorkeep, folder, database_url):
    first = vectorkeep("ingest", folder, "--source", "handbook")
    assert (first.fields["read"], first.fields["inserted"], first.fields["failed"]) == ("3", "3", "0")
    assert stored(database_url, "text") == {
        "handbook/animals/owls.html": "Owls hunt at night, when it is dark.",
        "handbook/cats.md": "# On cats\n\nCats sleep sixteen hours a day.\n",
        "handbook/ships.txt": "Ships sail across the ocean with cargo.",
    }
    titles = {id_: m["title"] for id_, m in stored(database_url, "metadata").items()}
    assert titles == {
        "handbook/animals/owls.html": "On owls",
        "handbook/cats.md": "On cats",
        "handbook/ships.txt": "ships.txt",
    }

    again = vectorkeep("ingest", folder, "--source", "handbook", "--json").json
    assert (again["skipped"], again["inserted"], again["embedded"]) == (3, 0, 0)

    (folder / "ships.txt").write_text("Ships are built in yards.")
    changed = vectorkeep("ingest", folder, "--source", "handbook", "--json").json
    assert (changed["skipped"], changed["updated"], changed["embedded"]) == (2, 1, 1)


def test_without_a_source_it_is_the_folder_however_it_is_typed(vectorkeep, folder, database_url):
    vectorkeep("ingest", folder, "--workspace", "acme")
    again = vectorkeep("ingest", f"{folder}/animals/../", "--workspace", "acme", "--json").json
    assert again["skipped"] == 3
    assert set(stored(database_url, "source_id").values()) == {str(folder)}
    assert set(stored(database_url, "workspace").values()) == {"acme"}
    assert str(folder / "cats.md") in stored(database_url)


def test_links_and_special_files_in_a_folder_are_not_read(vectorkeep, folder, tmp_path, database_url):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("not to be read")
    (folder / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "linked").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / ".hidden.txt").write_text("hidden")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(folder)  # a socket's path is short
        listening.bind("socket.txt")
    ran = vectorkeep("ingest", folder, "--source", "handbook", "--json").json
    assert (ran["read"], ran["passed_over"], ran["failed"]) == (3, 3, 0)
    assert len(stored(database_url)) == 3


def test_what_cannot_be_read_is_reported_and_the_rest_goes_in(vectorkeep, folder):
    (folder / "binary.txt").write_bytes(b"PNG\0\0")
    (folder / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (folder / "empty.py").write_text("\n")
    ran = vectorkeep("ingest", folder, "--source", "s", "--json", code=1)
    assert (ran.json["inserted"], ran.json["failed"], ran.json["empty"]) == (3, 2, 1)
    reasons = {name.rpartition("/")[2]: reason for name, reason in ran.json["errors"]}
    assert reasons["binary.txt"].startswith("binary")
    assert reasons["latin.txt"].startswith("not UTF-8 at byte 1")
    assert ran.err.count("vectorkeep: ") == 2


def test_a_file_that_is_named_must_be_of_a_known_kind(vectorkeep, folder, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"PNG")
    ran = vectorkeep("ingest", picture, folder / "cats.md", "--json", code=1)
    assert ran.json["inserted"] == 1
    assert ".jsonl" in ran.json["errors"][0][1]


def test_a_path_that_does_not_exist_is_a_wrong_command_line(vectorkeep, tmp_path):
    assert "does not exist" in vectorkeep("ingest", tmp_path / "nothing", code=2).err


@pytest.mark.parametrize("sync", [(), ("--sync", "--source", "s", "--allow-empty")])
def test_a_folder_of_jsonl_alone_is_told_with_what_to_do(vectorkeep, tmp_path, sync):
    path = jsonl(tmp_path / "the records.jsonl", NO_VECTOR)
    ran = vectorkeep("ingest", tmp_path, "--json", *sync)
    assert (ran.json["read"], ran.json["passed_over"], ran.json["record_files"]) == (0, 1, [path])
    assert f"run 'vectorkeep ingest '{path}''" in ran.err
    assert "nothing was read" in vectorkeep("ingest", (tmp_path / "empty").mkdir() or tmp_path / "empty").err


@pytest.mark.parametrize("name", ["x" * 300 + ".txt", "a/" * 3000, "a\udcff.txt"])
def test_no_name_of_a_file_is_a_defect(vectorkeep, tmp_path, name):
    assert "does not exist" in vectorkeep("ingest", tmp_path / name, code=2).err


@pytest.mark.parametrize("option", ["--source", "--workspace"])
@pytest.mark.parametrize("value", ["", "a\udcff", "x" * 1025])
def test_a_source_that_cannot_be_stored_is_told_once(vectorkeep, folder, option, value):
    ran = vectorkeep("ingest", folder, option, value, code=6)
    assert ran.err.startswith(f"vectorkeep: {option} ")


def test_two_files_of_one_id_are_not_silently_one(vectorkeep, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"text of {name}")
    ran = vectorkeep("ingest", tmp_path / "one", tmp_path / "two", "--source", "s", "--json", code=1)
    assert ran.json["inserted"] == 1
    assert "same id 's/a.txt'" in ran.json["errors"][0][1]


def test_jsonl_with_and_without_vectors_and_with_bad_lines(vectorkeep, tmp_path, database_url):
    vectorkeep("migrate", "--model", "wordllama")
    good = {"id": "v", "text": "with a vector", "embedding": [1.0] + [0.0] * 255, "source_id": "given"}
    path = jsonl(
        tmp_path / "records.jsonl",
        good,
        NO_VECTOR | {"metadata": {"lang": "en"}},
        "{not json",
        [1, 2],
        {"text": "has no id"},
        {"id": "short", "text": "t", "embedding": [1.0, 2.0]},
        {"id": "unknown", "text": "t", "colour": "red"},
        {"id": "null", "text": "null means none", "embedding": None},
        "",
    )
    ran = vectorkeep("ingest", path, "--source", "s", "--workspace", "w", "--json", code=1)
    assert (ran.json["inserted"], ran.json["failed"], ran.json["embedded"]) == (3, 5, 2)
    reasons = dict(ran.json["errors"])
    assert reasons[f"{path}:3"].startswith("not JSON")
    assert reasons[f"{path}:4"].startswith("a list")
    assert reasons[f"{path}:5"].startswith("id is None")
    assert "2 dimensions" in reasons["short"]
    assert "'colour'" in reasons["unknown"]
    assert stored(database_url, "source_id") == {"v": "given", "n": "s", "null": "s"}
    assert set(stored(database_url, "workspace").values()) == {"w"}
    again = vectorkeep("ingest", path, "--source", "s", "--workspace", "w", "--json", code=1)
    assert again.json["skipped"] == 3


def test_jsonl_comes_through_a_pipe_too(vectorkeep, database_url):
    ran = vectorkeep("ingest", "-", "--json", stdin="\ufeff" + json.dumps(NO_VECTOR) + "\n\n")
    assert ran.json["inserted"] == 1
    assert stored(database_url, "source_id") == {"n": "batch"}


def test_the_last_of_an_id_wins_with_or_without_a_vector(vectorkeep, database_url):
    vector = [0.0, 1.0] + [0.0] * 254
    lines = [
        {"id": "a", "text": "first", "embedding": vector},
        {"id": "a", "text": "second"},
        {"id": "b", "text": "first"},
        {"id": "b", "text": "second", "embedding": vector},
    ]
    vectorkeep("ingest", "-", "--model", "wordllama-l2-supercat-256", stdin="\n".join(map(json.dumps, lines)))
    assert stored(database_url, "text") == {"a": "second", "b": "second"}
    with psycopg.connect(database_url) as connection:
        [(is_given,)] = connection.execute(
            "SELECT embedding = %s::vector FROM embeddings WHERE id = 'b'", (str(vector),)
        ).fetchall()
    assert is_given


def test_texts_do_not_go_into_a_store_of_another_model(vectorkeep, folder):
    vectorkeep("migrate", "--model", "mine", "--dimensions", "3")
    ran = vectorkeep("ingest", folder, code=6)
    assert "'mine' (3 dimensions)" in ran.err
    assert "JSONL" in ran.err
    vectors = json.dumps({"id": "v", "text": "t", "embedding": [1, 2, 3]})
    assert vectorkeep("ingest", "-", "--json", stdin=vectors).json["inserted"] == 1


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_closed_folder_is_reported(vectorkeep, folder):
    (folder / "animals").chmod(0)
    try:
        ran = vectorkeep("ingest", folder, "--json", code=1)
    finally:
        (folder / "animals").chmod(0o700)
    assert ran.json["inserted"] == 2
    assert ran.json["errors"][0][1] == "Permission denied"
