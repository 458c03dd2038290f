"""Seed schema: documents, chunks, performance metrics

Revision ID: 0001
Revises:
"""

from psycopg import errors as pg
from sqlalchemy.exc import DBAPIError

from alembic import context, op
from db.errors import SchemaError

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Tables whose rows `downgrade` drops.
drops = ("embeddings", "chunks", "performance_metrics")


def upgrade() -> None:
    create_extension()
    op.execute("""
        CREATE TABLE embeddings (
            id text PRIMARY KEY,
            source_id text NOT NULL DEFAULT 'batch',
            text text NOT NULL,
            embedding vector,
            metadata jsonb NOT NULL DEFAULT '{}'::jsonb,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now()
        )
    """)
    op.execute("CREATE INDEX embeddings_source_id_idx ON embeddings (source_id)")
    op.execute("CREATE INDEX embeddings_created_at_idx ON embeddings (created_at DESC)")
    op.execute("""
        CREATE TABLE chunks (
            id text PRIMARY KEY,
            document_id text,
            chunk_index integer NOT NULL,
            text text NOT NULL,
            embedding vector,
            metadata jsonb NOT NULL DEFAULT '{}'::jsonb,
            created_at timestamptz NOT NULL DEFAULT now()
        )
    """)
    op.execute("CREATE INDEX chunks_document_id_idx ON chunks (document_id)")
    op.execute("""
        CREATE TABLE performance_metrics (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            operation text NOT NULL,
            duration_ms double precision NOT NULL,
            success boolean NOT NULL DEFAULT true,
            error_message text,
            metadata jsonb NOT NULL DEFAULT '{}'::jsonb,
            created_at timestamptz NOT NULL DEFAULT now()
        )
    """)
    op.execute("CREATE INDEX performance_metrics_operation_idx ON performance_metrics (operation)")
    op.execute("CREATE INDEX performance_metrics_created_at_idx ON performance_metrics (created_at DESC)")


def create_extension() -> None:
    """CREATE EXTENSION vector, or SchemaError that says who has to run what."""
    database, role = "DATABASE", "this role"
    if not context.is_offline_mode():
        database, role = op.get_bind().exec_driver_sql("SELECT current_database(), current_user").one()
    command = f"psql -d {database} -c 'CREATE EXTENSION vector'"
    try:
        op.execute("CREATE EXTENSION IF NOT EXISTS vector")
    except DBAPIError as exc:
        if isinstance(exc.orig, pg.InsufficientPrivilege):
            raise SchemaError(
                f"the database has no extension 'vector' and role {role!r} may not create it; "
                f"as a superuser, or the database's owner, run: {command}"
            ) from exc
        if isinstance(exc.orig, pg.FeatureNotSupported | pg.UndefinedFile):
            raise SchemaError(
                "pgvector is not installed on the database server; install its package there (Debian: "
                "postgresql-NN-pgvector; container: image pgvector/pgvector), "
                f"then, as a superuser, run: {command}"
            ) from exc
        raise


def downgrade() -> None:
    # The extension stays: it may have been there before us, and other tables may use it.
    op.execute("DROP TABLE performance_metrics")
    op.execute("DROP TABLE chunks")
    op.execute("DROP TABLE embeddings")
