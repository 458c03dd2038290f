"""What callers give to a store and what they get back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol, overload

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32] | Sequence[float]
Level = Literal["documents", "chunks"]
Progress = Callable[[int, int | None], None]
StepProgress = Callable[[str, str | None], None]
Health = Literal["healthy", "degraded", "critical"]
FindingStatus = Literal["ok", "warn", "fail"]

_ABSENT: Any = object()


@dataclass(frozen=True, slots=True)
class DocumentChunk:
    """A piece of a document. `id` and `index` are given by the store and filled in when read back."""

    text: str
    embedding: Vector | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    index: int = 0


@dataclass(frozen=True)
class Document:
    """A text with its vector, metadata and chunks, identified by `id` alone.

    What is absent stays as it is stored: an `embedding` that is not given, `chunks` that are None.
    What is given empty is removed: `embedding=None`, `chunks=()`. `metadata["workspace"]`, a string,
    is the document's workspace. `created_at` and `updated_at` are the time of the write where absent.
    """

    id: str
    text: str
    embedding: Vector | None = _ABSENT
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source_id: str = "batch"
    chunks: Sequence[DocumentChunk | Mapping[str, Any]] | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    # Follows from `embedding`; a field so that `dataclasses.replace` hands it on and does not remove a vector.
    embedding_given: bool | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        absent = self.embedding is _ABSENT
        given = not absent if self.embedding_given is None else self.embedding_given
        object.__setattr__(self, "embedding", None if absent else self.embedding)
        object.__setattr__(self, "embedding_given", given or self.embedding is not None)


@dataclass(frozen=True, slots=True)
class Item:
    """A text to be embedded and stored by `embed_batch` or `sync`."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source_id: str = "batch"


class Embedder(Protocol):
    """Turns texts into vectors. `model_id` names the model for good: other vectors, other name."""

    model_id: str
    dimensions: int

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of `texts`, float32, shape (len(texts), dimensions)."""
        ...


@dataclass(frozen=True, slots=True)
class UpsertResult:
    """Counts of a `batch_upsert`. Every input counts in exactly one of the five.

    `superseded` inputs were followed by a later valid one of the same id, with no more than 50,000 other ids between
    them: beyond that both count by what they did. `errors` holds (id, reason) of each failed one.
    """

    inserted: int
    updated: int
    unchanged: int
    superseded: int
    failed: int
    errors: list[tuple[str, str]]
    duration_ms: float


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """Counts of an `embed_batch` or a `sync`.

    Of the texts whose vectors were needed, `embedded` were sent to the embedder and `cache_hits` were known:
    to the vector cache, or to a chunk stored of the same documents.
    """

    inserted: int
    updated: int
    skipped: int
    deleted: int
    superseded: int
    failed: int
    errors: list[tuple[str, str]]
    cache_hits: int
    embedded: int
    duration_ms: float


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """What a deletion did: documents deleted, chunks removed with them, chunks kept but detached."""

    deleted: int
    chunks_removed: int
    chunks_detached: int


@dataclass(frozen=True, slots=True)
class CleanupResult:
    """What `cleanup_orphaned` found and did. `details` holds one sentence a step.

    `vacuumed` is False, and `details` says why, where the role may not VACUUM.
    """

    orphaned_chunks: int
    orphaned_embeddings: int
    cleaned: bool
    reclaimed_bytes: int
    vacuumed: bool
    details: list[str]


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result. `score` is 1 − cosine distance, −distance for L2, the product for inner product."""

    id: str
    document_id: str
    source_id: str
    text: str
    metadata: Mapping[str, Any]
    distance: float
    score: float


