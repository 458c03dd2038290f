"""Folders that hold anything: each text file is stored or listed, and nothing outside or special is ever read."""

import contextlib
import os
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.html_text import html_text
from ops.ingest_run import IngestRun
from ops.output import Output
from ops.reading import Reader, displayable
from tests.fuzz.conftest import Embedder, examples
from tests.fuzz.strategies import NASTY, is_text

name_bytes = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.sampled_from([n.encode(errors="surrogatepass") for n in NASTY]),
    st.sampled_from([b"-rf", b"--source", b"-", b"a\nb", b"\xff\xfe", b"\\xff\\xfe", b"caf\xe9", b"caf\\xe9"]),
    st.sampled_from([b"~", b"$HOME", b"con", b"x" * 250]),
)  # fmt: skip
names = name_bytes.map(lambda n: n.replace(b"\0", b"").replace(b"/", b"")[:250]).filter(lambda n: n.strip(b"."))
contents = st.one_of(
    st.text().map(lambda text: text.encode(errors="surrogatepass")),
    st.binary(max_size=40),
    st.sampled_from([b"", b" \n", b"\xef\xbb\xbftext", b"a\0b", b"\xff", b"text\r\nmore\rlast", b"<![x", b"<p>&#0;"]),
)
suffixes = st.sampled_from([b".txt", b".md", b".html", b".TXT", b".rst", b".py"])


@pytest.fixture
def ingest(store, capsys):
    def run(*paths, source="files"):
        made = IngestRun(store, Output(quiet=True), None, 1000, False)
        made.embedder = Embedder("fuzz")
        made.ingest(paths, source)
        return made.totals

    return run


def expected_text(content):
    """What a plain text file is stored as; None where it is refused, "" where it has no text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if not text.strip():
        return "" if b"\0" not in content else None
    return text if is_text(text) else None


@examples(30)
@given(st.lists(st.tuples(names, suffixes, contents, st.booleans()), min_size=1, max_size=6))
def test_files_of_any_name_and_content_are_stored_or_listed(store, ingest, tmp_path_factory, report, files):
    made = tmp_path_factory.mktemp("names")
    folder = os.fsencode(made)
    _path(folder + b"/deep\xff").mkdir()
    written = {}
    for name, suffix, content, deep in files:
        path = folder + (b"/deep\xff/" if deep else b"/") + name + suffix
        _path(path).write_bytes(content)
        if not name.startswith(b"."):
            written[path] = content
    totals = ingest(made)
    report.counts["tried"] += len(written)
    for _, reason in totals.errors:
        report.refused(f"{reason}; ")
    assert totals.read + totals.empty + totals.failed == len(written) + _stored_badly(totals, written)
    assert totals.inserted + totals.failed + totals.empty == len(written)
    report.accepted(totals.inserted + totals.empty)
    for document in store.get([f"files/{displayable(p.removeprefix(folder + b'/'))}"[:1024] for p in written]):
        same_id = [
            c for p, c in written.items() if f"files/{displayable(p.removeprefix(folder + b'/'))}" == document.id
        ]
        if not document.id.endswith(".html"):
            assert document.text in map(expected_text, same_id)
    store.delete_by_source_id("files")


def _path(name):
    return Path(os.fsdecode(name))


def _stored_badly(totals, written):
    """Files that were read, and then refused by the store: their ids are too long."""
    return sum("bytes; expected at most" in reason for _, reason in totals.errors)


def test_names_that_look_alike_are_two_files(store, ingest, tmp_path, report):
    for name in (b"caf\xe9.txt", b"caf\\xe9.txt"):
        (tmp_path / os.fsdecode(name)).write_text(repr(name))
    totals = ingest(tmp_path)
    report.counts["tried"] += 2
    assert (totals.inserted, totals.superseded, totals.failed) == (1, 0, 1)
    report.refused(totals.errors[0][1])
    report.accepted()


def test_paths_longer_than_an_id_are_listed(store, ingest, tmp_path, report):
    deep = tmp_path
    for _ in range(5):
        deep = deep / ("d" * 250)
        deep.mkdir()
    (deep / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    totals = ingest(tmp_path)
    assert (totals.inserted, totals.failed) == (1, 1)
    report.counts["tried"] += 2
    report.refused(totals.errors[0][1])
    report.accepted()


def test_nothing_outside_and_nothing_special_is_read(store, ingest, tmp_path, report):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for made in (outside, folder, folder / "sub", folder / "dir.txt"):
        made.mkdir()
    secret = outside / "secret.txt"
    secret.write_text("secret")
    (folder / "good.txt").write_text("good")
    links = {
        "file.txt": secret,
        "relative.txt": "../outside/secret.txt",
        "dangling.txt": "nowhere",
        "self.txt": "self.txt",
    }
    links |= {
        "inside.txt": "good.txt",
        "folder": outside,
        "up": "..",
        "root": "/",
        "loop": ".",
        "proc.txt": "/proc/self/environ",
    }
    for place in (folder, folder / "sub"):
        for name, target in links.items():
            (place / name).symlink_to(target)
        os.mkfifo(place / "fifo.txt")
        _socket(place, "socket.txt")
        _devices(place)
    os.mkfifo(folder / "fifo.jsonl")
    totals = ingest(folder)
    assert [document.text for document in store.get(["files/good.txt"])] == ["good"]
    assert (totals.read, totals.inserted, totals.failed) == (1, 1, 0)
    assert totals.record_files == []
    report.counts["tried"] += 1
    report.accepted()
    for special in ("fifo.txt", "socket.txt", "fifo.jsonl"):
        totals = ingest(folder / special)
        assert totals.read == 0
        report.counts["tried"] += 1
        report.rows_of(totals)


def _socket(folder, name):
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as listening:  # a socket's path is short
        listening.bind(name)


def _devices(folder):
    """Those that never end and never answer, where the user may make them."""
    try:
        os.mknod(folder / "zero.txt", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        os.mknod(folder / "tty.txt", stat.S_IFCHR | 0o666, os.makedev(5, 0))
        os.mknod(folder / "disk.txt", stat.S_IFBLK | 0o666, os.makedev(7, 0))
    except PermissionError:
        return


@pytest.mark.parametrize("becomes", ["link", "fifo", "folder", "gone"])
def test_what_changes_after_it_was_found_is_not_followed(tmp_path, report, becomes):
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    reader = Reader("s")
    find = reader.find

    def found_and_changed(paths):
        for found in find(paths):
            (folder / "a.txt").unlink()
            if becomes == "link":
                (folder / "a.txt").symlink_to(outside)
            elif becomes == "fifo":
                os.mkfifo(folder / "a.txt")
            elif becomes == "folder":
                (folder / "a.txt").mkdir()
            yield found

    reader.find = found_and_changed
    assert list(reader.texts([folder])) == []
    [(_, reason)] = reader.failed
    report.counts["tried"] += 1
    report.refused(f"{reason}; ")


@examples(100)
@given(
    st.lists(
        st.sampled_from(
            [
                "<",
                "</",
                ">",
                "<!",
                "<![",
                "<!--",
                "-->",
                "]]>",
                "<p>",
                "<script>",
                "&#",
                "&#xD800;",
                "&#0;",
                "x",
                "'",
                "\ud7ff",
            ]
        )
    )
)
def test_any_html_has_a_text(report, parts):
    report.counts["tried"] += 1
    text, title = html_text("".join(parts))
    (text + (title or "")).encode()
    assert "\0" not in text
    report.accepted()
