import io
import os

import pytest

from ops.html_text import html_text
from ops.ingest_run import runs
from ops.output import excerpt, printable, shown
from ops.reading import Reader, UnreadableError, bounded_lines, displayable, open_records


def test_html_becomes_lines_of_text_and_a_title():
    page = """<!DOCTYPE html><html><head><title>A &amp; B</title><style>p { color: red }</style>
    <script>if (a < b) { document.write("<p>no</p>") }</script></head>
    <body><nav><ul><li>Home</li></ul></nav><h1>Heading</h1><p>One
    paragraph with <b>bold</b> words &mdash; done.</p><pre>line 1
      line 2</pre><ul><li>first<li>second</ul><svg><text>hidden</text></svg><br/>end</body></html>"""
    text, title = html_text(page)
    assert title == "A & B"
    assert text.splitlines() == [
        "Heading",
        "One paragraph with bold words — done.",
        "line 1",
        "line 2",
        "first",
        "second",
        "end",
    ]


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<",
        "<p",
        "</p></p>",
        "<script>never closed",
        "<!--",
        "<p>&#0;&bogus;</p>",
        "<nav><nav></nav>x",
        "<![x",
        "<![ x>y",
    ],
)
def test_broken_html_is_no_error(page):
    html_text(page)


def test_what_follows_a_hidden_element_is_seen_again():
    assert html_text("<nav><nav>a</nav>b</nav>c<svg/>d")[0] == "cd"


def test_ids_are_the_source_and_the_path(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("text")
    named = [item.id for item in Reader("s").texts([tmp_path])]
    unnamed = [item.id for item in Reader().texts([tmp_path])]
    assert named == ["s/sub/a.txt"]
    assert unnamed == [str(tmp_path / "sub" / "a.txt")]


def test_the_same_file_named_twice_is_no_clash(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    reader = Reader()
    assert len({item.id for item in reader.texts([tmp_path, tmp_path / "a.txt"])}) == 1
    assert reader.failed == []


def test_file_names_of_any_bytes_are_stored_as_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("text")
    [item] = Reader("s").texts([tmp_path])
    assert item.id == "s/caf\\xe9.txt"
    item.id.encode()


def test_a_file_too_large_is_refused_without_being_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("ops.reading.MAX_FILE_BYTES", 10)
    (tmp_path / "big.txt").write_text("x" * 11)
    (tmp_path / "fits.txt").write_text("x" * 10)
    reader = Reader("s")
    assert [item.id for item in reader.texts([tmp_path])] == ["s/fits.txt"]
    assert "larger" in reader.failed[0][1]


def test_a_link_that_is_typed_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(list(Reader("s").texts([tmp_path / "link"]))) == 1


def test_records_keep_what_they_say_themselves():
    reader = Reader("command", "w")
    lines = [
        b'{"id": "a", "text": "t", "source_id": "own", "metadata": {"workspace": "own"}}',
        b'{"id": "b", "text": "t"}',
    ]
    own, filled = reader.records(lines, "file")
    assert (own["source_id"], own["metadata"]) == ("own", {"workspace": "own"})
    assert (filled["source_id"], filled["metadata"]) == ("command", {"workspace": "w"})


@pytest.mark.parametrize(
    "line", [b"{", b"1", b"null", b'{"text": "t"}', b'{"id": 1, "text": "t"}', b"\xff", b'{"id": "a"}']
)
def test_a_bad_line_is_told_with_its_number_and_the_rest_goes_on(line):
    reader = Reader()
    assert [r["id"] for r in reader.records([line, b'{"id": "b", "text": "t"}'], "f")] == ["b"]
    assert [name for name, _ in reader.failed] == ["f:1"]


def test_a_pipe_is_not_opened_as_a_file(tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(UnreadableError):
        open_records(tmp_path / "p.jsonl")


def test_runs_keep_the_order_where_an_id_is_in_both_kinds():
    a, b, a2 = {"id": "a", "embedding": [1]}, {"id": "b"}, {"id": "a"}
    c = {"id": "c", "embedding": [1]}
    assert runs([a, b, c]) == [[a, c], [b]]
    assert runs([a, b, a2, c]) == [[a], [b, a2], [c]]
    assert runs([b]) == [[b]]


def test_nothing_that_controls_a_terminal_is_printed():
    assert printable("a\x1b[31m\tb\r\n\u202e\x9b") == "a [31m b    "
    assert printable("Käse ‰ 漢字") == "Käse ‰ 漢字"
    assert excerpt("Title\n=====\n\n  body   text", 100) == "Title body text"
    assert excerpt("word " * 100, 20) == "word word word word…"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "-"), (True, "yes"), (1.5, "1.500"), (["a", "b"], "a, b"), ([], "-"), ("", "-"), ("a\tb", "a b")],
)
def test_values_are_shown_on_one_line(value, expected):
    assert shown(value) == expected


