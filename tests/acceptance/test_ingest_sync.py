"""`vectorkeep ingest --sync` and `--bulk`: a source becomes what is read, and nothing is deleted on a doubt."""

import json

import psycopg
import pytest

import db
from ops.ingest_run import IngestRun
from ops.output import Output

from .test_ingest import jsonl, stored

HOW = ("--sync", "--source", "s", "--json")


def lines(*records):
    return "\n".join(map(json.dumps, records))


def texts(*ids):
    return [{"id": id_, "text": f"text of {id_}"} for id_ in ids]


def counts(ran):
    names = ("read", "inserted", "updated", "skipped", "deleted", "failed", "embedded")
    return {name: ran.json[name] for name in names if ran.json[name]}


def test_a_source_becomes_what_the_folder_holds_and_a_dry_run_tells_it_before(vectorkeep, folder, database_url):
    vectorkeep("ingest", "-", "--source", "other", stdin=lines(*texts("n")))
    assert counts(vectorkeep("ingest", folder, *HOW)) == {"read": 3, "inserted": 3, "embedded": 3}
    (folder / "ships.txt").unlink()
    (folder / "cats.md").write_text("Cats purr.")
    (folder / "new.txt").write_text("Something new.")
    told = {"read": 3, "inserted": 1, "updated": 1, "skipped": 1, "deleted": 1}
    before = stored(database_url, "text")
    assert counts(vectorkeep("ingest", folder, *HOW, "--dry-run")) == told
    assert stored(database_url, "text") == before
    assert counts(vectorkeep("ingest", folder, *HOW)) == told | {"embedded": 2}
    assert set(stored(database_url)) == {"n", "s/cats.md", "s/animals/owls.html", "s/new.txt"}


def test_a_dry_run_says_so_and_registers_no_model(vectorkeep, folder, database_url):
    ran = vectorkeep("ingest", folder, "--sync", "--dry-run")
    assert (ran.fields["inserted"], ran.fields["dry_run"]) == ("3", "yes")
    assert "dry run: nothing was written" in ran.err
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT model_id FROM embedding_models").fetchall() == []
    assert stored(database_url) == {}


def test_each_folder_is_synced_as_its_own_source(vectorkeep, tmp_path, database_url):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in ("a.txt", "b.txt"):
            (tmp_path / name / file).write_text(f"text of {name} {file}")
    folders = [tmp_path / "one", tmp_path / "two", f"{tmp_path}/one/../two"]
    assert counts(vectorkeep("ingest", *folders, "--sync", "--json")) == {"read": 4, "inserted": 4, "embedded": 4}
    (tmp_path / "one" / "a.txt").unlink()
    (tmp_path / "two" / "b.txt").unlink()
    alone = vectorkeep("ingest", tmp_path / "one", "--sync", "--json")
    assert counts(alone) == {"read": 1, "skipped": 1, "deleted": 1}
    assert counts(vectorkeep("ingest", *folders, "--sync", "--json")) == {"read": 2, "skipped": 2, "deleted": 1}
    assert set(stored(database_url)) == {str(tmp_path / "one" / "b.txt"), str(tmp_path / "two" / "a.txt")}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["handbook/cats.md", "--sync"], "cats.md is not a folder; with --sync say by --source"),
        (["-", "--sync"], "- is not a folder"),
        (["handbook", "handbook/animals", "--sync"], "a file belongs to one source"),
        (["handbook", "--dry-run"], "--dry-run: needs --sync"),
        (["handbook", "--allow-empty"], "--allow-empty: needs --sync"),
    ],
)
def test_what_could_delete_too_much_is_a_wrong_command_line(vectorkeep, folder, database_url, arguments, told):
    vectorkeep("ingest", folder)
    paths = [folder.parent / a if a.startswith("handbook") else a for a in arguments]
    assert told in " ".join(vectorkeep("ingest", *paths, code=2).err.split())
    assert len(stored(database_url)) == 3


