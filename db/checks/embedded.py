"""The embedded servers' folder: on a local disk with room, and without what a killed server leaves behind."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from ..embedded_disk import NETWORK_FILE_SYSTEMS, file_system_type, mount_table
from ..errors import BusyError
from .base import Examination, Found, Needs, check, fail, megabytes, ok, warn

_NOT_USED = "a database is named: the embedded one is not used"


@check(
    "embedded files",
    Needs.NOTHING,
    "no pid file, socket or half-made database of an embedded server that is gone",
    fix="removes them",
)
def embedded_files(examination: Examination) -> Iterator[Found]:
    home = _home(examination)
    if home is None:
        yield ok(_NOT_USED)
        return
    for server, left in leftovers(home).items():
        names = ", ".join(map(str, left))

        def mend(server: str = server) -> str:
            return _remove(home, server)

        if left:
            yield warn(
                f"no embedded {server} runs, but it left {names}",
                "vectorkeep doctor --fix; the next start removes them, too",
                subject=server,
                mend=mend,
            )
    data = _data(home)
    with _not_running(home, "postgres") as stopped:
        in_doubt = stopped and _by_hand(data) == "may run"
    if in_doubt:
        yield warn(
            f"{data / 'postmaster.pid'} may be of a server that runs: it names a PostgreSQL process, or cannot be told",
            f"if ps shows no server that works on {data}, remove that file",
            subject="postmaster.pid",
        )
    elif not any(leftovers(home).values()):
        yield ok(f"nothing stale in {home}")


@check("embedded disk", Needs.NOTHING, "the embedded database is on a local disk with room left")
def embedded_disk(examination: Examination) -> Iterator[Found]:
    home = _home(examination)
    if home is None:
        yield ok(_NOT_USED)
        return
    folder = next(path for path in ((home / "servers").resolve(), *home.resolve().parents) if path.exists())
    usage = shutil.disk_usage(folder)
    limits = examination.limits
    yield judge_file_system(folder, file_system_type(folder, mount_table()))
    yield judge_room(folder, usage.free, usage.total, limits.disk_free_bytes, limits.disk_free_share)


def judge_file_system(folder: Path, kind: str) -> Found:
    """What a file system of this type means for a database on it."""
    if kind.removeprefix("fuse.") in NETWORK_FILE_SYSTEMS:
        return fail(
            f"{folder} is on a network file system ({kind}): locks and durability do not hold there",
            "set VECTORKEEP_HOME to a folder on a local disk, or name a server in VECTORKEEP_DATABASE_URL",
        )
    return ok(f"{folder} is on a local file system ({kind or 'unknown'})")


def judge_room(folder: Path, free: int, total: int, least_bytes: int, least_share: float) -> Found:
    """What so many bytes free of so many mean: PostgreSQL stops when a disk is full."""
    evidence = f"{megabytes(free)} of {megabytes(total)} free in {folder}"
    remedy = "make room on that disk, or move VECTORKEEP_HOME to a larger one"
    if free < least_bytes / 4:
        return fail(evidence, remedy)
    if free < least_bytes or free < least_share * total:
        return warn(evidence, remedy)
    return ok(evidence)


def _home(examination: Examination) -> Path | None:
    if examination.settings.postgres_url() is not None:
        return None
    return examination.settings.home.expanduser().absolute()


def leftovers(home: Path) -> dict[str, list[Path]]:
    """Files in the folders of `home` of servers that do not run, by server."""
    left: dict[str, list[Path]] = {"postgres": [], "valkey": []}
    for server, found in left.items():
        with _not_running(home, server) as stopped:
            if stopped:
                found += _files(home, server)
    return left


def _files(home: Path, server: str) -> list[Path]:
    data, sockets = _data(home), home / "servers" / "run"
    if server == "valkey":
        candidates = [sockets / "valkey.sock"]
    elif _by_hand(data) != "gone":
        candidates = []
    else:
        candidates = [data / "postmaster.pid", *sorted(sockets.glob(".s.PGSQL.*")), data.with_name("postgres.partial")]
    return [path for path in candidates if os.path.lexists(path)]


def _data(home: Path) -> Path:
    return home / "servers" / "postgres"


def _by_hand(data: Path) -> Literal["runs", "may run", "gone"]:
    """Whether somebody started a server on `data` without us: its files are no leftovers.

    A server works in its data folder, however that was named to it. In doubt it may run: without its pid file a
    server shuts down.
    """
    try:
        # A single-user one notes its process with a minus.
        pid = abs(int((data / "postmaster.pid").read_text().split("\n", 1)[0]))
    except FileNotFoundError:
        return "gone"
    except (OSError, ValueError):
        return "may run"  # one that starts has not filled it yet
    if not _is_alive(pid):
        return "gone"
    process = Path(f"/proc/{pid}")
    try:
        if not (process / "cmdline").read_bytes():
            return "gone"  # a zombie
        name = (process / "comm").read_text().strip()
    except OSError:
        return "may run"
    with suppress(OSError):  # only its own user and root may see where it works
        if (process / "cwd").samefile(data):
            return "runs"
    return "may run" if name in ("postgres", "postmaster") else "gone"


def _is_alive(pid: int) -> bool:
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True


def _remove(home: Path, server: str) -> str:
    with _not_running(home, server) as stopped:
        files = _files(home, server) if stopped else []
        if not files:
            raise BusyError(f"{server} was started meanwhile, or somebody else removed its files")
        for path in files:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return f"removed {', '.join(path.name for path in files)}"


@contextmanager
def _not_running(home: Path, server: str) -> Iterator[bool]:
    """Whether nothing of `server` is alive: it would hold its lock file. Held meanwhile, so that none starts."""
    try:
        lock = os.open(home / f"{server}.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # it was never started
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)


CHECKS = (embedded_disk, embedded_files)