def test_paths_are_shown_in_utf8():
    assert displayable(os.fsdecode(b"/a/\xff")) == "/a/\\xff"


def test_what_was_not_read_is_known_by_its_id_or_may_be_anything(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_text("text")
    reader = Reader("s")
    assert len(list(reader.texts([tmp_path]))) == 1
    assert [reader.may_hold(id_) for id_ in ("s/a.txt", "s/b.txt", "s/gone.txt")] == [True, False, False]
    assert list(reader.records([b'{"id": "c"}'], "f")) == []
    assert [reader.may_hold(id_) for id_ in ("c", "d")] == [True, False]
    assert list(reader.records([b"{"], "f")) == []
    assert reader.may_hold("d")


def test_a_folder_that_cannot_be_opened_may_hold_anything(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fwalk", lambda top, onerror: onerror(PermissionError(13, "Permission denied", "x")) or ())
    reader = Reader("s")
    assert list(reader.texts([tmp_path])) == []
    assert (reader.failed, reader.may_hold("s/x/a.txt")) == ([("x", "Permission denied")], True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
def test_a_closed_folder_that_was_given_is_told_and_the_others_are_read(tmp_path):
    closed, other = tmp_path / "closed", tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("text")
    closed.mkdir(0o000)
    reader = Reader("s")
    assert len(list(reader.texts([closed, other]))) == 1
    assert (reader.failed, reader.may_hold("s/x")) == ([(str(closed), "Permission denied")], True)


def test_the_walk_of_a_folder_that_fails_is_told(tmp_path, monkeypatch):
    def refuse(top, onerror):
        raise PermissionError(13, "Permission denied", str(top))

    monkeypatch.setattr("os.fwalk", refuse)
    reader = Reader("s")
    assert list(reader.texts([tmp_path])) == []
    assert (reader.failed, reader.may_hold("s/x")) == ([(str(tmp_path), "Permission denied")], True)


@pytest.mark.parametrize("name", ["gone", "gone.txt"])
def test_a_path_that_is_not_there_any_more_may_have_been_a_folder_of_anything(tmp_path, name):
    reader = Reader("s")
    assert list(reader.texts([tmp_path / name])) == []
    assert (reader.failed, reader.may_hold("s/x")) == ([(str(tmp_path / name), "No such file or directory")], True)


def test_two_names_that_are_shown_alike_are_not_silently_one(tmp_path):
    for name in (b"caf\xe9.txt", b"caf\\xe9.txt"):
        (tmp_path / os.fsdecode(name)).write_text("text")
    reader = Reader("s")
    assert len(list(reader.texts([tmp_path]))) == 1
    assert "same id 's/caf" in reader.failed[0][1]


def test_jsonl_in_a_folder_is_passed_over_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    os.mkfifo(tmp_path / "pipe.jsonl")
    reader = Reader("s")
    assert list(reader.texts([tmp_path])) == []
    assert (reader.passed_over, reader.record_files) == (2, [str(tmp_path / "a.jsonl")])


def test_of_a_line_too_large_only_the_beginning_is_read(monkeypatch):
    monkeypatch.setattr("ops.reading.MAX_RECORD_BYTES", 40)
    monkeypatch.setattr("ops.reading._SKIPPED_AT_ONCE", 7)
    good = b'{"id": "a", "text": "t"}'
    lines = list(bounded_lines(io.BytesIO(good + b"\n" + b"x" * 100 + b"\n" + b"y" * 41 + b"\r\n" + good)))
    assert [len(line) for line in lines] == [25, 42, 42, 24]
    reader = Reader()
    assert len(list(reader.records(lines, "f"))) == 2
    assert ["larger" in reason for _, reason in reader.failed] == [True, True]
