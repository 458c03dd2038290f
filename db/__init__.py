"""vectorkeep: a data layer for embeddings on PostgreSQL and pgvector.

Open a store with `connect`; everything else is a method of it.
"""

from .embedder import CallableEmbedder, WordLlamaEmbedder
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
    "PausedError",
    "Performance",
    "PermissionDeniedError",
    "SchemaError",
    "SearchResult",
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
