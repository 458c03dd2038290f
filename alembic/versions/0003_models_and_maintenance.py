"""Registry of models, vector cache, records of index builds and maintenance

Revision ID: 0003
Revises: 0002
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Tables whose rows `downgrade` drops.
drops = ("embedding_models", "vector_cache", "index_builds", "maintenance_runs")


def upgrade() -> None:
    op.execute("""
        CREATE TABLE embedding_models (
            model_id text PRIMARY KEY,
            dimensions integer NOT NULL,
            distance text NOT NULL,
            active boolean NOT NULL DEFAULT false,
            created_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT embedding_models_dimensions_check CHECK (dimensions BETWEEN 1 AND 16000),
            CONSTRAINT embedding_models_distance_check CHECK (distance IN ('cosine', 'l2', 'inner_product'))
        )
    """)
    op.execute("CREATE UNIQUE INDEX embedding_models_one_active_idx ON embedding_models (active) WHERE active")
    # Every hit updates last_used: with room on the page that stays HOT.
    op.execute("""
        CREATE TABLE vector_cache (
            key bytea PRIMARY KEY,
            model_id text NOT NULL,
            embedding vector NOT NULL,
            last_used timestamptz NOT NULL DEFAULT now()
        ) WITH (fillfactor = 80)
    """)
    op.execute("""
        CREATE TABLE index_builds (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            index_name text NOT NULL,
            table_name text NOT NULL,
            rows bigint NOT NULL,
            size_bytes bigint NOT NULL,
            duration_ms double precision NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now()
        )
    """)
    op.execute("CREATE INDEX index_builds_index_name_idx ON index_builds (index_name)")
    op.execute("""
        CREATE TABLE maintenance_runs (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            operation text NOT NULL,
            success boolean NOT NULL,
            details jsonb NOT NULL DEFAULT '{}'::jsonb,
            started_at timestamptz NOT NULL,
            finished_at timestamptz NOT NULL DEFAULT now()
        )
    """)


def downgrade() -> None:
    # The vector indexes belong to the registered model, and go with it.
    op.execute("DROP INDEX IF EXISTS embeddings_vector_idx")
    op.execute("DROP INDEX IF EXISTS chunks_vector_idx")
    op.execute("DROP TABLE maintenance_runs")
    op.execute("DROP TABLE index_builds")
    op.execute("DROP TABLE vector_cache")
    op.execute("DROP TABLE embedding_models")
