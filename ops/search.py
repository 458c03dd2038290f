"""`vectorkeep search`."""

import os
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

import db
from db.documents import check_text
from db.embedder import checked

from .command import Cli
from .opening import open_store, text_embedder
from .output import excerpt
from .strict_json import strict_json


class Level(StrEnum):
    DOCUMENTS = "documents"
    CHUNKS = "chunks"


def _where(given: str | None) -> dict[str, Any] | None:
    if given is None:
        return None
    try:
        parsed = strict_json(os.fsencode(given))
    except ValueError as exc:
        raise typer.BadParameter(f"not JSON to search by: {exc}", param_hint="--where") from exc
    if not isinstance(parsed, dict):
        raise typer.BadParameter('expected a JSON object such as {"lang": "en"}', param_hint="--where")
    return parsed


def search(
    cli: Cli,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The text to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 10,
    workspace: Annotated[str | None, typer.Option(show_default=False, help="Only this workspace.")] = None,
    source: Annotated[str | None, typer.Option(show_default=False, help="Only this source.")] = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="JSON", show_default=False, help='By metadata: {"lang": "en", "year": {"$gte": 2020}}'),
    ] = None,
    level: Annotated[Level, typer.Option(help="What to look for.")] = Level.DOCUMENTS,
    exact: Annotated[bool, typer.Option("--exact", help="Compare every row; slower.")] = False,
) -> None:
    """Find the documents or chunks nearest to a text.

    In a pipe each hit is a line: score, source, id, title, text; tab-separated.
    """
    filters = _where(where)
    with open_store(cli.options) as store:
        vector = query_vector(text_embedder(store), query)
        result = store.search(
            vector, k, workspace=workspace, source_id=source, where=filters, level=level.value, exact=exact
        )
    cli.output.document(result)
    cli.output.rows(HIT_COLUMNS, [hit_row(hit) for hit in result])
    if not result:
        cli.output.say("nothing found")
    elif not result.complete:
        cli.output.say(
            f"{len(result)} found, and others may be nearer: comparing all that pass the filter took longer than "
            "VECTORKEEP_STATEMENT_TIMEOUT_S; raise it, or index the metadata (docs/operations.md)"
        )


def query_vector(embedder: db.Embedder, query: str) -> NDArray[np.float32]:
    check_text(query, "the query")
    if not query.strip():
        raise db.ValidationError("the query is empty; expected a text to look for")
    vector: NDArray[np.float32] = checked(embedder, [query])[0]
    return vector


HIT_COLUMNS = ("score", "source", "id", "title", "text")


def hit_row(hit: db.Hit, length: int = 120) -> tuple[str, ...]:
    return (f"{hit.score:.3f}", hit.source_id, hit.id, title(hit), excerpt(hit.text, length))


def title(hit: db.Hit) -> str:
    return str(hit.metadata.get("title") or hit.document_id)
