"""The command without its start-up time: a process that has imported it, and forks for each time it is run.

`python -m tests.acceptance.fork_server SOCKET` serves; `python -IS fork_server.py SOCKET ARGUMENT...` is one
run of the command: it hands over its streams, folder and environment, and ends as the command ends.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time

_ROOM = 200_000  # bytes of a request; a whole environment is in it


def serve(path: str) -> None:
    from pathlib import Path  # not at the top: each client would wait for it

    # The first are what a command imports when it embeds, migrates or compares the schema.
    for module in ("wordllama", "alembic.command", "alembic.autogenerate", "ops.__main__"):
        importlib.import_module(module)
    gc.freeze()  # what is collected as garbage is copied in every child first
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM)
        listener.bind(f"{path}.new")
        listener.listen(16)
        Path(f"{path}.new").rename(path)  # clients wait for it
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the supervisors are nobody's to wait for
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _supervise(connection)
                os._exit(0)
            connection.close()


def _supervise(connection: socket.socket) -> None:
    """Fork the command, and tell the client how it ended."""
    message, streams, _, _ = socket.recv_fds(connection, _ROOM, 3)
    request = json.loads(message)
    command = os.fork()
    if command == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _run(request)
    _, status = os.waitpid(command, 0)
    # The client has gone where the test did not want to wait any longer.
    with contextlib.suppress(BrokenPipeError):
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _run(request: dict) -> None:
    # Opened again: Python keeps in mind whether a stream can seek and is a terminal, and these are others now.
    sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    importlib.reload(sys.modules["db.faults"])  # it reads the environment when it is imported
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["vectorkeep", *request["arguments"]]
    from ops.__main__ import main

    try:
        main()
    except SystemExit as ended:
        _exit(ended.code)


def _exit(code: object) -> None:
    """End as the interpreter would, but for taking its modules apart, which takes a tenth of a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def run(path: str, arguments: list[str]) -> int:
    request = {"arguments": arguments, "folder": os.path.realpath("."), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        server.connect(path)
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        code = int(server.recv(16))
    if code < 0:
        signal.raise_signal(-code)
    return code


if __name__ == "__main__":
    if len(sys.argv) == 2 and not sys.flags.isolated:
        serve(sys.argv[1])
    else:
        sys.exit(run(sys.argv[1], sys.argv[2:]))
