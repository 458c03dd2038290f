"""`vectorkeep rebuild`, as an operator types it."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import orjson
import pytest

from .conftest import Run, run_command


class _Embeddings(BaseHTTPRequestHandler):
    """`/v1/embeddings` of a model of 6 dimensions; what a text says decides its vector."""

    def do_POST(self):
        request = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
        vectors = [np.random.default_rng(len(text)).standard_normal(6).tolist() for text in request["input"]]
        body = orjson.dumps({"data": [{"index": n, "embedding": vector} for n, vector in enumerate(vectors)]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def openai(env):
    """The settings of another embedding model, served on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Embeddings)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield env | {
        "VECTORKEEP_OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1",
        "VECTORKEEP_OPENAI_MODEL": "six",
        "VECTORKEEP_OPENAI_DIMENSIONS": "6",
    }
    server.shutdown()
    server.server_close()


def test_everything_is_made_again_from_the_store(vectorkeep: Run, folder):
    vectorkeep("ingest", str(folder))
    ran = vectorkeep("rebuild")
    assert {name: ran.fields[name] for name in ("documents", "copied", "ingested", "embedded")} == {
        "documents": "3", "copied": "3", "ingested": "0", "embedded": "0",
    }  # fmt: skip
    steps = [line.split(":")[0] for line in ran.err.splitlines()]
    assert steps == ["measuring", "pausing", "creating", "filling", "indexing", "checking", "swapping"]
    assert vectorkeep("rebuild", "--from-store", "--json").json["embedded"] == 0
    assert vectorkeep("rebuild", "--quiet").err == ""


def test_a_folder_is_read_again(vectorkeep: Run, folder):
    vectorkeep("ingest", str(folder))
    (folder / "cats.md").unlink()
    (folder / "dogs.md").write_text("# On dogs\n\nDogs bark.\n")
    ahead = vectorkeep("rebuild", str(folder), "--dry-run")
    assert (ahead.fields["documents_read"], ahead.fields["texts_to_embed"]) == ("3", "1")
    assert "no changes made" in ahead.err
    done = vectorkeep("rebuild", str(folder), "--json").json
    assert (done["ingested"], done["embedded"], done["cache_hits"], done["documents"]) == (3, 1, 2, 3)
    found = {row[2].rpartition("/")[2] for row in vectorkeep("search", "animals").rows}
    assert found == {"dogs.md", "owls.html", "ships.txt"}
    assert vectorkeep("ingest", str(folder)).fields["skipped"] == "3"


def test_a_file_that_cannot_be_read_stops_it(vectorkeep: Run, folder):
    vectorkeep("ingest", str(folder))
    (folder / "cats.md").write_bytes(b"\xff\xfe not UTF-8")
    refused = vectorkeep("rebuild", str(folder), code=6)
    assert "cats.md: not UTF-8" in refused.err
    assert vectorkeep("stats").fields["documents"] == "3"


def test_the_store_moves_to_another_model_and_back(vectorkeep: Run, folder, openai):
    vectorkeep("ingest", str(folder))
    refused = run_command("rebuild", str(folder), env=openai)
    assert refused.code == 4
    assert "vectorkeep rebuild --model" in refused.err
    moved = run_command("rebuild", "--model", "openai", "--json", env=openai).json
    assert (moved["model_id"], moved["dimensions"], moved["embedded"]) == ("six", 6, 3)
    assert 0 <= moved["overlap"] <= 1
    assert len(run_command("search", "cats", env=openai).rows) == 3
    vectorkeep("search", "cats", code=6)  # it embeds by another model
    assert vectorkeep("rebuild", "--rollback", "--dry-run").fields["model_id"].startswith("wordllama")
    assert vectorkeep("rebuild", "--rollback").fields["lost.writes"] == "0"
    assert len(vectorkeep("search", "cats").rows) == 3


def test_a_rollback_that_would_lose_writes_needs_force(vectorkeep: Run, folder):
    assert "no previous tables" in vectorkeep("rebuild", "--rollback", code=7).err
    vectorkeep("ingest", str(folder))
    vectorkeep("rebuild")
    (folder / "dogs.md").write_text("# On dogs\n\nDogs bark.\n")
    vectorkeep("ingest", str(folder))
    refused = vectorkeep("rebuild", "--rollback", code=6)
    assert "1 write transactions since the swap: 1 documents and 1 chunks written, +1 documents" in refused.err
    assert vectorkeep("rebuild", "--rollback", "--force").fields["documents"] == "3"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere"],
        ["{file}"],
        ["--from-store", "{folder}"],
        ["--rollback", "{folder}"],
        ["--force"],
        ["--source", "s"],
        ["--min-overlap", "2"],
    ],
)
def test_what_makes_no_sense_is_refused(vectorkeep: Run, folder, arguments):
    places = {"folder": folder, "file": folder / "cats.md"}
    vectorkeep("rebuild", *(argument.format(**places) for argument in arguments), code=2)


def test_an_unknown_model_is_named(vectorkeep: Run):
    assert "expected one of: openai, wordllama" in vectorkeep("rebuild", "--model", "nothing", code=6).err
