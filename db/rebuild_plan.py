"""What a rebuild is to do, and what it has done."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import Settings
from .embedding_model import Model
from .errors import SchemaError, ValidationError
from .types import Embedder, Item, StepProgress

Items = Iterable[Item | Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RebuildPlan:
    """What to make the tables from.

    sources: a source's id, and what gives all its items anew; the rows of sources not named come from the store.
    new_model: whether the vectors of all texts are made anew, by the embedder. min_overlap: the share of nearest
    neighbours that the new model must have in common with the old one. min_recall: what the new indexes must find;
    None: hardly less than the old ones. swap_wait_s: how long to wait for the tables at the end.
    """

    sources: Mapping[str, Callable[[], Items]] = field(default_factory=dict)
    new_model: bool = False
    min_overlap: float = 0.0
    min_recall: float | None = None
    swap_wait_s: float = 60.0
    on_progress: StepProgress | None = None


@dataclass(frozen=True, slots=True)
class RebuildResult:
    """What was done. Recall and overlap are shares, None where there was nothing to measure."""

    documents: int
    chunks: int
    copied: int  # documents whose rows came from the store
    ingested: int  # documents that came from sources
    embedded: int  # texts sent to the embedder
    cache_hits: int
    model_id: str | None
    dimensions: int | None
    recall: float | None
    recall_before: float | None
    overlap: float | None
    paused_s: float
    swap_ms: float
    duration_ms: float
    details: list[str]


def target_model(live: Model | None, plan: RebuildPlan, embedder: Embedder | None, settings: Settings) -> Model | None:
    """The model of the new tables. Raises ValidationError, SchemaError where the embedder is missing or another's."""
    if embedder is None:
        if plan.new_model or plan.sources:
            raise ValidationError("an embedder is needed to embed texts; give one")
        return live
    wanted = Model(embedder.model_id, embedder.dimensions, live.distance if live else settings.distance)
    if wanted == live:
        return live  # with what searches were tuned to
    if not plan.new_model and live is not None:
        raise SchemaError(
            f"the embedder is {wanted.model_id!r} of {wanted.dimensions} dimensions, the store's model is "
            f"{live.model_id!r} of {live.dimensions}; to move the store to it run 'vectorkeep rebuild --model'"
        )
    return wanted
