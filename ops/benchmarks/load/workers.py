"""The processes of a run under load, as the one that started them sees them: begun, looked at, ended for certain."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import db

from ..memory import python_path
from .plan import LoadPlan

_READY_WITHIN_S = 120.0
# After its time each ends the call it is in: one that waits for a connection, and then for a statement.
_ENDS_WITHIN_S = 90.0
_STOPS_WITHIN_S = 10.0
_TOLD_CHARACTERS = 500


Resources = tuple[float, int]  # resident memory in MB, open files


class WorkerProcess:
    """One process that works; at the end of the block that `started` it, it is gone."""

    def __init__(self, process: "subprocess.Popen[bytes]", errors: IO[bytes], number: int) -> None:
        self._process = process
        self._errors = errors
        self.number = number

    def await_ready(self) -> None:
        """Return once its store is open. Raises UnavailableError with what it said where it ends before."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], _READY_WITHIN_S)
        if not readable or self._process.stdout.readline().strip() != b"ready":
            raise db.UnavailableError(f"a process of the load did not begin: {self._last_words()}")

    def go(self) -> None:
        self.send("go")

    def result(self, deadline: float) -> dict[str, Any] | None:
        """What came of its work; None where it died, or has not ended at `deadline`."""
        assert self._process.stdout is not None
        told = b""
        while (left_s := deadline - time.monotonic()) > 0:
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                break
            fragment = os.read(self._process.stdout.fileno(), 65_536)
            if not fragment:
                return _parsed(told)
            told += fragment
        return None

    def why_it_died(self) -> str:
        code = self._process.poll()
        return (
            f"process {self.number} {'is still at work' if code is None else f'ended ({code})'}: {self._last_words()}"
        )

    def resources(self) -> Resources | None:
        """What it holds now; None where it has ended."""
        folder = Path(f"/proc/{self._process.pid}")
        try:
            lines = (folder / "status").read_text().splitlines()
            files = sum(1 for _ in (folder / "fd").iterdir())
        except OSError:
            return None
        fields = dict(line.split(":", 1) for line in lines)
        if "VmRSS" not in fields:  # it has ended, and nobody has asked how
            return None
        return int(fields["VmRSS"].split()[0]) / 1024, files

    def ask_to_end(self) -> None:
        """Close its input, on which it ends in order."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def await_end(self) -> None:
        """Return once it is gone: killed, where it does not end by itself."""
        assert self._process.stdout is not None
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOPS_WITHIN_S)
        finally:  # a second Ctrl-C, too
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise db.UnavailableError(f"a process of the load ended before its time: {self._last_words()}") from None

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:_TOLD_CHARACTERS] if lines else "it said nothing"


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line:
        return None
    value: dict[str, Any] = json.loads(line)
    return value


@contextmanager
def started(url: str, plan: LoadPlan) -> Iterator[list[WorkerProcess]]:
    """The plan's processes, their stores open. At the end of the block none is left.

    Raises UnavailableError where one cannot begin.
    """
    workers: list[WorkerProcess] = []
    with ExitStack() as stack:
        try:
            for number in range(plan.processes):
                workers.append(_start(stack.enter_context(tempfile.TemporaryFile()), number))
                request = {"url": url, "plan": asdict(plan), "number": number}
                workers[-1].send(json.dumps(request))
            for worker in workers:
                worker.await_ready()
            yield workers
        finally:
            for worker in workers:
                worker.ask_to_end()
            for worker in workers:
                stack.callback(worker.await_end)


def _start(errors: IO[bytes], number: int) -> WorkerProcess:
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": python_path()},
        start_new_session=True,  # Ctrl-C reaches the process that started it alone, which ends it in order
    )
    return WorkerProcess(process, errors, number)


def collect(workers: list[WorkerProcess]) -> tuple[list[dict[str, Any]], list[str]]:
    """What came of the work of each that lived to tell it, and why the others did not."""
    deadline = time.monotonic() + _ENDS_WITHIN_S
    results, deaths = [], []
    for worker in workers:
        result = worker.result(deadline)
        if result is None:
            deaths.append(worker.why_it_died())
        else:
            results.append(result)
    return results, deaths
