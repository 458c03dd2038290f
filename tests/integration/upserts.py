"""Documents to upsert, and what became of them."""

from typing import Any

from db import UpsertResult


def doc(id_: str, text: str = "text", **parts: Any) -> dict[str, Any]:
    return {"id": id_, "text": text, **parts}


def counts(result: UpsertResult) -> dict[str, int]:
    """The counts that are not 0."""
    return {
        name: getattr(result, name)
        for name in ("inserted", "updated", "unchanged", "superseded", "failed")
        if getattr(result, name)
    }


def vector(*values: float) -> list[float]:
    """A vector of 8 dimensions that begins with `values`."""
    return [*values, *[0.0] * (8 - len(values))]
