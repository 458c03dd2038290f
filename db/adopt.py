"""Adoption: plain tables that somebody made by hand become a store, and no row is lost.

The tables are brought to the shape of the first revision in one transaction, in which nobody else can use
them; a failure leaves everything as it was. From there the migrations do what they do for everybody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import Connection

from .adopt_tables import Adoption
from .config import Distance, Settings, libpq_url, session_conninfo
from .errors import SchemaError, ValidationError, breaks_a_rule, translated, words_of
from .migrate import upgrade
from .migration_session import BlockerWatch, explained

__all__ = ["AdoptResult", "adopt"]


@dataclass(frozen=True, slots=True)
class AdoptResult:
    """What was adopted: rows, the registered model, and one sentence for each thing that was changed."""

    documents: int
    chunks: int
    dimensions: int
    model_id: str
    details: list[str]


def adopt(url: str, *, model_id: str, dimensions: int | None = None, distance: Distance = "cosine") -> AdoptResult:
    """Make the tables `embeddings` and `chunks`, made by hand, a store at head with `model_id` registered.

    `dimensions` may be left out where there are vectors, or a typed vector column, to tell. Columns that
    the store does not know, and indexes on them, stay as they are. Needs the tables' owner, and locks
    everybody else out while it rewrites them.

    Raises SchemaError where the tables are none that can be adopted, ValidationError where `dimensions`
    are not known or not those of the vectors, BusyError where somebody uses the tables: nothing was
    changed then.
    """
    from .registry import register_model

    if not model_id:
        raise ValidationError("model_id is empty; give the name of the model that made the vectors")
    url = libpq_url(url)
    settings = Settings()
    with (
        translated(),
        psycopg.connect(session_conninfo(url, settings, maintenance=True)) as connection,
        BlockerWatch(url, settings, connection.info.backend_pid) as watch,
    ):
        adoption = Adoption(connection, model_id, dimensions, distance)
        try:
            with connection.transaction():
                adoption.run(lock_timeout_s=settings.lock_timeout_s)
        except psycopg.Error as exc:
            raise _refused(exc, connection, settings.lock_timeout_s, watch.seen) from exc
    upgrade(url, lock_timeout_s=settings.lock_timeout_s)
    register_model(url, model_id, adoption.dimensions, distance)
    adoption.details.append(f"migrated to head, model {model_id!r} registered")
    return AdoptResult(adoption.documents, adoption.chunks, adoption.dimensions, model_id, adoption.details)


def _refused(exc: psycopg.Error, connection: Connection[Any], lock_timeout_s: float, blockers: str) -> Exception:
    def fetch(query: str) -> Sequence[Any]:
        return connection.execute(query.encode()).fetchone() or ()

    # In tables that nobody else can use, what breaks a rule was there before: to try again would not help.
    if not breaks_a_rule(exc) and (ours := explained(exc, fetch, lock_timeout_s=lock_timeout_s, blockers=blockers)):
        return ours
    return SchemaError(f"the tables cannot be adopted as they are: {words_of(exc)}; nothing was changed")
