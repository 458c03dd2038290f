"""The embedded servers' folder: on a local disk with room, and without what a killed server leaves behind."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..embedded_disk import NETWORK_FILE_SYSTEMS, file_system_type, mount_table
from ..embedded_process import occupant_of
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
        in_doubt = stopped and occupant_of(data) in ("elsewhere", "unknown", "garbled")
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
    return examination.settings.home.absolute()


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
    elif occupant_of(data) != "gone":  # in doubt they are no leftovers
        candidates = []
    else:
        candidates = [data / "postmaster.pid", *sorted(sockets.glob(".s.PGSQL.*")), data.with_name("postgres.partial")]
    return [path for path in candidates if os.path.lexists(path)]


def _data(home: Path) -> Path:
    return home / "servers" / "postgres"


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
