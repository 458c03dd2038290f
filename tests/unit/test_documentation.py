"""The README and docs/ say what is so: every setting with its default, and no link that leads nowhere."""

import re
from enum import Enum
from pathlib import Path

import pytest
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from db.config import OpenAISettings, Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))


def table():
    """The README's settings and their defaults as it shows them, "" where there is none."""
    shown = {}
    rows = re.findall(r"^\| (`VECTORKEEP_\w+`(?:, `VECTORKEEP_\w+`)*) \| (.*?) ?\| .+ \|$", README, re.MULTILINE)
    for names, defaults in rows:
        names = re.findall(r"`(\w+)`", names)
        values = [value.strip("` ") for value in defaults.split(", ")] if defaults else [""] * len(names)
        assert len(values) == len(names), names
        shown |= dict(zip(names, values, strict=True))
    return shown


def settings():
    """Every setting by its variable, with its default as a person writes it."""
    found = {}
    for kind in (Settings, OpenAISettings):
        for name, field in kind.model_fields.items():
            if not name.startswith("postgres_"):  # in the row of the database's URL
                found[kind.model_config["env_prefix"] + name.upper()] = written(field.default)
    return found


def written(default):
    if default is None or default is PydanticUndefined or isinstance(default, SecretStr):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return str(default.value if isinstance(default, Enum) else default)


def test_every_setting_is_in_the_readme_with_its_default():
    assert table() == settings()


def test_the_postgres_variables_are_named():
    row = next(line for line in README.splitlines() if line.startswith("| `VECTORKEEP_DATABASE_URL`"))
    for name in Settings.model_fields:
        if name.startswith("postgres_"):
            assert name.removeprefix("postgres").upper() in row


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", document.read_text()):
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def anchors(text):
    """The anchors of a document's headings, as they are made of their words."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_document_is_reached_from_the_readme():
    linked = set(re.findall(r"\((docs/[\w-]+\.md)", README))
    assert {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")} <= linked
