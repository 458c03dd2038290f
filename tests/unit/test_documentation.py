"""The README and docs/ say what is so: every setting with its default, every call, and no link that leads nowhere."""

import dataclasses
import inspect
import re
from enum import Enum
from pathlib import Path

import pytest
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

import db
from db import documents, filters, models, recall, search, store, tally, values, vectors
from db.config import OpenAISettings, Settings
from ops import reading

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = dict(
    re.findall(r"^## (\w+)$(.*?)(?=^## |\Z)", (ROOT / "docs/python.md").read_text(), re.MULTILINE | re.DOTALL)
)
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


def test_every_setting_but_those_of_openai_is_taken_by_name():
    assert "takes each of these by name, but for those of OpenAI" in README
    for variable in table():
        name = variable.removeprefix("VECTORKEEP_").lower()
        assert (name in Settings.model_fields) != variable.startswith("VECTORKEEP_OPENAI_"), variable


def test_every_call_is_in_the_document_with_its_parameters():
    told = dict(re.findall(r"^\| `(\w+)\((.*?)\)` \|", PYTHON["Calls"], re.MULTILINE))
    assert set(told) == {name for name, value in vars(db.VectorStore).items() if name[0] != "_" and callable(value)}
    for name, parameters in told.items():
        actual = inspect.signature(getattr(db.VectorStore, name)).parameters
        for parameter, default in re.findall(r"(\w+)=(\w+|…)", parameters):
            assert default in ("…", str(actual[parameter].default)), f"{name}: {parameter}"


def test_what_calls_give_back_has_the_fields_that_the_document_names():
    told = re.findall(r"`([A-Z]\w+)`: `([a-z_ ]+)`", PYTHON["Calls"])
    assert len(told) > 6
    for name, fields in told:
        assert fields.split() == [field.name for field in dataclasses.fields(getattr(db, name)) if field.repr], name


def test_every_error_is_in_the_document():
    told = set(re.findall(r"`(\w+(?:Error|Incomplete))`", PYTHON["Errors"].replace("db.", "")))
    assert told == {name for name in db.__all__ if name.endswith(("Error", "Incomplete"))}


def test_the_limits_are_those_of_the_code():
    told = [int(number.replace(",", "")) for number in re.findall(r"\b\d[\d,]*\b", PYTHON["Limits"])]
    assert told == [
        documents.MAX_KEY_BYTES,
        values.MAX_JSON_DEPTH,
        vectors.MAX_DIMENSIONS,
        models.MAX_INDEXED_DIMENSIONS,
        store.MAX_BATCH,
        tally.MAX_BATCH_CHARACTERS,
        search.MAX_K,
        filters.MAX_DEPTH,
        filters.MAX_VALUES,
        recall.MAX_SAMPLE,
        reading.MAX_FILE_BYTES >> 20,
    ]
    assert reading.MAX_FILE_BYTES == reading.MAX_RECORD_BYTES


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
