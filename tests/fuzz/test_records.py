"""JSONL of any kind: each line is stored as it says, or listed with its number; and no line takes the memory twice."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.ingest_run import IngestRun
from ops.output import Output
from ops.reading import MAX_RECORD_BYTES, Reader
from tests.fuzz.conftest import DIMENSIONS, Embedder, examples
from tests.fuzz.strategies import as_json, is_key, is_metadata, is_text, json_like, metadata, same, texts

MEBI = 2**20
records = st.fixed_dictionaries(
    {"id": texts.filter(is_key), "text": texts.filter(is_text)},
    optional={
        "metadata": metadata.filter(is_metadata).map(as_json),
        "source_id": texts.filter(is_key),
        "embedding": st.lists(st.integers(1, 9), min_size=DIMENSIONS, max_size=DIMENSIONS),
    },
)
BAD_LINES = [
    b'{"id": "a", "text": "t"', b'{"id": "a", "text": "t}', b"{", b"[]", b"1", b"null", b'"text"', b"{}", b"\xff\xfe",
    b"\0", b"\x00\x01\x02", b'{"id": "a", "text": "t", "text": "u"}', b'{"id": "a", "id": "b", "text": "t"}',
    b'{"id": "a", "text": "t", "metadata": {"k": 1, "k": 2}}', b'{"id": "a", "text": "t", "\\u0074ext": "u"}',
    b'{"id" :"a", "text": "t", "id" :"\\u003a"}',
    b'{"id": "a", "text": "t", "metadata": {"n": 123456789012345678901}}',
    b'{"id": "a", "text": "t", "metadata": {"n": [-9223372036854775809]}}',
    b'{"id": "a", "text": "t", "metadata": {"n": 1e999}}', b'{"id": "a", "text": "t", "metadata": {"n": NaN}}',
    b'{"id": "a", "text": "t", "metadata": {"n": ' + b"9" * 5000 + b"}}",
    b'{"id": "a", "text": "t", "metadata": ' + b'{"a":' * 300 + b"1" + b"}" * 301,
    b'{"id": "a", "text": "t", "metadata": ' + b"[" * 100_000, b'{"id": "a", "text": "\\ud800"}',
    b'{"id": "a\\u0000", "text": "t"}', b'{"id": "a", "text": "t\\u0000"}', b'{"id": "a", "text": "\xed\xa0\x80"}',
    b'{"id": "a", "text": "t", "embedding": [1, 2]}',
    b'{"id": "a", "text": "t", "embedding": [1, null, 1, 1, 1, 1, 1, 1]}',
    b'{"id": "a", "text": "t", "embedding": "x"}', b'{"id": "a", "text": "t", "embedding": [0, 0, 0, 0, 0, 0, 0, 0]}',
    b'{"id": "a", "text": "t", "metadata": 1}', b'{"id": "a", "text": "t", "colour": 1}', b'{"id": 1, "text": "t"}',
    b'{"id": "a", "text": ""}', b'{"id": "a"}', b'{"text": "t"}', b'{"id": "a", "text": "t"}{"id": "b", "text": "t"}',
    b'{"id": "a", "text": "t"}\r{"id": "b", "text": "t"}', b'{"id": "a", "text": "t", "source_id": 1}',
    b'{"id": "a", "text": "t", "chunks": 1}', "﻿".encode() + b'{"id": "a", "text": "t"}', b"\x1f\x8b\x08gzip",
    "{}".encode("utf-16"), b"# comment", b"'id': 1",
]  # fmt: skip
lines = st.one_of(records, records, records, st.sampled_from(BAD_LINES), st.binary(min_size=1, max_size=30))
ENDS = [b"\n", b"\r\n", b"\n\n", b" \n", b"\n\t\r\n"]


def encoded(record, ascii_only, indent):
    return json.dumps(record, ensure_ascii=ascii_only, separators=(", ", " : ") if indent else None).encode()


def is_bad(line):
    """Of random bytes: none of these is a record."""
    return b"\n" not in line and line.strip() != b""


@pytest.fixture
def ingest(store, tmp_path, capsys):
    def run(*paths):
        made = IngestRun(store, Output(quiet=True), None, 1000, False)
        made.embedder = Embedder("fuzz")
        made.ingest(paths, None)
        return made.totals

    return run


@examples(50)
@given(
    st.lists(st.tuples(lines, st.sampled_from(ENDS), st.booleans(), st.booleans()), max_size=8),
    st.booleans(),
    st.booleans(),
)
def test_each_line_is_stored_or_listed(store, ingest, tmp_path, report, given_lines, mark, cut):
    path = tmp_path / "records.jsonl"
    given_lines = [line for line in given_lines if isinstance(line[0], dict) or is_bad(line[0])]
    # A mark is one only at the very start of a file: there it is left out, elsewhere it is no JSON.
    begin = [(b'{"id": "first", "text": "t"}', b"\n", False, False)]
    written = [
        (encoded(line, ascii_only, indent) if isinstance(line, dict) else line) + end
        for line, end, ascii_only, indent in begin + given_lines
    ]
    content = (b"\xef\xbb\xbf" if mark else b"") + b"".join(written) + (b'{"id": "cut", "te' if cut else b"")
    path.write_bytes(content)
    good = [line for line, *_ in given_lines if isinstance(line, dict)]
    totals = ingest(path)
    report.counts["tried"] += 1 + len(given_lines) + cut
    assert totals.failed == len(given_lines) - len(good) + cut, totals.errors
    assert totals.inserted + totals.updated + totals.skipped + totals.superseded == len(good) + 1
    for _, reason in totals.errors:
        report.refused(f"{reason}; ")
    last = {record["id"]: record for record in [{"id": "first", "text": "t"}, *good]}
    stored = {document.id: document for document in store.get(list(last))}
    assert stored.keys() == last.keys()
    for id_, record in last.items():
        document = stored[id_]
        assert (document.text, document.source_id) == (record["text"], record.get("source_id", "batch"))
        assert same(document.metadata, record.get("metadata", {}))
        if "embedding" in record:
            assert document.embedding.tolist() == record["embedding"]
    report.accepted(len(good) + 1)
    store.delete(list(last))


@examples(60)
@given(records, st.integers(0, 400), st.one_of(st.just(b""), st.binary(min_size=1, max_size=3)))
def test_a_damaged_record_is_what_json_says_or_is_listed(report, record, place, inserted):
    whole = encoded(record, True, False)
    place %= len(whole) + 1
    line = whole[:place] + inserted + whole[place + len(inserted) :]
    if not line.strip() or b"\n" in line:
        return
    reader = Reader()
    report.counts["tried"] += 1
    read = list(reader.records([line], "f"))
    assert len(read) + len(reader.failed) == 1
    if read:
        expected = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        if expected.get("embedding", ...) is None:
            del expected["embedding"]
        assert same(read[0], expected)
        report.accepted()
    else:
        report.refused(f"{reader.failed[0][1]}; ")


@examples(60)
@given(json_like)
def test_json_reads_as_the_standard_library_reads_it(report, value):
    try:
        line = json.dumps({"id": "a", "text": "t", "metadata": value}).encode()
    except (TypeError, ValueError, RecursionError):
        return
    reader = Reader()
    report.counts["tried"] += 1
    for record in reader.records([line], "f"):
        assert same(record["metadata"], json.loads(line)["metadata"])
        report.accepted()
    for _, reason in reader.failed:
        report.refused(f"{reason}; ")


_MEASURE = """
import resource, sys
from pathlib import Path
from ops.reading import Reader, bounded_lines, open_records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reader = Reader()
with open_records(Path(sys.argv[1])) as file:
    ids = [record["id"] for record in reader.records(bounded_lines(file), "f")]
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(ids, len(reader.failed), "larger than" in str(reader.failed), grown // 1024, sep="|")
"""


def test_a_line_of_100_mb_is_refused_and_does_not_multiply(tmp_path, report):
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        file.write(b'{"id": "before", "text": "t"}\n{"id": "large", "text": "')
        for _ in range(100):
            file.write(b"x" * MEBI)
        file.write(b'"}\n{"id": "after", "text": "t"}\n')
    ran = subprocess.run([sys.executable, "-c", _MEASURE, path], capture_output=True, text=True, check=True)
    ids, failed, told, grown_mb = ran.stdout.strip().split("|")
    assert (ids, failed, told) == ("['before', 'after']", "1", "True")
    assert int(grown_mb) < 2.5 * MAX_RECORD_BYTES / MEBI
    report.counts["tried"] += 3
    report.refused("; ")
    report.accepted(2)


def test_a_line_just_as_large_as_allowed_is_read(monkeypatch, report):
    monkeypatch.setattr("ops.reading.MAX_RECORD_BYTES", 100)
    reader = Reader()
    fits = b'{"id": "a", "text": "' + b"x" * 77 + b'"}'
    assert len(fits) == 100
    for end in (b"\n", b"\r\n", b""):
        assert len(list(reader.records([fits + end], "f"))) == 1
    assert list(reader.records([fits + b" "], "f")) == []
    report.counts["tried"] += 4
    report.refused(reader.failed[0][1])
    report.accepted(3)
