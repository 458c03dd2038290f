"""The transaction in which tables made by hand take the shape of the first revision."""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import psycopg
from psycopg import Connection, sql
from psycopg.sql import SQL, Composable, Identifier

from .adopt_columns import CHUNKS, EMBEDDINGS, IN_THE_WAY, Column, Present, conversion
from .config import Distance
from .errors import SchemaError, ValidationError
from .locks import limit_lock_waits
from .migrate import alembic_config
from .models import MAX_INDEXED_DIMENSIONS

SEED = "0001"
SUFFIX = "_before_adoption"

_TABLES_OF_LATER_REVISIONS = (
    "embedding_models", "vector_cache", "index_builds", "maintenance_runs", "write_log", "write_log_watermark",
)  # fmt: skip

_COLUMNS = """
    SELECT attname, format_type(atttypid, atttypmod), attidentity <> '',
        attnotnull AND NOT atthasdef AND attidentity = ''
    FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""
_PRIMARY_KEY = """
    SELECT conname, ARRAY(
        SELECT attname FROM unnest(conkey) AS key (number)
        JOIN pg_attribute ON attrelid = conrelid AND attnum = key.number)
    FROM pg_constraint WHERE conrelid = %s::regclass AND contype = 'p'
"""
_FOREIGN_KEYS = """
    SELECT conrelid::regclass::text, conname, confrelid::regclass::text, ARRAY(
        SELECT attname FROM unnest(conkey) AS key (number)
        JOIN pg_attribute ON attrelid = conrelid AND attnum = key.number)
    FROM pg_constraint
    WHERE contype = 'f' AND conparentid = 0
      AND (confrelid = ANY (%(tables)s::regclass[]) OR conrelid = ANY (%(tables)s::regclass[]))
"""
_POSITION_KEYS = """
    SELECT conname FROM pg_constraint
    WHERE conrelid = 'chunks'::regclass AND contype = 'u' AND ARRAY(
        SELECT attname::text FROM unnest(conkey) AS key (number)
        JOIN pg_attribute ON attrelid = conrelid AND attnum = key.number ORDER BY 1
    ) = ARRAY['chunk_index', 'document_id']
"""
_INDEXES_ON_VECTORS = """
    SELECT DISTINCT indexrelid::regclass::text, indexrelid::regclass::oid
    FROM pg_index
    JOIN pg_depend ON classid = 'pg_class'::regclass AND objid = indexrelid
        AND refclassid = 'pg_class'::regclass AND refobjid = indrelid
    JOIN pg_attribute ON attrelid = indrelid AND attnum = refobjsubid
    WHERE indrelid = %s::regclass AND attname = 'embedding'
"""
_INDEX_NAMES = "SELECT relname FROM pg_index JOIN pg_class ON oid = indexrelid WHERE indrelid = %s::regclass"
# Where a position is missing; the second revision numbers what shares one. Of ids that count, "c10" comes
# after "c9".
_NUMBER_CHUNKS = """
    UPDATE chunks SET chunk_index = numbered.position
    FROM (
        SELECT id, row_number() OVER (
            PARTITION BY document_id ORDER BY chunk_index NULLS LAST, created_at, length(id), id
        ) - 1 AS position
        FROM chunks
        WHERE document_id IN (
            SELECT document_id FROM chunks GROUP BY document_id HAVING count(chunk_index) < count(*)
        )
    ) AS numbered
    WHERE chunks.id = numbered.id AND chunks.chunk_index IS DISTINCT FROM numbered.position
"""
_WRAP_METADATA = """
    UPDATE {} SET metadata = jsonb_build_object('value', metadata)
    WHERE jsonb_typeof(metadata) NOT IN ('object', 'null')
"""
_COUNT_BY_DIMENSIONS = """
    SELECT vector_dims(embedding), count(*) FROM (
        SELECT embedding FROM embeddings WHERE embedding IS NOT NULL
        UNION ALL
        SELECT embedding FROM chunks WHERE embedding IS NOT NULL
    ) AS vectors
    GROUP BY 1 ORDER BY 1
"""
_STAMP = """
    CREATE TABLE alembic_version (
        version_num varchar(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))
