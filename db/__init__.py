"""vectorkeep: a data layer for embeddings on PostgreSQL and pgvector.

Open a store with `connect`; everything else is a method of it.
"""

from .embedder import CallableEmbedder, SentenceTransformersEmbedder, WordLlamaEmbedder
from .errors import (
    BusyError,
    ClosedError,
    DimensionError,
    MaintenanceIncomplete,
    PausedError,
    PermissionDeniedError,
    SchemaError,
    UnavailableError,
    ValidationError,
    VectorKeepError,
)
from .openai_embedder import OpenAIEmbedder
from .store import VectorStore, connect
from .types import (
    CleanupResult,
    DeleteResult,
    Diagnostics,
    Document,
    DocumentChunk,
    Embedder,
    EmbedResult,
    Hit,
    IndexReport,
    Item,
    MaintenanceResult,
    Performance,
    SearchResult,
    Statistics,
    Step,
    StoredHash,
    UpsertResult,
)

__all__ = [
    "BusyError",
    "CallableEmbedder",
    "CleanupResult",
    "ClosedError",
    "DeleteResult",
    "Diagnostics",
    "DimensionError",
    "Document",
    "DocumentChunk",
    "EmbedResult",
    "Embedder",
    "Hit",
    "IndexReport",
    "Item",
    "MaintenanceIncomplete",
    "MaintenanceResult",
    "OpenAIEmbedder",
    "PausedError",
    "Performance",
    "PermissionDeniedError",
    "SchemaError",
    "SearchResult",
    "SentenceTransformersEmbedder",
    "Statistics",
    "Step",
    "StoredHash",
    "UnavailableError",
    "UpsertResult",
    "ValidationError",
    "VectorKeepError",
    "VectorStore",
    "WordLlamaEmbedder",
    "connect",
]
