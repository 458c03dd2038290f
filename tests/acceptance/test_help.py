import re

import pytest

from ops.exit_codes import ExitCode
from ops.main import _VERBS

from .conftest import ROOT, environment, run_command

VERBS = sorted(_VERBS)


def test_the_help_lists_every_command_and_every_exit_code():
    ran = run_command("--help", env=environment())
    assert ran.code == 0
    for verb in VERBS:
        assert re.search(rf"^  {verb} +\S", ran.out, re.MULTILINE), verb
    for code in ExitCode:
        assert re.search(rf"^ +{code.value}  {re.escape(code.meaning)}$", ran.out, re.MULTILINE), code


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help_and_the_common_options(verb):
    ran = run_command(verb, "--help", env=environment())
    assert ran.code == 0
    assert len(ran.out.splitlines()[2].strip()) > 15
    for option in ("--database-url", "--redis-url", "--json", "--quiet", "--verbose", "--debug"):
        assert option in ran.out
    options = re.split(r"^  (?=-)", ran.out.partition("Options:\n")[2], flags=re.MULTILINE)[1:]
    for option in options:
        assert re.search(r"\S(  +|\n {10,})[A-Z]", option), f"says nothing: {option}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_is_in_the_readmes_table(verb):
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"^\| `vectorkeep {verb}\b", readme, re.MULTILINE)


def test_the_readmes_table_names_no_other_command():
    named = re.findall(r"^\| `vectorkeep ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == VERBS


def test_the_version_is_told():
    ran = run_command("--version", env=environment())
    assert ran.code == 0
    assert ran.out.startswith("vectorkeep ")


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["stats", "--nothing"], ["search"], ["search", "x", "-k", "0"]])
def test_a_wrong_command_line_is_told_with_code_2(arguments):
    ran = run_command(*arguments, env=environment())
    assert ran.code == 2
