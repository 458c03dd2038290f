"""Files and folders read into items. What cannot be read is noted, and stops nothing else."""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import db
from db.values import shown

from .html_text import html_text
from .strict_json import LossyJsonError, strict_json

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".html", ".htm"})
RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson"})
MAX_FILE_BYTES = 64 * 2**20
MAX_RECORD_BYTES = 64 * 2**20
_SKIPPED_AT_ONCE = 2**20

# Never a link, and never a wait for the other end of a pipe.
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class UnreadableError(Exception):
    """A file or a record is not one to read. The message says why, `id` of which document it is, if that is known."""

    def __init__(self, reason: str, id_: Any = None) -> None:
        super().__init__(reason)
        self.id = id_ if isinstance(id_, str) else None


@dataclass(frozen=True, slots=True)
class Found:
    """A file to read: the folder it belongs to, its path in there, and an open folder to open it from."""

    folder: Path
    path: PurePosixPath
    opened_folder: int | None

    @property
    def shown(self) -> str:
        return displayable(self.folder / self.path)

    def open(self) -> int:
        if self.opened_folder is None:
            return os.open(self.folder / self.path, _OPEN_FLAGS)
        return os.open(self.path.name, _OPEN_FLAGS, dir_fd=self.opened_folder)


@dataclass
class Reader:
    """Reads what the command was given.

    A file's id is its source and its path in the folder; without a `source` that is its absolute path. `failed`
    holds (file, reason) of what could not be read, `unread` the ids of it; `unsure` says that some of it has an id
    that nobody knows. `passed_over` counts links, special files and the `record_files`: JSONL in folders, which is
    read only where it is named. `empty` counts files without any text.
    """

    source: str | None = None
    workspace: str | None = None
    read: int = 0
    empty: int = 0
    passed_over: int = 0
    record_files: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    unsure: bool = False
    _given: dict[str, bytes] = field(default_factory=dict)

    def fail(self, name: str, exc: Exception, id_: str | None) -> None:
        """Note what could not be read: `name` for a person, and the id of the document that it is, if known."""
        self.failed.append((name, getattr(exc, "strerror", None) or str(exc)))
        if id_ is None:
            self.unsure = True
        else:
            self.unread.add(id_)

    def may_hold(self, id_: str) -> bool:
        """Whether a document may be in what could not be read."""
        return self.unsure or id_ in self.unread

    # -- texts -----------------------------------------------------------------------------------------

    def count(self, paths: Iterable[Path]) -> int:
        """How many files `texts` will look at, for a progress bar."""
        return sum(1 for _ in Reader().find(paths))

    def texts(self, paths: Iterable[Path]) -> Iterator[db.Item]:
        """One item for each readable file of `paths`, files and folders."""
        for found in self.find(paths):
            source = self.source or displayable(found.folder)
            id_ = str(PurePosixPath(source, displayable(found.path)))
            try:
                item = self._item(found, id_, source)
            except (UnreadableError, OSError) as exc:
                self.fail(found.shown, exc, id_)
            else:
                if item is not None:
                    yield item

    def find(self, paths: Iterable[Path]) -> Iterator[Found]:
        for given in paths:
            try:
                path = given.resolve()  # a link that was typed is meant
                is_folder = stat.S_ISDIR(path.stat().st_mode)
            except (OSError, RuntimeError) as exc:  # what it was is not known: a folder's documents may be all
                self.fail(displayable(given), exc, None)
                continue
            if is_folder:
                yield from self._walk(path)
            elif path.suffix.lower() in TEXT_SUFFIXES:
                yield Found(path.parent, PurePosixPath(path.name), None)
            else:
                self.failed.append((displayable(given), f"unknown kind {path.suffix!r}; expected {_expected()}"))

    def _walk(self, folder: Path) -> Iterator[Found]:
        """Text files below `folder`. Hidden ones are left out, and no link is followed."""
        try:
            for top, folders, files, opened in os.fwalk(folder, onerror=self._unreadable_folder):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                yield from self._files(folder, top, files, opened)
        except OSError as exc:  # of the folder itself; those below it are told by the walk
            self._unreadable_folder(exc)

    def _files(self, folder: Path, top: str, names: Iterable[str], opened: int) -> Iterator[Found]:
        """The text files of those `names` in the folder `top`, which is open."""
        for name in sorted(names):
            path = PurePosixPath(top, name)
            suffix = path.suffix.lower()
            if name.startswith(".") or suffix not in TEXT_SUFFIXES | RECORD_SUFFIXES:
                continue
            regular = _is_regular(name, opened)
            if regular and suffix in TEXT_SUFFIXES:
                yield Found(folder, path.relative_to(folder), opened)
                continue
            self.passed_over += 1
            if regular:
                self.record_files.append(displayable(path))

    def _unreadable_folder(self, exc: OSError) -> None:
        self.fail(displayable(exc.filename or "folder"), exc, None)

    def _item(self, found: Found, id_: str, source: str) -> db.Item | None:
        # Two names may look alike: the bytes that are not UTF-8 of one may be spelt out in the other.
        name = os.fsencode(found.folder / found.path)
        earlier = self._given.setdefault(id_, name)
        if earlier != name:
            other = displayable(os.fsdecode(earlier))
            raise UnreadableError(f"has the same id {id_!r} as {other}; ingest it with another --source, or rename it")
        text, title = _text_and_title(found)
        if not text.strip():
            self.empty += 1
            return None
        self.read += 1
        metadata: dict[str, Any] = {"path": displayable(found.path), "title": title}
        if self.workspace is not None:
            metadata["workspace"] = self.workspace
        return db.Item(id_, text, metadata, source)

    # -- records ---------------------------------------------------------------------------------------

    def records(self, lines: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
        """The records of JSONL `lines`, the source and workspace of the command filled in where they lack one."""
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = self._record(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except UnreadableError as exc:
                self.fail(f"{name}:{number}", exc, exc.id)
            else:
                self.read += 1
                yield record

    def _record(self, line: bytes) -> dict[str, Any]:
        if len(line) > MAX_RECORD_BYTES and len(line.rstrip(b"\r\n")) > MAX_RECORD_BYTES:
            raise UnreadableError(f"a line larger than {MAX_RECORD_BYTES // 2**20} MiB; cut the document into parts")
        try:
            record = strict_json(line)
        except LossyJsonError as exc:
            raise UnreadableError(str(exc)) from exc
        except ValueError as exc:
            raise UnreadableError(f"not JSON: {exc}{_why_not(line)}") from exc
        if not isinstance(record, dict):
            raise UnreadableError(f"a {type(record).__name__}; expected an object with id and text")
        for key in ("id", "text"):
            if not isinstance(record.get(key), str):
                raise UnreadableError(f"{key} is {shown(record.get(key))}; expected a string", record.get("id"))
        if record.get("embedding", ...) is None:
            del record["embedding"]  # null: it has none
        if self.source is not None:
            record.setdefault("source_id", self.source)
        if self.workspace is not None:
            metadata = record.setdefault("metadata", {})
            if isinstance(metadata, dict):
                metadata.setdefault("workspace", self.workspace)
        return record


def open_records(path: Path) -> IO[bytes]:
    """The lines of a JSONL file. Raises UnreadableError, OSError."""
    descriptor = os.open(path.resolve(), _OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableError("not a regular file; for a pipe give '-'")
    return open(descriptor, "rb")  # noqa: PTH123  (a descriptor, not a path)


def bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of `file`. Of one that is too large only the beginning, for `Reader.records` to refuse it."""
    while line := file.readline(MAX_RECORD_BYTES + 2):
        yield line
        unfinished = len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n")
        while unfinished and (part := file.readline(_SKIPPED_AT_ONCE)):
            unfinished = not part.endswith(b"\n")


def _why_not(line: bytes) -> str:
    if b"\r" in line.strip():
        return "; its lines end with CR alone, convert it, for example with tr '\\r' '\\n'"
    return ""


def displayable(path: str | os.PathLike[str]) -> str:
    """`path` in characters that UTF-8 can hold; file names may be any bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _is_regular(name: str, folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return True  # opening it will tell why


def _text_and_title(found: Found) -> tuple[str, str]:
    text = _read_text(found)
    suffix = found.path.suffix.lower()
    title: str | None = None
    if suffix in (".html", ".htm"):
        text, title = html_text(text)
    elif suffix in (".md", ".rst"):
        title = _heading(text)
    return text, title or displayable(found.path.name)


def _read_text(found: Found) -> str:
    with open(found.open(), "rb") as file:  # noqa: PTH123  (a descriptor, not a path)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UnreadableError("not a regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise UnreadableError(f"larger than {MAX_FILE_BYTES // 2**20} MiB; cut it into parts")
    if b"\0" in content:
        raise UnreadableError("binary; expected text in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise UnreadableError(f"not UTF-8 at byte {exc.start}; convert it, for example with iconv") from exc


def _heading(text: str) -> str | None:
    """The first line with letters, where Markdown and reStructuredText have the title."""
    for line in text[:4000].splitlines():
        title = line.strip().lstrip("#").strip()
        if any(c.isalnum() for c in title) and not line.startswith(("..", "<!--", "---", "[")):
            return title[:200]
    return None


def _expected() -> str:
    return ", ".join(sorted(TEXT_SUFFIXES | RECORD_SUFFIXES))
