"""vectorkeep: a data layer for embeddings on PostgreSQL and pgvector."""
