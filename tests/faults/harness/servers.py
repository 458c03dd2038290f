"""A PostgreSQL and a Valkey of the harness's own, to be killed and started again, each behind proxies."""

import os
import platform
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psycopg
import redis
from psycopg.conninfo import conninfo_to_dict

import db

from .proxy import Proxy

SETTINGS = {
    "max_connections": "40",
    "shared_buffers": "32MB",
    "maintenance_work_mem": "32MB",
    "max_wal_size": "256MB",
    "log_min_duration_statement": "-1",
}


class Servers:
    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="vk-faults-", ignore_cleanup_errors=True)
        Path(self._folder.name).chmod(0o711)  # as root the servers run as a user that has to pass through
        self._use = db.embedded.acquire(Path(self._folder.name) / "home", settings=SETTINGS)
        self.postgres, self.valkey = self._use._use.servers
        self.url = self._use.database_url  # direct
        db.migrate.upgrade(self.url)
        folder, port = (conninfo_to_dict(self.url)[key] for key in ("host", "port"))
        self.postgres_proxy = Proxy(f"{folder}/.s.PGSQL.{port}")
        self.redis_proxy = Proxy(self.valkey.socket_path)
        self.writers_redis_proxy = Proxy(self.valkey.socket_path)

    @property
    def proxied_url(self):
        return f"postgresql://postgres@127.0.0.1:{self.postgres_proxy.port}/vectorkeep"

    def redis_url(self, *, reads):
        proxy = self.redis_proxy if reads else self.writers_redis_proxy
        return f"redis://127.0.0.1:{proxy.port}/0"

    def connect(self, **options):
        return psycopg.connect(self.url, autocommit=True, application_name="fault harness", **options)

    def machine(self):
        with self.connect() as connection:
            version = connection.info.server_version
        python, cores = platform.python_version(), len(os.sched_getaffinity(0))
        return f"{cores} cores, Python {python}, PostgreSQL {version // 10_000}.{version % 10_000}"

    def redis(self):
        return redis.Redis(unix_socket_path=str(self.valkey.socket_path), socket_timeout=10)

    def backends(self, state=None):
        """The pids of the library's sessions."""
        wanted = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'vectorkeep%%' AND (state = %s OR %s)"
        with self.connect() as connection:
            return [pid for (pid,) in connection.execute(wanted, (state, state is None))]

    def signal_postgres(self, number):
        """Signal the main process; returns when the server is gone, its children may not be."""
        pid = self.postgres.pid()
        os.kill(pid, number)
        _wait_for(lambda: self.postgres.pid() is None)

    def wait_until_postgres_serves(self, timeout_s=60):
        _wait_for(self._serves, timeout_s)

    def _serves(self):
        with suppress(psycopg.Error), self.connect() as connection:
            connection.execute("SELECT 1")
            return True
        return False

    def limit_files(self, bytes_):
        """Let the server's processes, and those that come, write no file beyond this size."""
        pid = self.postgres.pid()
        if pid:
            self._limit_files_of(pid, bytes_)
            for process in _children(pid):  # those that come later have the limit from their parent
                self._limit_files_of(process, bytes_)

    def _limit_files_of(self, process, bytes_):
        command = ["prlimit", f"--pid={process}", f"--fsize={bytes_}:unlimited"]
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL, **self.postgres.account.popen_options())

    def kill_valkey(self):
        os.kill(self.valkey.pid(), signal.SIGKILL)
        _wait_for(lambda: self.valkey.pid() is None)

    def close(self):
        for proxy in (self.postgres_proxy, self.redis_proxy, self.writers_redis_proxy):
            proxy.close()
        self._use.release()
        self._folder.cleanup()


def _children(pid):
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                yield int(path.parent.name)


def _wait_for(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not do what it was to do")
        time.sleep(0.01)
