"""Health: measured recall, tuned searches, pauses of ingestion, rebuilds

Revision ID: 0005
Revises: 0004
"""

from alembic import op

from db.migration_locks import lock_in_stints

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Tables whose rows `downgrade` drops and which mean something to a person.
drops = ("recall_measurements",)


# Every write looks whether ingestion is paused: roles that may write must not lose that by an upgrade.
LET_WRITERS_SEE_PAUSES = """
DO $$
DECLARE
    writer text;
BEGIN
    FOR writer IN
        SELECT DISTINCT CASE granted.grantee WHEN 0 THEN 'PUBLIC' ELSE granted.grantee::regrole::text END
        FROM pg_class, aclexplode(relacl) AS granted
        WHERE pg_class.oid = 'write_log'::regclass AND privilege_type = 'INSERT' AND grantee <> relowner
    LOOP
        EXECUTE 'GRANT SELECT ON ingestion_pause TO ' || writer;
    END LOOP;
END
$$
"""


def upgrade() -> None:
    op.execute("""
        CREATE TABLE recall_measurements (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            model_id text NOT NULL,
            level text NOT NULL,
            filtered boolean NOT NULL,
            k integer NOT NULL,
            sample integer NOT NULL,
            recall double precision NOT NULL,
            recall_low double precision NOT NULL,
            recall_high double precision NOT NULL,
            target double precision NOT NULL,
            ef_search integer NOT NULL,
            recommended_ef_search integer,
            indexed_ms_p50 double precision NOT NULL,
            exact_ms_p50 double precision NOT NULL,
            looked_up integer NOT NULL,
            unreachable integer NOT NULL,
            zero_vectors integer NOT NULL,
            rows bigint NOT NULL,
            changes bigint,
            created_at timestamptz NOT NULL DEFAULT now()
        )
    """)
    op.execute("CREATE INDEX recall_measurements_created_at_idx ON recall_measurements (created_at DESC)")
    # A few vectors that were really asked for: recall of stored vectors alone flatters the index.
    op.execute("""
        CREATE TABLE query_samples (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            model_id text NOT NULL,
            level text NOT NULL,
            embedding vector NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now()
        )
    """)
    # At most one row. An owner with a backend is alive as long as that very session is.
    op.execute("""
        CREATE TABLE ingestion_pause (
            singleton boolean PRIMARY KEY DEFAULT true,
            reason text NOT NULL,
            owner text NOT NULL,
            owner_pid integer,
            owner_started_at timestamptz,
            paused_at timestamptz NOT NULL DEFAULT now(),
            expires_at timestamptz NOT NULL,
            CONSTRAINT ingestion_pause_singleton_check CHECK (singleton)
        )
    """)
    op.execute(LET_WRITERS_SEE_PAUSES)
    op.execute("""
        CREATE TABLE rebuild_runs (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            state text NOT NULL,
            model_id text,
            details jsonb NOT NULL DEFAULT '{}'::jsonb,
            started_at timestamptz NOT NULL DEFAULT now(),
            finished_at timestamptz
        )
    """)
    # Last, and both together: every search reads the registry, and waits for what comes after its lock.
    op.execute(lock_in_stints("embedding_models", "index_builds", mode="ACCESS EXCLUSIVE"))
    op.execute("""
        ALTER TABLE embedding_models
            ADD COLUMN ef_search integer,
            ADD COLUMN ef_search_reason text,
            -- It reads the table, of a row for each model.
            -- squawk-ignore constraint-missing-not-valid
            ADD CONSTRAINT embedding_models_ef_search_check CHECK (ef_search BETWEEN 1 AND 1000)
    """)
    op.execute("ALTER TABLE index_builds ADD COLUMN changes bigint")


def downgrade() -> None:
    for table in ("rebuild_runs", "ingestion_pause", "query_samples", "recall_measurements"):
        op.execute(f"DROP TABLE {table}")
    op.execute("ALTER TABLE index_builds DROP COLUMN changes")
    op.execute("ALTER TABLE embedding_models DROP COLUMN ef_search_reason, DROP COLUMN ef_search")
