"""Seed schema: documents, chunks, performance metrics

Revision ID: 0001
Revises:
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Tables whose rows `downgrade` drops.
drops = ("embeddings", "chunks", "performance_metrics")

# Also what the adoption of tables made by hand leads to.
TABLES = {
    "embeddings": """
        CREATE TABLE embeddings (
            id text PRIMARY KEY,
            source_id text NOT NULL DEFAULT 'batch',
            text text NOT NULL,
            embedding vector,
            metadata jsonb NOT NULL DEFAULT '{}'::jsonb,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now()
        )
    """,
    "chunks": """
        CREATE TABLE chunks (
            id text PRIMARY KEY,
            document_id text,
            chunk_index integer NOT NULL,
            text text NOT NULL,
            embedding vector,
            metadata jsonb NOT NULL DEFAULT '{}'::jsonb,
            created_at timestamptz NOT NULL DEFAULT now()
        )
    """,
    "performance_metrics": """
        CREATE TABLE performance_metrics (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            operation text NOT NULL,
            duration_ms double precision NOT NULL,
            success boolean NOT NULL DEFAULT true,
            error_message text,
            metadata jsonb NOT NULL DEFAULT '{}'::jsonb,
            created_at timestamptz NOT NULL DEFAULT now()
        )
    """,
}
INDEXES = {
    "embeddings_source_id_idx": "ON embeddings (source_id)",
    "embeddings_created_at_idx": "ON embeddings (created_at DESC)",
    "chunks_document_id_idx": "ON chunks (document_id)",
    "performance_metrics_operation_idx": "ON performance_metrics (operation)",
    "performance_metrics_created_at_idx": "ON performance_metrics (created_at DESC)",
}


def upgrade() -> None:
    op.execute("CREATE EXTENSION IF NOT EXISTS vector")
    for table in TABLES.values():
        op.execute(table)
    for name, definition in INDEXES.items():
        op.execute(f"CREATE INDEX {name} {definition}")


def downgrade() -> None:
    # The extension stays: it may have been there before us, and other tables may use it.
    for table in reversed(TABLES):
        op.execute(f"DROP TABLE {table}")
