"""What each role may do, table by table, and which rows row-level security shows to it. `db.roles` grants it."""

ALL = "SELECT, INSERT, UPDATE, DELETE"
# What each role may do with each table, and no more. A table that is not listed is the owner's alone.
GRANTS: dict[str, dict[str, str]] = {
    "app": {
        "embeddings": ALL,
        "chunks": ALL,
        "vector_cache": ALL,
        "ingestion_pause": ALL,
        "write_log": "SELECT, INSERT, UPDATE (delivered_at), DELETE",
        "write_log_watermark": "SELECT, UPDATE (xid)",
        "embedding_models": "SELECT, INSERT, UPDATE (ef_search, ef_search_reason)",
        "performance_metrics": "SELECT, INSERT, DELETE",
        "query_samples": "SELECT, INSERT, DELETE",
        "maintenance_runs": "SELECT, INSERT, DELETE",
        "recall_measurements": "SELECT, INSERT, DELETE",
        "index_builds": "SELECT, INSERT",
        "rebuild_runs": "SELECT",
        "alembic_version": "SELECT",
    },
    "reader": dict.fromkeys(
        (
            "embeddings", "chunks", "vector_cache", "ingestion_pause", "write_log", "write_log_watermark",
            "embedding_models", "performance_metrics", "query_samples", "maintenance_runs", "recall_measurements",
            "index_builds", "rebuild_runs", "alembic_version",
        ),
        "SELECT",
    ),
    # Of the write log a tenant reads back what it wrote, by a number: the tags name everybody's sources.
    "tenant": {
        "embeddings": ALL,
        "chunks": ALL,
        "tenant_workspaces": "SELECT",
        "write_log": "SELECT (id, xid), INSERT (tags)",
        "embedding_models": "SELECT (model_id, dimensions, distance, active, ef_search)",
        "ingestion_pause": "SELECT",
        "alembic_version": "SELECT",
    },
}  # fmt: skip
# VACUUM is grantable from PostgreSQL 17 on.
MAINTAINED = ("embeddings", "chunks", "vector_cache", "write_log", "performance_metrics")
# What later migrations make is covered until their roles are made again. Tenants see nothing that is new.
BY_DEFAULT = {"app": ALL, "reader": "SELECT"}
STILL_TRUE = "vectorkeep_still_true(pg_snapshot, text[])"

# Which workspaces are the tenant's: an array that is made once a statement and can be looked up in an index.
OWN = "workspace = ANY (ARRAY(SELECT workspace FROM tenant_workspaces WHERE role = session_user))"
# A chunk goes with a document that its writer may see. A detached one would be taken in by whoever writes a document of
# that id next: tenants leave none.
OWN_CHUNK = f"{OWN} AND EXISTS (SELECT FROM embeddings AS document WHERE document.id = chunks.document_id)"
POLICIES = {
    "app": {"embeddings": "USING (true) WITH CHECK (true)", "chunks": "USING (true) WITH CHECK (true)"},
    "reader": {"embeddings": "FOR SELECT USING (true)", "chunks": "FOR SELECT USING (true)"},
    "tenant": {
        "embeddings": f"USING ({OWN}) WITH CHECK ({OWN})",
        "chunks": f"USING ({OWN}) WITH CHECK ({OWN_CHUNK})",
    },
}
