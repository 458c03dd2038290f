"""Faults on request: nothing happens at a point unless it was named."""

import os
import signal
import subprocess
import sys

import pytest

from db import faults


def run(fault, code):
    env = os.environ | {"VECTORKEEP_FAULT": fault}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_without_a_request_nothing_happens():
    faults.point("anything")


def test_a_point_that_is_named_fails_or_dies_and_others_go_on():
    code = "from db import faults; faults.point('one'); print('passed', flush=True); faults.point('two.part')"
    assert run("two.part:kill", code).returncode == -signal.SIGKILL
    raised = run("other:kill, two.part:raise", code)
    assert (raised.returncode, raised.stdout) == (1, "passed\n")
    assert raised.stderr.strip().endswith("InjectedFault: two.part")
    assert run("three:kill", code).returncode == 0


def test_a_point_may_be_passed_some_times_first():
    code = "from db import faults; [print(faults.point('one'), flush=True) for _ in range(5)]"
    killed = run("one:kill@3", code)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "None\n" * 2)


def test_a_process_that_stands_still_can_be_sent_on():
    code = "from db import faults; print('here', flush=True); faults.point('one'); print('there')"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"VECTORKEEP_FAULT": "one:stop"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=10)[0] == "there\n"
    finally:
        process.kill()


@pytest.mark.parametrize("text", ["", " ", ","])
def test_nothing_is_nothing(text):
    assert faults._parse(text) == {}
