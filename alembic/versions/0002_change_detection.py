"""Change detection and workspaces

Hashes of what is stored, so that a document that did not change is neither embedded nor written again;
the workspace as a column of its own; chunks that know their source and, when detached, their origin;
one chunk per position of a document.

Online: rows are filled in batches with a commit each, indexes are built CONCURRENTLY. Interrupted, it
may simply run again.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Tables whose rows `downgrade` drops.
drops: tuple[str, ...] = ()

INDEXES = {
    "embeddings_workspace_idx": "ON embeddings (workspace)",
    "chunks_source_id_idx": "ON chunks (source_id)",
    "chunks_workspace_idx": "ON chunks (workspace)",
    "chunks_detached_idx": "ON chunks (origin_id) WHERE document_id IS NULL",
}
POSITION_KEY = "chunks_document_id_chunk_index_key"

# A row that an older program writes meanwhile may stay without a hash: it only counts as changed once more.
FILL_EMBEDDINGS = """
DO $$
DECLARE
    batch text[];
    last text;
BEGIN
    LOOP
        SELECT array_agg(id ORDER BY id) INTO batch
        FROM (SELECT id FROM embeddings WHERE last IS NULL OR id > last ORDER BY id LIMIT 2000) AS page;
        EXIT WHEN batch IS NULL;
        UPDATE embeddings SET
            text_hash = sha256(convert_to(text, 'UTF8')),
            workspace = CASE WHEN jsonb_typeof(metadata -> 'workspace') = 'string'
                             THEN metadata ->> 'workspace' ELSE workspace END
        WHERE id = ANY (batch) AND text_hash IS NULL;
        COMMIT;
        last := batch[array_upper(batch, 1)];
    END LOOP;
END
$$
"""
FILL_CHUNKS = """
DO $$
DECLARE
    batch text[];
    last text;
BEGIN
    LOOP
        SELECT array_agg(id ORDER BY id) INTO batch
        FROM (SELECT id FROM chunks WHERE last IS NULL OR id > last ORDER BY id LIMIT 2000) AS page;
        EXIT WHEN batch IS NULL;
        UPDATE chunks SET
            text_hash = sha256(convert_to(chunks.text, 'UTF8')),
            source_id = coalesce(document.source_id, chunks.source_id),
            workspace = CASE
                WHEN document.id IS NOT NULL THEN document.workspace
                WHEN jsonb_typeof(chunks.metadata -> 'workspace') = 'string'
                THEN chunks.metadata ->> 'workspace'
                ELSE chunks.workspace END
        FROM unnest(batch) AS given (id)
        JOIN chunks AS before ON before.id = given.id
        LEFT JOIN embeddings AS document ON document.id = before.document_id
        WHERE chunks.id = given.id AND chunks.text_hash IS NULL;
        COMMIT;
        last := batch[array_upper(batch, 1)];
    END LOOP;
END
$$
"""
# Positions were not unique before. The order in which chunks were numbered, then made, is kept; of ids
# that count, "c10" comes after "c9".
NUMBER_CHUNKS = """
UPDATE chunks SET chunk_index = numbered.position
FROM (
    SELECT id, row_number() OVER (
        PARTITION BY document_id ORDER BY chunk_index, created_at, length(id), id
    ) - 1 AS position
    FROM chunks
    WHERE document_id IN (
        SELECT document_id FROM chunks GROUP BY document_id, chunk_index HAVING count(*) > 1
    )
) AS numbered
WHERE chunks.id = numbered.id AND chunks.chunk_index <> numbered.position
"""


def upgrade() -> None:
    op.execute("""
        ALTER TABLE embeddings
            ADD COLUMN IF NOT EXISTS workspace text,
            ADD COLUMN IF NOT EXISTS text_hash bytea,
            ADD COLUMN IF NOT EXISTS content_hash bytea,
            ADD COLUMN IF NOT EXISTS vector_hash bytea,
            ADD COLUMN IF NOT EXISTS chunks_hash bytea,
            ADD COLUMN IF NOT EXISTS model_id text
    """)
    # Room on each page keeps an update of the metadata HOT: it then touches no index, the vectors' neither.
    op.execute("ALTER TABLE embeddings SET (fillfactor = 80)")
    op.execute("""
        ALTER TABLE chunks
            ADD COLUMN IF NOT EXISTS origin_id text,
            ADD COLUMN IF NOT EXISTS source_id text NOT NULL DEFAULT 'batch',
            ADD COLUMN IF NOT EXISTS workspace text,
            ADD COLUMN IF NOT EXISTS text_hash bytea
    """)
    with op.get_context().autocommit_block():
        op.execute(FILL_EMBEDDINGS)
        op.execute(FILL_CHUNKS)
        op.execute(NUMBER_CHUNKS)
        for name, definition in INDEXES.items():
            create_index(name, definition)
        create_index(POSITION_KEY, "ON chunks (document_id, chunk_index)", unique=True)
    op.execute(f"""
        DO $$
        BEGIN
            IF NOT EXISTS (
                SELECT FROM pg_constraint
                WHERE conrelid = 'chunks'::regclass AND conname = '{POSITION_KEY}'
            ) THEN
                ALTER TABLE chunks ADD CONSTRAINT {POSITION_KEY} UNIQUE USING INDEX {POSITION_KEY};
            END IF;
        END
        $$
    """)
    # The constraint's index serves document_id, its leading column.
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS chunks_document_id_idx")


def create_index(name: str, definition: str, *, unique: bool = False) -> None:
    """Build an index online; what an interrupted build left behind is dropped first."""
    op.execute(f"""
        DO $$
        BEGIN
            IF EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass('{name}') AND NOT indisvalid) THEN
                DROP INDEX {name};
            END IF;
        END
        $$
    """)
    kind = "UNIQUE INDEX" if unique else "INDEX"
    op.execute(f"CREATE {kind} CONCURRENTLY IF NOT EXISTS {name} {definition}")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        create_index("chunks_document_id_idx", "ON chunks (document_id)")
    op.execute(f"ALTER TABLE chunks DROP CONSTRAINT IF EXISTS {POSITION_KEY}")
    # With a column go the indexes on it.
    op.execute("""
        ALTER TABLE chunks
            DROP COLUMN IF EXISTS origin_id,
            DROP COLUMN IF EXISTS source_id,
            DROP COLUMN IF EXISTS workspace,
            DROP COLUMN IF EXISTS text_hash
    """)
    op.execute("ALTER TABLE embeddings RESET (fillfactor)")
    op.execute("""
        ALTER TABLE embeddings
            DROP COLUMN IF EXISTS workspace,
            DROP COLUMN IF EXISTS text_hash,
            DROP COLUMN IF EXISTS content_hash,
            DROP COLUMN IF EXISTS vector_hash,
            DROP COLUMN IF EXISTS chunks_hash,
            DROP COLUMN IF EXISTS model_id
    """)