"""


@dataclass(slots=True)
class Adoption:
    """One adoption, within one transaction."""

    connection: Connection[Any]
    model_id: str
    given_dimensions: int | None
    distance: Distance
    details: list[str] = field(default_factory=list)
    documents: int = 0
    chunks: int = 0
    dimensions: int = 0

    def run(self, *, lock_timeout_s: float) -> None:
        limit_lock_waits(self.connection, lock_timeout_s)
        self.check_can_be_adopted()
        self.execute("CREATE EXTENSION IF NOT EXISTS vector")
        seed = _seed_revision()
        self.make_missing_tables(seed)
        self.execute("LOCK TABLE embeddings, chunks IN ACCESS EXCLUSIVE MODE")
        typed_dimensions = self.typed_dimensions()
        self.drop_what_depends(seed)
        self.reshape("embeddings", EMBEDDINGS)
        self.reshape("chunks", CHUNKS)
        for table in ("embeddings", "chunks"):
            self.ensure_primary_key(table)
        for name, definition in seed.INDEXES.items():
            self.execute(f"CREATE INDEX {name} {definition}")
        self.dimensions = self.find_dimensions(typed_dimensions)
        self.execute("UPDATE embeddings SET model_id = %s WHERE embedding IS NOT NULL", (self.model_id,))
        self.documents = self.count("SELECT count(*) FROM embeddings")
        self.chunks = self.count("SELECT count(*) FROM chunks")
        self.execute(_STAMP)
        self.execute("INSERT INTO alembic_version VALUES (%s)", (SEED,))

    def execute(self, statement: str | Composable, params: Any = None) -> psycopg.Cursor[Any]:
        query = SQL(statement) if isinstance(statement, str) else statement
        return self.connection.execute(query.as_string(self.connection).encode(), params)

    def count(self, statement: str | Composable) -> int:
        row = self.execute(statement).fetchone()
        return int(row[0]) if row else 0

    def exists(self, table: str) -> bool:
        return bool(self.count(SQL("SELECT (to_regclass({}) IS NOT NULL)::int").format(sql.Literal(table))))

    def check_can_be_adopted(self) -> None:
        if self.exists("alembic_version"):
            row = self.execute("SELECT string_agg(version_num, ', ') FROM alembic_version").fetchone()
            raise SchemaError(
                f"the database is already managed by migrations (alembic_version: {row and row[0]}); if they are "
                "vectorkeep's run 'vectorkeep migrate' without --adopt, else use another database"
            )
        if not self.exists("embeddings"):
            raise SchemaError("there is no table 'embeddings' to adopt; for an empty database run 'vectorkeep migrate'")
        if taken := [table for table in _TABLES_OF_LATER_REVISIONS if self.exists(table)]:
            raise SchemaError(f"tables named {', '.join(taken)} exist, and vectorkeep needs the names; rename them")
        for table, needed in (("embeddings", ["id"]), ("chunks", ["id", "document_id"])):
            if self.exists(table):
                self.check_table(table, needed)

    def check_table(self, table: str, needed: list[str]) -> None:
        row = self.execute("SELECT relkind FROM pg_class WHERE oid = %s::regclass", (table,)).fetchone()
        if not row or row[0] != "r":
            raise SchemaError(f"{table!r} is not a plain table (a view, or partitioned); it cannot be adopted")
        present = self.columns(table)
        if missing := [name for name in needed if name not in present]:
            raise SchemaError(
                f"table {table!r} has no column {', '.join(missing)}; found: {', '.join(sorted(present))}"
            )

    def make_missing_tables(self, seed: ModuleType) -> None:
        if self.exists("performance_metrics"):
            for name in self.names(_INDEX_NAMES, "performance_metrics"):
                renamed = Identifier(name[: 63 - len(SUFFIX)] + SUFFIX)
                self.execute(SQL("ALTER INDEX {} RENAME TO {}").format(Identifier(name), renamed))
            self.execute(f"ALTER TABLE performance_metrics RENAME TO performance_metrics{SUFFIX}")
            self.details.append(f"your table performance_metrics is now performance_metrics{SUFFIX}")
        for table, statement in seed.TABLES.items():
            if not self.exists(table):
                self.execute(statement)
                self.details.append(f"made the table {table}")

    def typed_dimensions(self) -> int | None:
        """The n of a column of type vector(n), or None."""
        for table in ("embeddings", "chunks"):
            column = self.columns(table).get("embedding")
            if column is not None and column.vector_dimensions is not None:
                return column.vector_dimensions
        return None

    def drop_what_depends(self, seed: ModuleType) -> None:
        """Drop what an untyped vector cannot have, and what the migrations make under the same names."""
        self.drop_foreign_keys()
        for name in self.names(_POSITION_KEYS):
            self.execute(SQL("ALTER TABLE chunks DROP CONSTRAINT {}").format(Identifier(name)))
        for table in ("embeddings", "chunks"):
            for name in self.names(_INDEXES_ON_VECTORS, table):  # a quoted name, fit for SQL
                self.execute(f"DROP INDEX {name}")
                self.details.append(f"dropped the old vector index {name}")
            later = {f"{table}_workspace_idx", f"{table}_source_id_idx", "chunks_detached_idx"}
            for name in set(self.names(_INDEX_NAMES, table)) & (set(seed.INDEXES) | later):
                self.execute(SQL("DROP INDEX {}").format(Identifier(name)))

    def drop_foreign_keys(self) -> None:
        keys = self.execute(_FOREIGN_KEYS, {"tables": ["embeddings", "chunks"]}).fetchall()
        for table, name, target, columns in keys:
            if table == "chunks" and columns == ["document_id"]:
                if target != "embeddings":
                    raise SchemaError(
                        f"chunks.document_id refers to {target}, not to embeddings; its rows are no documents "
                        "of this store: drop that foreign key first if they are meant to be"
                    )
                self.execute(SQL("ALTER TABLE chunks DROP CONSTRAINT {}").format(Identifier(name)))
                self.details.append(f"replaced the foreign key {name} by one that cascades")
            elif target in ("embeddings", "chunks") and self.columns(target)["id"].type not in (
                "text",
                "character varying",
            ):
                raise SchemaError(
                    f"{table} ({', '.join(columns)}) refers to {target}, whose ids become text; drop the foreign "
                    f"key {name} first, and change that column to text to have it again"
                )

    def reshape(self, table: str, columns: tuple[Column, ...]) -> None:
        """Give `table` the columns of the seed schema, and the values that those demand."""
        self.move_out_of_the_way(table)
        present = self.columns(table)
        changes: list[Composable] = []
        for column in columns:
            actual = present.get(column.name)
            if actual is not None:
                changes += self.changes_of_type(table, column, actual)
            elif not column.optional:
                changes.append(SQL("ADD COLUMN {} {}").format(Identifier(column.name), SQL(column.type)))
        self.alter(table, changes)
        self.fill(table, columns, present)
        # Deferred constraints of the user's would forbid to alter a table that was just updated.
        self.execute("SET CONSTRAINTS ALL IMMEDIATE")
        now_present = self.columns(table)
        self.alter(table, [rule for c in columns if c.name in now_present for rule in c.rules()])
        self.warn_of_required_columns(table, columns, now_present)

    def move_out_of_the_way(self, table: str) -> None:
        for name in IN_THE_WAY[table]:
            if name in self.columns(table):
                self.execute(
                    SQL("ALTER TABLE {} RENAME COLUMN {} TO {}").format(
                        Identifier(table), Identifier(name), Identifier(name + SUFFIX)
                    )
                )
                self.details.append(f"your column {table}.{name} is now {name}{SUFFIX}")

    def changes_of_type(self, table: str, column: Column, actual: Present) -> list[Composable]:
        using = conversion(table, column, actual)
        if using is None:
            return []
        name = Identifier(column.name)
        self.details.append(f"{table}.{column.name}: {actual.declared} to {column.type}")
        dropped = SQL("ALTER {} DROP IDENTITY IF EXISTS" if actual.identity else "ALTER {} DROP DEFAULT")
        return [
            dropped.format(name),
            SQL("ALTER {} TYPE {} USING {}").format(name, SQL(column.type), using),
        ]

    def fill(self, table: str, columns: tuple[Column, ...], before: dict[str, Present]) -> None:
        if "text" not in before and "content" in before:
            self.execute(SQL("UPDATE {} SET text = content::text").format(Identifier(table)))
            self.details.append(f"{table}.text filled from your column content, which stays")
        if table == "chunks":
            numbered = self.execute(_NUMBER_CHUNKS).rowcount
            if numbered:
                self.details.append(f"{numbered} chunks numbered")
        if wrapped := self.execute(SQL(_WRAP_METADATA).format(Identifier(table))).rowcount:
            self.details.append(f"{wrapped} rows of {table} had metadata that is no object: now under 'value'")
        for column in columns:
            if column.fill is None or (column.optional and column.name not in before):
                continue
            filled = self.execute(
                SQL("UPDATE {} SET {} = {} WHERE {}").format(
                    Identifier(table), Identifier(column.name), SQL(column.fill), SQL(column.lacking)
                )
            ).rowcount
            if filled and column.name in before:
                self.details.append(f"{filled} rows of {table} had no {column.name}")

    def warn_of_required_columns(self, table: str, columns: tuple[Column, ...], present: dict[str, Present]) -> None:
        ours = {column.name for column in columns}
        for name, column in present.items():
            if name not in ours and column.must_be_given:
                self.details.append(
                    f"your column {table}.{name} is NOT NULL without a default: "
                    "give it one, or the store cannot add rows"
                )

    def ensure_primary_key(self, table: str) -> None:
        row = self.execute(_PRIMARY_KEY, (table,)).fetchone()
        wanted = f"{table}_pkey"
        if row is None:
            self.execute(
                SQL("ALTER TABLE {} ADD CONSTRAINT {} PRIMARY KEY (id)").format(Identifier(table), Identifier(wanted))
            )
            self.details.append(f"{table}.id is now the primary key")
            return
        name, columns = row
        if columns != ["id"]:
            raise SchemaError(
                f"the primary key of {table!r} is ({', '.join(columns)}), expected (id): "
                "a document is identified by its id alone; nothing was changed"
            )
        if name != wanted:
            self.execute(
                SQL("ALTER TABLE {} RENAME CONSTRAINT {} TO {}").format(
                    Identifier(table), Identifier(name), Identifier(wanted)
                )
            )

    def find_dimensions(self, typed: int | None) -> int:
        """The dimensions of all vectors. Raises SchemaError where they differ."""
        counts = self.execute(_COUNT_BY_DIMENSIONS).fetchall()
        if len(counts) > 1:
            listed = ", ".join(f"{count} rows of {dimensions}" for dimensions, count in counts)
            raise SchemaError(
                f"the vectors have different dimensions: {listed}; a store has one model: remove, or embed "
                "again, those of the other; nothing was changed"
            )
        found: int | None = counts[0][0] if counts else typed or self.given_dimensions
        if found is None:
            raise ValidationError("there is no vector that tells the dimensions; give them; nothing was changed")
        if self.given_dimensions not in (None, found):
            raise ValidationError(
                f"the vectors have {found} dimensions, not {self.given_dimensions}; nothing was changed"
            )
        if self.distance != "cosine" and found <= MAX_INDEXED_DIMENSIONS:
            for table in ("embeddings", "chunks"):  # fails where the index on halfvec would
                self.count(SQL("SELECT count(embedding::halfvec) FROM {}").format(Identifier(table)))
        return found

    def alter(self, table: str, changes: list[Composable]) -> None:
        """All in one ALTER TABLE, which rewrites the table once."""
        if changes:
            self.execute(SQL("ALTER TABLE {} {}").format(Identifier(table), SQL(", ").join(changes)))

    def columns(self, table: str) -> dict[str, Present]:
        rows = self.execute(_COLUMNS, (table,)).fetchall()
        return {row[0]: Present(*row) for row in rows}

    def names(self, query: str, table: str | None = None) -> list[str]:
        return [row[0] for row in self.execute(query, (table,) if table else None).fetchall()]


def _seed_revision() -> ModuleType:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(alembic_config()).get_revision(SEED).module
