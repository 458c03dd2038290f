"""Whose the data folder of a PostgreSQL server is: what its pid file and the process that this names tell."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

_NAMES = ("postgres", "postmaster")

# works here: a server runs on the folder. elsewhere: the process is a server of another folder. unknown: it may run
# here, nobody but its own user and root can see where it works. garbled: the file names no process. gone: none runs.
Occupant = Literal["works here", "elsewhere", "unknown", "garbled", "gone"]


def occupant_of(data: Path) -> Occupant:
    """Who works on the data folder `data`, by whomever it was started and however the folder was named to it.

    A server works in its data folder; without its pid file it shuts down.
    """
    try:
        # A single-user one notes its process with a minus.
        pid = abs(int((data / "postmaster.pid").read_text().split("\n", 1)[0]))
    except FileNotFoundError:
        return "gone"
    except (OSError, ValueError):
        return "garbled"  # one that starts has not filled it yet
    if not _is_alive(pid):
        return "gone"
    process = Path(f"/proc/{pid}")
    try:
        if not (process / "cmdline").read_bytes():
            return "gone"  # a zombie
        name = (process / "comm").read_text().strip()
    except OSError:
        return "unknown"
    with suppress(OSError):
        if (process / "cwd").samefile(data):
            return "works here"
        return "elsewhere" if name in _NAMES else "gone"
    return "unknown" if name in _NAMES else "gone"


def _is_alive(pid: int) -> bool:
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True
