"""The tables as SQLAlchemy models. Migrations make them; `alembic check` holds the two together."""

from datetime import datetime
from typing import Any

from pgvector.sqlalchemy import VECTOR
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    func,
)
from sqlalchemy import text as sql
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import UserDefinedType

from .config import Distance

# halfvec indexes hold at most this many dimensions (pgvector's own limit).
MAX_INDEXED_DIMENSIONS = 4000


class XID8(UserDefinedType[str]):
    """A 64-bit transaction id. PostgreSQL compares it; Python only carries it, as text."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


class Name(UserDefinedType[str]):
    """An identifier of PostgreSQL's own, such as a role."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "name"


ischema_names |= {"xid8": XID8, "name": Name}


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "ck": "%(table_name)s_%(constraint_name)s_check",
            "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        }
    )


Timestamp = DateTime(timezone=True)


class Embedding(Base):
    """A document. Each part that a caller can give or leave out has its own hash (see `db.documents`)."""

    __tablename__ = "embeddings"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    source_id: Mapped[str] = mapped_column(Text, server_default="batch", index=True)
    workspace: Mapped[str | None] = mapped_column(Text, index=True)
    text: Mapped[str] = mapped_column(Text)
    text_hash: Mapped[bytes | None] = mapped_column(LargeBinary)
    content_hash: Mapped[bytes | None] = mapped_column(LargeBinary)
    vector_hash: Mapped[bytes | None] = mapped_column(LargeBinary)
    chunks_hash: Mapped[bytes | None] = mapped_column(LargeBinary)
    model_id: Mapped[str | None] = mapped_column(Text)
    embedding: Mapped[Any | None] = mapped_column(VECTOR)
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSONB, server_default=sql("'{}'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())

    __table_args__ = (Index("embeddings_created_at_idx", sql("created_at DESC")),)


class Chunk(Base):
    """A piece of a document. Detached chunks have no `document_id`; `origin_id` tells what it was."""

    __tablename__ = "chunks"

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    document_id: Mapped[str | None] = mapped_column(
        Text, ForeignKey("embeddings.id", ondelete="CASCADE", name="chunks_document_id_fkey")
    )
    origin_id: Mapped[str | None] = mapped_column(Text)
    chunk_index: Mapped[int] = mapped_column(Integer)
    source_id: Mapped[str] = mapped_column(Text, server_default="batch", index=True)
    workspace: Mapped[str | None] = mapped_column(Text, index=True)
    text: Mapped[str] = mapped_column(Text)
    text_hash: Mapped[bytes | None] = mapped_column(LargeBinary)
    embedding: Mapped[Any | None] = mapped_column(VECTOR)
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSONB, server_default=sql("'{}'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())

    __table_args__ = (
        # Also the index for `document_id`, its leading column: a second one would only slow writes.
        UniqueConstraint("document_id", "chunk_index", name="chunks_document_id_chunk_index_key"),
        Index("chunks_detached_idx", "origin_id", postgresql_where=sql("document_id IS NULL")),
    )


class PerformanceMetric(Base):
    """One recorded operation."""

    __tablename__ = "performance_metrics"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    operation: Mapped[str] = mapped_column(Text, index=True)
    duration_ms: Mapped[float] = mapped_column(Double)
    success: Mapped[bool] = mapped_column(server_default=sql("true"))
    error_message: Mapped[str | None] = mapped_column(Text)
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSONB, server_default=sql("'{}'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())

    __table_args__ = (Index("performance_metrics_created_at_idx", sql("created_at DESC")),)


class EmbeddingModel(Base):
    """The registry of embedding models. The active one fixes the dimensions and distance of the store."""

    __tablename__ = "embedding_models"

    model_id: Mapped[str] = mapped_column(Text, primary_key=True)
    dimensions: Mapped[int] = mapped_column(Integer)
    distance: Mapped[str] = mapped_column(Text)
    active: Mapped[bool] = mapped_column(server_default=sql("false"))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    # What `maintain` tuned searches to, and why; None: the setting counts.
    ef_search: Mapped[int | None] = mapped_column(Integer)
    ef_search_reason: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (
        CheckConstraint("dimensions BETWEEN 1 AND 16000", name="dimensions"),
        CheckConstraint("distance IN ('cosine', 'l2', 'inner_product')", name="distance"),
        CheckConstraint("ef_search BETWEEN 1 AND 1000", name="ef_search"),
        Index("embedding_models_one_active_idx", "active", unique=True, postgresql_where=sql("active")),
    )


class CachedVector(Base):
    """A vector that an embedder once returned. `key` is sha256(text ‖ model_id)."""

    __tablename__ = "vector_cache"

    key: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    model_id: Mapped[str] = mapped_column(Text)
    embedding: Mapped[Any] = mapped_column(VECTOR)
    last_used: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class WriteLog(Base):
    """What each write transaction touched. Rows are only inserted, so writers never wait for each other."""

    __tablename__ = "write_log"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    xid: Mapped[str] = mapped_column(XID8, server_default=sql("pg_current_xact_id()"), index=True)
    tags: Mapped[list[str]] = mapped_column(ARRAY(Text))
    delivered_at: Mapped[datetime | None] = mapped_column(Timestamp)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())

    __table_args__ = (Index("write_log_undelivered_idx", "id", postgresql_where=sql("delivered_at IS NULL")),)


class WriteLogWatermark(Base):
    """One row: write_log holds nothing about transactions below `xid` any more."""

    __tablename__ = "write_log_watermark"

    singleton: Mapped[bool] = mapped_column(primary_key=True, server_default=sql("true"))
    xid: Mapped[str] = mapped_column(XID8, server_default=sql("'0'::xid8"))

    __table_args__ = (CheckConstraint("singleton", name="singleton"),)


class IndexBuild(Base):
    """One finished build of a vector index: what later sizes and changes are compared with."""

    __tablename__ = "index_builds"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    index_name: Mapped[str] = mapped_column(Text, index=True)
    table_name: Mapped[str] = mapped_column(Text)
    rows: Mapped[int] = mapped_column(BigInteger)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    duration_ms: Mapped[float] = mapped_column(Double)
    # The table's counter of changes then; NULL for builds before it was kept.
    changes: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class MaintenanceRun(Base):
    """One maintenance run and the outcome of its steps."""

    __tablename__ = "maintenance_runs"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    operation: Mapped[str] = mapped_column(Text)
    success: Mapped[bool]
    details: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=sql("'{}'::jsonb"))
    started_at: Mapped[datetime] = mapped_column(Timestamp)
    finished_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class RecallMeasurement(Base):
    """One measurement of how much of the exact answers the index finds."""

    __tablename__ = "recall_measurements"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    model_id: Mapped[str] = mapped_column(Text)
    level: Mapped[str] = mapped_column(Text)
    filtered: Mapped[bool]
    k: Mapped[int] = mapped_column(Integer)
    sample: Mapped[int] = mapped_column(Integer)
    recall: Mapped[float] = mapped_column(Double)
    recall_low: Mapped[float] = mapped_column(Double)
    recall_high: Mapped[float] = mapped_column(Double)
    target: Mapped[float] = mapped_column(Double)
    ef_search: Mapped[int] = mapped_column(Integer)
    recommended_ef_search: Mapped[int | None] = mapped_column(Integer)
    indexed_ms_p50: Mapped[float] = mapped_column(Double)
    exact_ms_p50: Mapped[float] = mapped_column(Double)
    # Of the stored rows that were looked up, those that the index did not find, and those that nothing can find.
    looked_up: Mapped[int] = mapped_column(Integer)
    unreachable: Mapped[int] = mapped_column(Integer)
    zero_vectors: Mapped[int] = mapped_column(Integer)
    # The table's vectors, as estimated, and its counter of changes: when to measure again.
    rows: Mapped[int] = mapped_column(BigInteger)
    changes: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())

    __table_args__ = (Index("recall_measurements_created_at_idx", sql("created_at DESC")),)


