"""Which file system a folder is on: the embedded servers need a local one."""

import re
from pathlib import Path

from .errors import ValidationError

_NETWORK = (
    "afs beegfs ceph cifs coda davfs glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 pvfs2 rclone s3fs smb2 smb3 smbfs sshfs"
)
NETWORK_FILE_SYSTEMS = frozenset(_NETWORK.split())


def mount_table() -> str:
    """The text of /proc/self/mountinfo, empty where the kernel has none."""
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return ""


def refuse_network_file_system(folder: Path, mountinfo: str) -> None:
    """Raise ValidationError where `folder` (absolute, resolved) is on a file system of another machine.

    PostgreSQL's durability and the locks of the embedded servers both rest on the local kernel.
    """
    kind = file_system_type(folder, mountinfo)
    if kind.removeprefix("fuse.") in NETWORK_FILE_SYSTEMS:
        raise ValidationError(
            f"{folder} is on a network file system ({kind}), the embedded servers need a local disk; "
            "set VECTORKEEP_HOME to a folder on one, or VECTORKEEP_DATABASE_URL to a server of your own"
        )


def file_system_type(folder: Path, mountinfo: str) -> str:
    """The type of the file system that holds `folder` (absolute, resolved), "" where unknown.

    In proc_pid_mountinfo(5) the mount point is field 5, with octal escapes, and the type follows the " - ".
    The longest mount point wins; of equal ones the later, which hides the other.
    """
    best, kind = -1, ""
    for line in mountinfo.split("\n"):
        before, separator, after = line.partition(" - ")
        if not separator:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split(" ")[4]))
        if folder.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split(" ")[0]
    return kind