def test_where_nothing_is_to_be_read_all_is_deleted_only_when_allowed(vectorkeep, folder, database_url):
    vectorkeep("ingest", folder, "--source", "s")
    for file in ("cats.md", "ships.txt", "animals/owls.html"):
        (folder / file).unlink()
    assert "--allow-empty" in vectorkeep("ingest", folder, *HOW, code=6).err
    assert len(stored(database_url)) == 3
    assert counts(vectorkeep("ingest", folder, *HOW, "--allow-empty")) == {"deleted": 3}
    assert stored(database_url) == {}


def test_a_file_that_cannot_be_read_keeps_what_is_stored_of_it(vectorkeep, folder, database_url):
    vectorkeep("ingest", folder, "--source", "s")
    (folder / "cats.md").write_bytes(b"\xff")
    (folder / "ships.txt").unlink()
    expected = {"read": 1, "skipped": 1, "deleted": 1, "failed": 1}
    assert counts(vectorkeep("ingest", folder, *HOW, "--dry-run", code=1)) == expected
    assert counts(vectorkeep("ingest", folder, *HOW, code=1)) == expected
    assert set(stored(database_url)) == {"s/cats.md", "s/animals/owls.html"}
    (folder / "animals" / "owls.html").write_bytes(b"\xff")
    assert counts(vectorkeep("ingest", folder, *HOW, code=1)) == {"failed": 2}
    assert len(stored(database_url)) == 2


def test_a_file_that_has_no_text_any_more_is_deleted(vectorkeep, folder):
    vectorkeep("ingest", folder, "--source", "s")
    (folder / "cats.md").write_text(" \n")
    ran = vectorkeep("ingest", folder, *HOW)
    assert (ran.json["deleted"], ran.json["empty"]) == (1, 1)


def test_jsonl_files_and_a_pipe_are_synced_together_with_texts(vectorkeep, tmp_path, folder, database_url):
    one, two, three = texts("one", "two", "three")
    path = jsonl(tmp_path / "records.jsonl", one, two | {"source_id": "s"})
    assert counts(vectorkeep("ingest", path, "-", *HOW, stdin=lines(three)))["inserted"] == 3
    again = counts(vectorkeep("ingest", path, folder / "cats.md", *HOW))
    assert again == {"read": 3, "inserted": 1, "skipped": 2, "deleted": 1, "embedded": 1}
    assert set(stored(database_url)) == {"one", "two", "s/cats.md"}


def test_a_line_that_may_be_any_document_deletes_nothing(vectorkeep, database_url):
    vectorkeep("ingest", "-", *HOW, stdin=lines(*texts("a", "b", "c")))
    broken = lines(*texts("a")) + '\n{"id": "b", "te'
    ran = vectorkeep("ingest", "-", *HOW, stdin=broken, code=1)
    assert counts(ran) == {"read": 1, "skipped": 1, "failed": 1}
    assert "nothing is deleted from source 's'" in ran.err
    with_an_id = lines(*texts("a"), {"id": "b", "text": 5})
    ran = vectorkeep("ingest", "-", *HOW, stdin=with_an_id, code=1)
    assert counts(ran) == {"read": 1, "skipped": 1, "deleted": 1, "failed": 1}
    assert set(stored(database_url)) == {"a", "b"}


def test_a_record_of_another_source_stays_there(vectorkeep, database_url):
    a, b = texts("a", "b")
    given = lines(a, b | {"source_id": "other"})
    vectorkeep("ingest", "-", "--source", "s", stdin=given)
    ran = vectorkeep("ingest", "-", *HOW, stdin=given, code=1)
    assert ran.json["errors"] == [["b", "its source is 'other'; --sync reads only what is of 's'"]]
    assert stored(database_url, "source_id") == {"a": "s", "b": "other"}


