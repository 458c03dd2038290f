"""One server in the background: started once, attached to by everyone else, stopped for good.

A server inherits a locked file (flock) and so keeps it locked for as long as any of its processes lives. That
one fact answers "does it run?": pid files that outlived their process, reused pids and zombies do not matter,
and a PostgreSQL whose children are still at work is not started a second time on the same files.
"""

import fcntl
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, Ping

from .embedded_place import Account, Place, make_folder
from .embedded_process import occupant_of
from .errors import UnavailableError

logger = logging.getLogger(__name__)

DATABASE = "vectorkeep"
PORT = 5432  # only names the socket, but a PGPORT of the caller's environment must not
START_TIMEOUT_S = 120.0  # crash recovery of a large database takes its time
ORPHAN_GRACE_S = 1.0
LOG_BYTES_MAX = 10 * 1024 * 1024


_POSTGRES, _VALKEY = "postgres", "valkey"
# Of both servers, in the home folder: the current one and an older one each.
LOG_NAMES = tuple(f"{name}.log{older}" for name in (_POSTGRES, _VALKEY) for older in ("", ".1"))


@dataclass(frozen=True, slots=True)
class Server:
    """What both servers have in common. `stop_signals`: each signal with the seconds given to obey it."""

    name: str
    home: Path
    account: Account
    folder: Path  # the working folder of all its processes
    socket_path: Path
    command: list[str]
    stop_signals: tuple[tuple[signal.Signals, float], ...]

    @property
    def log_path(self) -> Path:
        return self.home / f"{self.name}.log"

    def ensure_running(self) -> bool:
        """Start the server, or attach to the one that runs. True where it was started.

        Raises UnavailableError with the last lines of the log.
        """
        lock = self._lock_or_attach()
        if lock is None:
            return False
        try:
            _rotate(self.log_path)
            self.prepare(lock)
            self.run_in_background(lock)
        finally:
            os.close(lock)
        self._wait_until_it_answers()
        logger.info("embedded.started", extra={"server": self.name, "folder": str(self.folder)})
        return True

    def stop(self) -> None:
        """Stop the server where it runs; wait until its last process is gone."""
        for stop_signal, patience_s in self.stop_signals:
            pid = self.pid()
            if pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, stop_signal)
            if wait_until(self._is_gone, patience_s):
                return
        logger.error("embedded.not_stopped", extra={"server": self.name, "folder": str(self.folder)})

    def prepare(self, lock: int) -> None:
        """Whatever must be true before the start. Children that touch the data are passed `lock`."""

    def answers(self) -> bool:
        """Whether the server serves clients now."""
        return self.pid() is not None

    def pid(self) -> int | None:
        """The process that listens on the socket, told by the kernel; None where none does.

        0 means one in a container that does not show us its processes.
        """
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(2)
            try:
                client.connect(str(self.socket_path))
            except OSError:
                return None
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid

    def run_in_background(self, lock: int) -> None:
        """Run `command` detached from this process and its terminal, its output in the log."""
        self.run(["/bin/sh", "-c", '"$@" &', "sh", *self.command], lock)

    def run(self, command: list[str], lock: int, *, given: str = "") -> None:
        """Run `command` as the servers' user to its end. Raises UnavailableError with the log's end."""
        options = self.account.popen_options()
        if given:
            del options["stdin"]
            options["input"] = given.encode()
        # a clean environment: PGDATA, PGPORT or PGOPTIONS of the caller are not meant for this server
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
        with self.log_path.open("ab") as log:
            done = subprocess.run(
                command, check=False, env=environment, stdout=log, stderr=log, pass_fds=(lock,),
                start_new_session=True, **options,
            )  # fmt: skip
        if done.returncode != 0:
            raise self._failure(f"{Path(command[0]).name} ended with status {done.returncode}")

    def _lock_or_attach(self) -> int | None:
        """The open lock file where nothing of the server is alive, None where it answers."""
        started = time.monotonic()
        while not self.answers():
            lock = self._try_lock()
            if lock is not None:
                return lock
            waited_s = time.monotonic() - started
            if waited_s > START_TIMEOUT_S:
                raise self._failure(f"it has been running for {waited_s:.0f} s without an answer")
            if waited_s > ORPHAN_GRACE_S and self.pid() is None:
                self._end_orphans(signal.SIGQUIT if waited_s < 10 * ORPHAN_GRACE_S else signal.SIGKILL)
            time.sleep(0.02)
        return None

    def _try_lock(self) -> int | None:
        lock = os.open(self.home / f"{self.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def _is_gone(self) -> bool:
        lock = self._try_lock()
        if lock is None:
            return False
        os.close(lock)
        return True

    def _end_orphans(self, with_signal: signal.Signals) -> None:
        """Signal what a killed main process left behind: busy children do not notice by themselves."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone meanwhile, or not ours to look at
                if (process / "cwd").samefile(self.folder) and process.stat().st_uid == self.account.uid:
                    os.kill(int(process.name), with_signal)

    def _wait_until_it_answers(self) -> None:
        if wait_until(lambda: self.answers() or self._is_gone(), START_TIMEOUT_S) and self.answers():
            return
        self._end_orphans(signal.SIGQUIT)
        raise self._failure("it did not start")

    def _failure(self, what: str) -> UnavailableError:
        lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        return UnavailableError(
            f"the embedded {self.name} cannot serve: {what}; the last lines of {self.log_path}:\n"
            + "\n".join(lines[-10:])
        )


@dataclass(frozen=True, slots=True)
class Postgres(Server):
    """PostgreSQL on a Unix socket only, its data checksummed, in UTF-8 with the builtin C.UTF-8 collation."""

    bin: Path

    def answers(self) -> bool:
        where = make_conninfo(host=str(self.socket_path.parent), port=PORT, connect_timeout=2)
        return PGconn.ping(where.encode()) == Ping.OK

    def prepare(self, lock: int) -> None:
        if not self.folder.exists():
            self._make_cluster(lock)
        # PostgreSQL takes any process that has the pid in these files for a running server, a zombie too.
        # Nothing of ours is alive: we hold the lock. One that somebody started by hand keeps its file.
        if occupant_of(self.folder) not in ("works here", "unknown"):
            (self.folder / "postmaster.pid").unlink(missing_ok=True)
            for name in (self.socket_path.name, f"{self.socket_path.name}.lock"):
                self.socket_path.with_name(name).unlink(missing_ok=True)

    def start_options(self) -> str:
        """The command line that the running server was started with, as it notes it itself."""
        return (self.folder / "postmaster.opts").read_text(errors="replace")

    def _make_cluster(self, lock: int) -> None:
        """Make the data folder with its database aside and rename it: it exists whole, or not at all."""
        partial = self.folder.with_name("postgres.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial, 0o700, self.account)
        self.run(
            [str(self.bin / "initdb"), "-D", str(partial), "-U", "postgres", "--encoding=UTF8",
             "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8",
             "--auth-local=trust", "--auth-host=reject", "--no-instructions"], lock,
        )  # fmt: skip
        self.run(
            [str(self.bin / "postgres"), "--single", "-j", "-D", str(partial), "postgres"],
            lock,
            given=f"CREATE DATABASE {DATABASE}\n",
        )
        partial.rename(self.folder)


@dataclass(frozen=True, slots=True)
class Valkey(Server):
    """Valkey as a cache: on a Unix socket only, nothing on disk, bounded memory, the least used goes first."""

    def prepare(self, lock: int) -> None:  # noqa: ARG002
        self.socket_path.unlink(missing_ok=True)


def postgres_server(place: Place, settings: Mapping[str, str]) -> Postgres:
    """The PostgreSQL of `place` with these settings (name to value)."""
    fixed = {
        "listen_addresses": "",
        "unix_socket_directories": str(place.sockets),
        "unix_socket_permissions": "0700",
        "port": str(PORT),
    }
    command = [str(place.postgres_bin / "postgres"), "-D", str(place.data)]
    for name, value in {**settings, **fixed}.items():
        command += ["-c", f"{name}={value}"]
    return Postgres(
        name=_POSTGRES,
        home=place.home,
        account=place.account,
        folder=place.data,
        socket_path=place.sockets / f".s.PGSQL.{PORT}",
        command=command,
        # fast shutdown, immediate shutdown (recovers at the next start), no shutdown
        stop_signals=((signal.SIGINT, 60), (signal.SIGQUIT, 10), (signal.SIGKILL, 10)),
        bin=place.postgres_bin,
    )


def valkey_server(place: Place, binary: Path) -> Valkey:
    """The Valkey of `place`."""
    path = place.sockets / "valkey.sock"
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(place.sockets),
        "save": "",
        "appendonly": "no",
        "maxmemory": "128mb",
        "maxmemory-policy": "allkeys-lru",
        "daemonize": "no",
    }
    return Valkey(
        name=_VALKEY,
        home=place.home,
        account=place.account,
        folder=place.sockets,
        socket_path=path,
        command=[str(binary), *(word for name, value in options.items() for word in (f"--{name}", value))],
        stop_signals=((signal.SIGTERM, 5), (signal.SIGKILL, 5)),
    )


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Ask `condition` every 10 ms until it is True or the time is over; its last answer."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _rotate(log: Path) -> None:
    """Keep one older log beside the current one."""
    if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
        log.replace(log.with_suffix(".log.1"))
