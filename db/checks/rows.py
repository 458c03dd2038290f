"""What is stored: orphans, rows without vectors, vectors of other models. Nothing here is ever mended: it is data."""

from collections.abc import Iterator
from typing import Any

from psycopg import sql

from ..embedding_model import Model
from ..orphans import count_orphans
from .base import Examination, Found, Needs, check, fail, ok, warn

# Beyond this many rows a sample is looked at: a vector of many dimensions lies out of line and is slow to read.
_LOOK_AT_ROWS = 50_000

_ROWS = "SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = to_regclass(%s)"
_OTHER_DIMENSIONS = sql.SQL("""
    SELECT vector_dims(embedding), count(*), min(id) FROM {table} {sample}
    WHERE embedding IS NOT NULL AND vector_dims(embedding) <> %s GROUP BY 1 ORDER BY 2 DESC LIMIT 5
""")
_OTHER_MODELS = sql.SQL("""
    SELECT model_id, count(*), min(id) FROM embeddings {sample}
    WHERE embedding IS NOT NULL AND model_id IS DISTINCT FROM %s GROUP BY 1 ORDER BY 2 DESC LIMIT 5
""")


@check("orphans", Needs.SCHEMA, "no chunk without a document, no document without any vector", fine="no orphans")
def orphans(examination: Examination) -> Iterator[Found]:
    chunks, documents = (count_orphans(examination.connection, table) for table in ("chunks", "embeddings"))
    if chunks or documents:
        yield warn(
            f"{chunks} chunks without a document, {documents} documents without any vector",
            "vectorkeep cleanup --dry-run, then vectorkeep cleanup",
        )


@check(
    "missing vectors",
    Needs.SCHEMA,
    "every document, or a chunk of it, and every chunk has a vector",
    fine="nothing lacks a vector",
)
def missing_vectors(examination: Examination) -> Iterator[Found]:
    documents = count_orphans(examination.connection, "embeddings")
    chunks = examination.value("SELECT count(*) FROM chunks WHERE embedding IS NULL")
    if chunks or documents:
        yield warn(
            f"{documents} documents and {chunks} chunks have no vector to be found by",
            "ingest their sources again with an embedder",
        )


@check("one model", Needs.SCHEMA, "all vectors are of the registered model, in its dimensions")
def one_model(examination: Examination) -> Iterator[Found]:
    model = examination.model
    if model is None:
        vectors = examination.value("SELECT EXISTS (SELECT FROM embeddings WHERE embedding IS NOT NULL)")
        if vectors:
            yield fail(
                "vectors are stored, but no model is registered", "vectorkeep migrate --model NAME --dimensions D"
            )
        else:
            yield ok("no model is registered yet, and no vector stored")
        return
    wrong, unrecorded, sampled = _strangers(examination, model)
    if wrong:
        yield fail(
            f"the store's model is {model.model_id} of {model.dimensions} dimensions, but there are {'; '.join(wrong)}",
            "ingest their sources again; 'vectorkeep rebuild' moves a whole store to one model",
        )
    elif unrecorded:
        yield warn(
            f"{unrecorded} with no model on record: kept while their text changed, or older than the registry",
            "ingest their sources again with an embedder",
        )
    else:
        yield ok(f"{model.model_id}, {model.dimensions} dimensions, {model.distance}{sampled}")


def _strangers(examination: Examination, model: Model) -> tuple[list[str], str, str]:
    """Vectors of other dimensions or models, in words; those of no model; and how much of the tables was looked at."""
    found, unrecorded, sampled = [], "", ""
    for table in ("embeddings", "chunks"):
        rows = examination.value(_ROWS, table)
        sample: sql.Composable = sql.SQL("")
        if rows > _LOOK_AT_ROWS:
            sample = sql.SQL("TABLESAMPLE SYSTEM ({})").format(sql.Literal(100 * _LOOK_AT_ROWS / rows))
            sampled = f" (a sample of {_LOOK_AT_ROWS:,} rows of each large table)"
        statement = _OTHER_DIMENSIONS.format(table=sql.Identifier(table), sample=sample)
        for dimensions, count, example in _fetch(examination, statement, model.dimensions):
            found.append(f"{count} {table} of {dimensions} dimensions, {example!r} among them")
        if table == "embeddings":
            for name, count, example in _fetch(examination, _OTHER_MODELS.format(sample=sample), model.model_id):
                if name is None:
                    unrecorded = f"{count} {table}, {example!r} among them,"
                else:
                    found.append(f"{count} {table} of the model {name}, {example!r} among them")
    return found, unrecorded, sampled


def _fetch(examination: Examination, statement: sql.Composed, value: Any) -> list[tuple[Any, ...]]:
    return examination.connection.execute(statement, (value,)).fetchall()


CHECKS = (orphans, missing_vectors, one_model)
