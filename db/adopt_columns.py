"""The columns of the seed schema, and how columns that somebody made by hand turn into them."""

import re
from dataclasses import dataclass

from psycopg.sql import SQL, Composable, Identifier

from .errors import SchemaError


@dataclass(frozen=True, slots=True)
class Present:
    """A column as it is. `type` as PostgreSQL writes it, `vector(3)` for example."""

    name: str
    declared: str
    identity: bool
    must_be_given: bool

    @property
    def type(self) -> str:
        """The type without its length or precision."""
        return re.sub(r"\(\d+(,\d+)?\)", "", self.declared).rpartition(".")[2]

    @property
    def vector_dimensions(self) -> int | None:
        found = re.search(r"\bvector\((\d+)\)$", self.declared)
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Column:
    """A column as the store wants it. `fill` is what rows get that lack a value."""

    name: str
    type: str
    default: str | None = None
    required: bool = True
    fill: str | None = None
    optional: bool = False  # a later revision adds it where it is missing

    @property
    def lacking(self) -> str:
        if self.type == "jsonb":
            return f"{self.name} IS NULL OR jsonb_typeof({self.name}) = 'null'"
        return f"{self.name} IS NULL"

    def rules(self) -> list[Composable]:
        """Clauses of ALTER TABLE that give the column its default and NOT NULL."""
        name = Identifier(self.name)
        default = SQL(f"SET DEFAULT {self.default}" if self.default else "DROP DEFAULT")
        null = SQL("SET NOT NULL" if self.required else "DROP NOT NULL")
        return [SQL("ALTER {} {}").format(name, default), SQL("ALTER {} {}").format(name, null)]


EMBEDDINGS = (
    Column("id", "text"),
    Column("source_id", "text", default="'batch'", fill="'batch'"),
    Column("text", "text", fill="''"),
    Column("embedding", "vector", required=False),
    Column("metadata", "jsonb", default="'{}'::jsonb", fill="'{}'"),
    Column("created_at", "timestamptz", default="now()", fill="now()"),
    Column("updated_at", "timestamptz", default="now()", fill="created_at"),
    Column("model_id", "text", required=False),
    Column("workspace", "text", required=False, optional=True),
)
CHUNKS = (
    Column("id", "text"),
    Column("document_id", "text", required=False),
    Column("chunk_index", "integer", fill="0"),
    Column("text", "text", fill="''"),
    Column("embedding", "vector", required=False),
    Column("metadata", "jsonb", default="'{}'::jsonb", fill="'{}'"),
    Column("created_at", "timestamptz", default="now()", fill="now()"),
    Column("source_id", "text", default="'batch'", fill="'batch'", optional=True),
    Column("workspace", "text", required=False, optional=True),
)

# Columns of the user's under names that a later revision needs for something else.
IN_THE_WAY = {
    "embeddings": ("text_hash", "content_hash", "vector_hash", "chunks_hash"),
    "chunks": ("text_hash", "origin_id"),
}

_STRINGS = ("text", "character varying", "character", "json", "jsonb")
_ARRAYS = ("real[]", "double precision[]", "numeric[]", "integer[]", "halfvec", "sparsevec", "vector")

# How a column becomes one of the wanted type, by the type that it has.
_CONVERSIONS: dict[str, dict[str, str]] = {
    "vector": {
        **dict.fromkeys(_ARRAYS, "{}::vector"),
        **dict.fromkeys(_STRINGS, "{}::text::vector"),
    },
    "jsonb": {
        "json": "{}::jsonb",
        "hstore": "{}::jsonb",
        **dict.fromkeys(_STRINGS[:3], "nullif(btrim({}), '')::jsonb"),
    },
    "integer": dict.fromkeys(("smallint", "bigint", "numeric", *_STRINGS[:3]), "{}::integer"),
    "timestamptz": {
        "timestamp without time zone": "{} AT TIME ZONE 'UTC'",
        "timestamp with time zone": "{}::timestamptz",
        "date": "{}::timestamp AT TIME ZONE 'UTC'",
    },
}
_AS_DECLARED = {"timestamptz": "timestamp with time zone"}


def conversion(table: str, column: Column, actual: Present) -> Composable | None:
    """The expression that turns the column as it is into the wanted one; None where it is that already.

    Raises SchemaError where there is no sure way.
    """
    if actual.declared == _AS_DECLARED.get(column.type, column.type):
        return None
    if column.type == "text":
        return SQL("{}::text").format(Identifier(column.name))
    ways = _CONVERSIONS[column.type]
    if actual.type not in ways:
        raise SchemaError(
            f"{table}.{column.name} has the type {actual.declared}; expected {column.type} or one of "
            f"{', '.join(sorted(ways))}; change it first; nothing was changed"
        )
    return SQL(ways[actual.type]).format(Identifier(column.name))
