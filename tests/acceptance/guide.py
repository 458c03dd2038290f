"""docs/troubleshooting.md, taken apart: symptoms, the commands below each, what to see, and what to do then."""

import re
from dataclasses import dataclass

from .conftest import ROOT

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()

_COMMAND = r"(?:[A-Z_]+=\S+ )*(?:vectorkeep|psql) [^`\n]+"
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\| `([^`]+)` \| (.+) \| (.+) \|$", re.MULTILINE)
_INLINE = re.compile(f"`({_COMMAND})`")


@dataclass(frozen=True)
class Row:
    """A line of a symptom's table. seen: what to look for; remedies: the commands that mend it."""

    seen: str
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """A symptom. commands: what to run; prose: commands that the text names beside those."""

    symptom: str
    commands: tuple[str, ...]
    prose: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def named(self) -> set[str]:
        return {*self.commands, *self.prose, *(remedy for row in self.rows for remedy in row.remedies)}


def entries() -> list[Entry]:
    return [_entry(section) for section in TEXT.split("\n## ")[1:]]


def _entry(section: str) -> Entry:
    block = _BLOCK.search(section)
    prose = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
    return Entry(
        symptom=section.partition("\n")[0],
        commands=tuple(block[1].splitlines()) if block else (),
        prose=tuple(_INLINE.findall(prose)),
        rows=tuple(Row(seen, tuple(_INLINE.findall(do))) for seen, _, do in _ROW.findall(section)),
    )


def all_commands() -> set[str]:
    """Every command anywhere in the text, but for what is to be seen and not to be run."""
    text = re.sub(r"^\| `[^`]+` \|", "|", TEXT, flags=re.MULTILINE)
    return set(re.findall(rf"(?:^|`)({_COMMAND})(?=`|$)", text, re.MULTILINE))