def test_records_with_vectors_are_refused_and_nothing_is_deleted(vectorkeep, database_url):
    vectorkeep("ingest", "-", *HOW, stdin=lines(*texts("a", "b")))
    vector = {"id": "v", "text": "t", "embedding": [1.0] * 256}
    ran = vectorkeep("ingest", "-", *HOW, stdin=lines(*texts("a"), vector), code=6)
    assert ran.json["error"]["kind"] == "ValidationError"
    assert "'v' has an embedding" in ran.json["error"]["message"]
    assert set(stored(database_url)) == {"a", "b"}


def test_it_gives_way_to_another_sync_of_the_same_source(vectorkeep, folder, database_url):
    def meanwhile():
        yield db.Item("a", "text")
        ran = vectorkeep("ingest", folder, *HOW, code=7)
        assert ran.json["error"]["kind"] == "BusyError"
        assert "sync of source 's' is locked by process" in ran.err

    with db.connect(database_url, False, embedder=db.WordLlamaEmbedder()) as store:
        store.sync(meanwhile(), source_id="s")
    assert set(stored(database_url)) == {"a"}


@pytest.fixture
def index_oids(database_url):
    """`index_oids()` gives name and oid of each vector index."""

    def read():
        with psycopg.connect(database_url) as connection:
            return connection.execute(
                "SELECT relname, oid FROM pg_class WHERE relname LIKE '%\\_vector\\_idx' ORDER BY 1"
            ).fetchall()

    return read


@pytest.mark.parametrize("sync", [(), ("--sync",)])
def test_bulk_builds_the_indexes_anew_and_otherwise_they_stay(vectorkeep, folder, index_oids, sync):
    vectorkeep("migrate", "--model", "wordllama")
    before = index_oids()
    vectorkeep("ingest", folder, *sync, "--no-bulk")
    assert index_oids() == before
    (folder / "new.txt").write_text("new")
    vectorkeep("ingest", folder, *sync)
    assert index_oids() == before
    (folder / "new.txt").write_text("newer")
    vectorkeep("ingest", folder, *sync, "--bulk")
    assert [name for name, _ in index_oids()] == [name for name, _ in before]
    assert not set(index_oids()) & set(before)


def test_a_dry_run_leaves_the_indexes_alone_even_with_bulk(vectorkeep, folder, index_oids):
    vectorkeep("migrate", "--model", "wordllama")
    before = index_oids()
    vectorkeep("ingest", folder, "--sync", "--dry-run", "--bulk")
    assert index_oids() == before


def test_all_batches_of_a_run_into_an_empty_store_are_one_load(vectorkeep, database_url, tmp_path):
    vectorkeep("migrate", "--model", "wordllama")
    path = jsonl(tmp_path / "r.jsonl", *texts(*"abcdef"))
    vectorkeep("ingest", path, "--batch-size", "2")
    with psycopg.connect(database_url) as connection:
        built = connection.execute("SELECT index_name, rows FROM index_builds WHERE rows > 0 ORDER BY 1").fetchall()
    assert built == [("chunks_vector_idx", 6), ("embeddings_vector_idx", 6)]


def test_one_embedder_serves_all_batches_of_a_run_and_none_where_vectors_are_given(database_url, tmp_path, monkeypatch):
    made = []

    def embedder(store):
        made.append(store)
        return db.WordLlamaEmbedder()

    monkeypatch.setattr("ops.ingest_run.text_embedder", embedder)
    vectors = [{"id": f"v{n}", "text": "t", "embedding": [1.0] * 256} for n in range(4)]
    with db.connect(database_url, False, model_id=db.WordLlamaEmbedder().model_id) as store:
        for records, expected in ((vectors, 0), (texts(*"abcde"), 1)):
            path = tmp_path / "r.jsonl"
            jsonl(path, *records)
            run = IngestRun(store, Output(quiet=True), None, 2, None)
            run.ingest([path], None)
            assert (run.totals.inserted, len(made)) == (len(records), expected)