class QuerySample(Base):
    """A vector that was really asked for: recall of stored vectors alone flatters the index."""

    __tablename__ = "query_samples"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    model_id: Mapped[str] = mapped_column(Text)
    level: Mapped[str] = mapped_column(Text)
    embedding: Mapped[Any] = mapped_column(VECTOR)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class IngestionPause(Base):
    """At most one row: ingestion is paused. An owner with a backend is alive as long as that very session is."""

    __tablename__ = "ingestion_pause"

    singleton: Mapped[bool] = mapped_column(primary_key=True, server_default=sql("true"))
    reason: Mapped[str] = mapped_column(Text)
    owner: Mapped[str] = mapped_column(Text)
    owner_pid: Mapped[int | None] = mapped_column(Integer)
    owner_started_at: Mapped[datetime | None] = mapped_column(Timestamp)
    paused_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(Timestamp)

    __table_args__ = (CheckConstraint("singleton", name="singleton"),)


class RebuildRun(Base):
    """One rebuild of the tables, and how far it came. `model_id`: of the new tables, None while none is registered."""

    __tablename__ = "rebuild_runs"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    state: Mapped[str] = mapped_column(Text)
    model_id: Mapped[str | None] = mapped_column(Text)
    details: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=sql("'{}'::jsonb"))
    started_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    finished_at: Mapped[datetime | None] = mapped_column(Timestamp)


class TenantWorkspace(Base):
    """A workspace that the login role `role` may see and change, where row-level security is on (see `db.roles`)."""

    __tablename__ = "tenant_workspaces"

    role: Mapped[str] = mapped_column(Name, primary_key=True)
    workspace: Mapped[str] = mapped_column(Text, primary_key=True)


def vector_index_name(table: str) -> str:
    return f"{table}_vector_idx"


def vector_expression(dimensions: int, distance: Distance, column: str = "embedding") -> str:
    """What the HNSW index of a store is over. Search must order by exactly this expression to use it.

    Cosine vectors are normalised before the cast: small ones would vanish in halfvec's 16 bits.
    """
    normalized = f"l2_normalize({column})" if distance == "cosine" else column
    return f"({normalized}::halfvec({int(dimensions)}))"


def vector_index(table: Table, dimensions: int, distance: Distance) -> Index:
    """The HNSW index of `table` for a model, on a copy of the table: `Base.metadata` stays as it is.

    No `create_all` makes it and no dimension is known before a model is registered.
    """
    operator_class = "halfvec_l2_ops" if distance == "l2" else "halfvec_ip_ops"
    return Index(
        vector_index_name(table.name),
        sql(f"{vector_expression(dimensions, distance)} {operator_class}"),
        postgresql_using="hnsw",
        postgresql_with={"m": 16, "ef_construction": 64},
        postgresql_concurrently=True,
        _table=table.to_metadata(MetaData()),
    )
