"""Foreign key from chunks to documents, and the write log

A database may hold chunks whose document is gone. The key then stays NOT VALID, which binds new rows
all the same, until `cleanup_orphaned` has removed them and validates it.

Revision ID: 0004
Revises: 0003
"""

from alembic import op

from db.migration_locks import lock_in_stints

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# Tables whose rows `downgrade` drops and which mean something to a person: not the log, whose rows only
# tell caches what they may still serve.
drops: tuple[str, ...] = ()


def upgrade() -> None:
    # Both at once: adding the key locks one after the other, and a writer has often locked them the other way round.
    op.execute(lock_in_stints("embeddings", "chunks", mode="SHARE ROW EXCLUSIVE"))
    op.execute("""
        DO $$
        BEGIN
            IF NOT EXISTS (
                SELECT FROM pg_constraint
                WHERE conrelid = 'chunks'::regclass AND conname = 'chunks_document_id_fkey'
            ) THEN
                ALTER TABLE chunks ADD CONSTRAINT chunks_document_id_fkey
                    FOREIGN KEY (document_id) REFERENCES embeddings (id) ON DELETE CASCADE NOT VALID;
            END IF;
        END
        $$
    """)
    # The key is committed before it is validated: adding it locks out writers, validating does not.
    with op.get_context().autocommit_block():
        op.execute("""
            DO $$
            BEGIN
                IF NOT EXISTS (
                    SELECT FROM chunks
                    WHERE document_id IS NOT NULL
                      AND NOT EXISTS (SELECT FROM embeddings WHERE embeddings.id = chunks.document_id)
                ) THEN
                    ALTER TABLE chunks VALIDATE CONSTRAINT chunks_document_id_fkey;
                END IF;
            END
            $$
        """)
    op.execute("""
        CREATE TABLE write_log (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
            tags text[] NOT NULL,
            delivered_at timestamptz,
            created_at timestamptz NOT NULL DEFAULT now()
        )
    """)
    op.execute("CREATE INDEX write_log_xid_idx ON write_log (xid)")
    op.execute("CREATE INDEX write_log_undelivered_idx ON write_log (id) WHERE delivered_at IS NULL")
    op.execute("""
        CREATE TABLE write_log_watermark (
            singleton boolean PRIMARY KEY DEFAULT true,
            xid xid8 NOT NULL DEFAULT '0'::xid8,
            CONSTRAINT write_log_watermark_singleton_check CHECK (singleton)
        )
    """)
    op.execute("INSERT INTO write_log_watermark DEFAULT VALUES")


def downgrade() -> None:
    op.execute("DROP TABLE write_log_watermark")
    op.execute("DROP TABLE write_log")
    op.execute("ALTER TABLE chunks DROP CONSTRAINT IF EXISTS chunks_document_id_fkey")
