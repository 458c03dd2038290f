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

from db.migration_locks import lock_in_stints

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

# What a row lacks is worked out from what is stored.
FILL_EMBEDDINGS = """
    UPDATE embeddings SET
        text_hash = sha256(convert_to(text, 'UTF8')),
        workspace = CASE WHEN jsonb_typeof(metadata -> 'workspace') = 'string'
                         THEN metadata ->> 'workspace' ELSE workspace END
    WHERE id = ANY (batch) AND text_hash IS NULL
"""
FILL_CHUNKS = """
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
    WHERE chunks.id = given.id AND chunks.text_hash IS NULL
"""
# Never waits for a row while it holds others: of two that do, PostgreSQL cancels one, and it may be the other. What
# somebody else was writing comes in the end, row by row; so does what an older program has added meanwhile.
FILL = """
DO $$
DECLARE
    batch text[];
    last text;
    one text;
BEGIN
    LOOP
        SELECT array_agg(id ORDER BY id) INTO batch
        FROM (SELECT id FROM {table} WHERE last IS NULL OR id > last ORDER BY id LIMIT 2000) AS page;
        EXIT WHEN batch IS NULL;
        last := batch[array_upper(batch, 1)];
        SELECT array_agg(id) INTO batch FROM (
            SELECT id FROM {table} WHERE id = ANY (batch) AND text_hash IS NULL FOR NO KEY UPDATE SKIP LOCKED
        ) AS free;
        {update};
        COMMIT;
    END LOOP;
    FOR one IN SELECT id FROM {table} WHERE text_hash IS NULL LOOP
        batch := ARRAY[one];
        {update};
        COMMIT;
    END LOOP;
END
$$
"""
# Positions were not unique before. The order in which chunks were numbered, then made, is kept; of ids
# that count, "c10" comes after "c9". A commit for each document: none is kept from its writers for long.
NUMBER_CHUNKS = """
DO $$
DECLARE
    shared text;
BEGIN
    FOR shared IN
        SELECT document_id FROM (
            SELECT document_id FROM chunks WHERE document_id IS NOT NULL
            GROUP BY document_id, chunk_index HAVING count(*) > 1
        ) AS positions GROUP BY document_id
    LOOP
        UPDATE chunks SET chunk_index = numbered.position
        FROM (
            SELECT id, row_number() OVER (ORDER BY chunk_index, created_at, length(id), id) - 1 AS position
            FROM chunks WHERE document_id = shared
        ) AS numbered
        WHERE chunks.id = numbered.id AND chunks.chunk_index <> numbered.position;
        COMMIT;
    END LOOP;
END
$$
"""


def upgrade() -> None:
    # A transaction for each table: no lock is held while another is waited for.
    op.execute(lock_in_stints("embeddings", mode="ACCESS EXCLUSIVE"))
    op.execute("""
        ALTER TABLE embeddings
            ADD COLUMN IF NOT EXISTS workspace text,
            ADD COLUMN IF NOT EXISTS text_hash bytea,
            ADD COLUMN IF NOT EXISTS content_hash bytea,
            ADD COLUMN IF NOT EXISTS vector_hash bytea,
            ADD COLUMN IF NOT EXISTS chunks_hash bytea,
            ADD COLUMN IF NOT EXISTS model_id text
    """)
    with op.get_context().autocommit_block():
        # Room on each page keeps an update of the metadata HOT: it then touches no index, the vectors' neither.
        op.execute("""
            -- Run again it changes nothing.
            -- squawk-ignore prefer-robust-stmts
            ALTER TABLE embeddings SET (fillfactor = 80)
        """)
    op.execute(lock_in_stints("chunks", mode="ACCESS EXCLUSIVE"))
    op.execute("""
        ALTER TABLE chunks
            ADD COLUMN IF NOT EXISTS origin_id text,
            ADD COLUMN IF NOT EXISTS source_id text NOT NULL DEFAULT 'batch',
            ADD COLUMN IF NOT EXISTS workspace text,
            ADD COLUMN IF NOT EXISTS text_hash bytea
    """)
    with op.get_context().autocommit_block():
        op.execute(FILL.format(table="embeddings", update=FILL_EMBEDDINGS))
        op.execute(FILL.format(table="chunks", update=FILL_CHUNKS))
        op.execute(NUMBER_CHUNKS)
        for name, definition in INDEXES.items():
            create_index(name, definition)
        create_index(POSITION_KEY, "ON chunks (document_id, chunk_index)", unique=True)
    op.execute(lock_in_stints("chunks", mode="ACCESS EXCLUSIVE"))
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
