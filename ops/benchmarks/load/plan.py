"""What a run under load is: how many work, on how many rows, for how long, with which servers."""

from dataclasses import dataclass, field

from ..rows import SyntheticVectors, TextVectors, Vectors


@dataclass(frozen=True)
class LoadPlan:
    """One run. writers, readers: threads in each process, which share one store. rows: stored before it begins.

    dimensions: of synthetic vectors; None for real text vectors. redis_url: None for no cache.
    """

    processes: int
    writers: int
    readers: int
    seconds: float
    rows: int
    dimensions: int | None
    redis_url: str | None = field(default=None, repr=False)

    @property
    def threads(self) -> int:
        """Threads in one process that call the store."""
        return self.writers + self.readers

    def vectors(self) -> Vectors:
        """Raises ValidationError where WordLlama is needed and not installed."""
        return TextVectors() if self.dimensions is None else SyntheticVectors(self.dimensions)