@dataclass(frozen=True, slots=True)
class SearchResult(Sequence[Hit]):
    """The hits of a search, nearest first.

    complete: False where more, and nearer, ones may exist: few rows pass the filter, and comparing all of those took
        longer than `statement_timeout_s`.
    cached: the answer came from the cache, and was checked to be still true.
    exact: every row that passes the filter was compared.
    """

    hits: tuple[Hit, ...]
    complete: bool
    cached: bool
    exact: bool

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Hit]: ...
    def __getitem__(self, index: int | slice) -> Hit | Sequence[Hit]:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """An index build that runs now. percent and eta_s are of its present phase, None where that is unknown.

    phase: "not told" of a build that the role may not see; it may be of another index.
    """

    phase: str
    percent: float | None
    eta_s: float | None
    pid: int


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an index is not healthy: the rule that says so, what was seen, and the remedy as command and as SQL."""

    rule: str
    verdict: Health
    evidence: str
    command: str
    sql: str

    def __str__(self) -> str:
        return f"{self.evidence}; run '{self.command}', or in SQL: {self.sql}"


@dataclass(frozen=True, slots=True)
class IndexReport:
    """The state of one vector index, with the reasons of its verdict.

    unindexed_rows: rows with a vector that the index does not hold. stale_percent: dead rows that the index
    still holds, in per cent of all that it holds. used: None where the server cannot tell. recall: None until
    measured since the last build.

    ready: writes reach it. building: the build or rebuild that runs now. bytes_per_row and, after the last
    build over rows, bytes_per_row_built; bloat is their ratio. changes_since_build: rows inserted, updated
    beyond HOT, and deleted since; None where a crash or a reset of the counters hides it. last_used: None also
    where the counters were reset since. planned, planned_generic: whether the store's own query uses it, planned
    for its values and for any; None where the table is too small to tell. duplicates: indexes of the table that
    another one makes needless. shared_buffers_share: its size in parts of shared_buffers; hit_rate: of its
    pages that were asked for, those found there. recall_interval, recall_target, recall_ef_search,
    recall_measured_at, unreachable, looked_up, zero_vectors: of the measurement that `recall` is from.

    estimated: the table is too large to be counted; the numbers of rows, and what is reckoned from them, are as the
    server estimates them.
    """

    name: str
    table: str
    valid: bool
    size_bytes: int
    indexed_rows: int
    unindexed_rows: int
    stale_percent: float
    needs_rebuild: bool
    used: bool | None
    recall: float | None
    verdict: Health
    reasons: list[str]
    findings: list[Reason]
    exists: bool
    ready: bool
    building: BuildProgress | None
    rows_without_vector: int
    dead_rows: int
    bytes_per_row: float | None
    bytes_per_row_built: float | None
    bloat: float | None
    changes_since_build: int | None
    built_at: datetime | None
    last_used: datetime | None
    operator_class: str | None
    planned: bool | None
    planned_generic: bool | None
    duplicates: list[str]
    shared_buffers_share: float
    hit_rate: float | None
    recall_interval: tuple[float, float] | None
    recall_target: float | None
    recall_ef_search: int | None
    recall_measured_at: datetime | None
    looked_up: int | None
    unreachable: int | None
    zero_vectors: int | None
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class RecallReport:
    """How much of the exact answers the store's own searches find: recall@k over `sample` queries.

    interval: of 95 % confidence. ef_search: what was searched with. recommended_ef_search: the lowest that meets
    `target`, None where none does. The times are of whole searches, in milliseconds; the queried row itself is
    left out of both answers.

    level: what was searched. queries_from_store, queries_from_searches: where the queries came from.
    through_index: of them, those that the index served; the others compared all rows, as a user's would have.
    looked_up: stored rows that were asked for by their own vector through the index; unreachable: of them, those
    that it did not find with any ef_search. zero_vectors: sampled rows that no search can find, whose vector has
    no direction. recall_by_ef_search: what was measured on the way. notes: what a reader of the figures must know.
    """

    recall: float
    interval: tuple[float, float]
    k: int
    sample: int
    ef_search: int
    recommended_ef_search: int | None
    indexed_ms_p50: float
    exact_ms_p50: float
    level: Level
    target: float
    queries_from_store: int
    queries_from_searches: int
    through_index: int
    looked_up: int
    unreachable: int
    zero_vectors: int
    recall_by_ef_search: Mapping[int, float]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Performance:
    """Means and percentiles in milliseconds over the recorded operations of the last seven days, the newest 100,000."""

    avg_search_ms: float
    avg_insert_ms: float
    cache_hit_rate: float
    percentiles: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts, storage, health and performance.

    A workspace limits documents, chunks and sources; storage, health and performance are the store's.

    estimated: those of "documents" and "chunks" that are the server's estimate, as of the last VACUUM or ANALYZE: their
    table is too large to be counted.
    """

    documents: int
    chunks: int
    sources: list[str]
    storage_mb: float
    index_health: Health
    indexes: list[IndexReport]
    performance: Performance
    reasons: list[str]
    estimated: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What a bug report needs.

    revision: of the database's schema. location: the database URL without its password. index: of the documents; it
    says itself whether it exists, and is None before a model is registered. estimated: `total_rows` is the server's
    estimate, the table is too large to be counted.
    """

    total_rows: int
    revision: str
    location: str
    index: IndexReport | None
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a maintenance run."""

    name: str
    outcome: Literal["done", "skipped", "failed", "not permitted", "not reached"]
    details: str
    duration_ms: float


@dataclass(frozen=True, slots=True)
class MaintenanceResult:
    """What a maintenance run did, step by step."""

    steps: list[Step]
    index_rebuilt: bool
    index: IndexReport | None
    bytes_removed: int
    rows_removed: int
    duration_ms: float


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check of the doctor saw. `remedy` is the command or SQL to run, empty where nothing is wrong.

    fixed: the fault was found and mended in this run; `status` tells how it is now.
    """

    check: str
    status: FindingStatus
    evidence: str
    remedy: str
    fixed: bool


@dataclass(frozen=True, slots=True)
class StoredHash:
    """The hashes of one stored document and of its chunks in order, SHA-256."""

    id: str
    source_id: str
    text_hash: bytes
    chunk_hashes: tuple[bytes, ...]
