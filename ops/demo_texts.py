"""Real prose that is on every machine with Python: its language reference, and what packages say of themselves."""

from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pydoc_data.topics import topics

import db

REFERENCE = "python-reference"
PACKAGES = "installed-packages"


def python_reference() -> list[db.Item]:
    """The topics of the language reference, one document each."""
    return [
        db.Item(f"{REFERENCE}/{name}", text, {"title": _first_line(text) or name}, REFERENCE)
        for name, text in sorted(topics.items())
    ]


def installed_packages() -> list[db.Item]:
    """The descriptions of the installed distributions, one document each."""
    return [
        db.Item(f"{PACKAGES}/{name}", text, {"title": name, "summary": summary}, PACKAGES)
        for name, (summary, text) in sorted(dict(_descriptions()).items())
    ]


def _descriptions() -> Iterator[tuple[str, tuple[str, str]]]:
    for distribution in distributions():
        name = _field(distribution, "Name").lower()
        text = _field(distribution, "Description")
        if name and text and text != "UNKNOWN":
            yield name, (_field(distribution, "Summary"), text)


def _field(distribution: Distribution, name: str) -> str:
    metadata = distribution.metadata
    return _clean(metadata[name]).strip() if name in metadata else ""


def _clean(text: str) -> str:
    """`text` as UTF-8 can hold it: the bytes of a package's metadata may be anything."""
    return text.encode(errors="replace").decode().replace("\0", "")


def _first_line(text: str) -> str:
    return text.lstrip().partition("\n")[0].strip()
