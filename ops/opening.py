"""How the commands open a store, and what they embed texts with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import db
from db import embedded
from db.config import Settings, redacted
from db.embedder import configured_embedder

from .command import Common

DEFAULT_EMBEDDER = "wordllama"


def open_store(options: Common, **settings: Any) -> db.VectorStore:
    """The store that the command line and the environment name. A person does not wait for maintenance at its end."""
    settings.setdefault("maintenance_on_close", False)
    if options.database_url is not None:
        # The environment's direct connection may be one to another database.
        settings.setdefault("maintenance_url", None)
    return db.connect(options.database_url, redis_url(options), **settings)


def redis_url(options: Common) -> str | Literal[False] | None:
    return False if options.redis_url in ("none", "") else options.redis_url


@contextmanager
def target_url(options: Common) -> Iterator[str]:
    """The URL of the database that the command line and the environment name; the embedded one is started."""
    settings = Settings.load({} if options.database_url is None else {"database_url": options.database_url})
    # Locks and index builds need a direct connection. The environment's may be one to another database.
    direct = settings.direct_url() if options.database_url is None else None
    url = direct or settings.postgres_url()
    if url is not None:
        with tried(redacted(url)):
            yield url
        return
    servers = embedded.acquire(settings.home, settings=settings.embedded_settings, redis=False)
    try:
        yield servers.database_url
    finally:
        servers.release()


@contextmanager
def tried(place: str) -> Iterator[None]:
    """What cannot be reached inside is at `place`, and not where the settings say: the command names it."""
    try:
        yield
    except db.UnavailableError as exc:
        exc.add_note(place)
        raise


def text_embedder(store: db.VectorStore) -> db.Embedder:
    """What the commands embed texts with. Raises ValidationError where the store's vectors are of another model."""
    model = store.model
    embedder = configured_embedder()
    if model is not None and model.model_id != embedder.model_id:
        raise db.ValidationError(
            f"the store's model is {model.model_id!r} ({model.dimensions} dimensions), and this command embeds texts "
            f"only with {embedder.model_id!r}; name another by VECTORKEEP_OPENAI_MODEL, ingest JSONL that has the "
            "vectors ('embedding'), or use the library: "
            "db.connect(embedder=db.CallableEmbedder(function, model_id, dimensions))"
        )
    return embedder
