"""Clients of Redis: from a URL that a person wrote, with the patience of who asks, and bytes as they are."""

from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .config import is_unambiguous
from .errors import ValidationError

# Values are bytes and are to stay bytes: text would not come back as it was stored.
_REFUSED = ("decode_responses", "encoding", "encoding_errors")


def connect(url: str, *, timeout_s: float, connect_timeout_s: float) -> redis.Redis:
    """A client that tries once, and gives up in time: redis-py's own patience stalled a read for a minute.

    Nothing is connected yet. Timeouts in the URL win. Raises ValidationError where it cannot be read or would change
    values; the message shows nothing of the URL, whose password may be what made it unreadable.
    """
    client = _client(url, timeout_s, connect_timeout_s)
    if client is None:  # raised here, where no other error goes along that would show the URL
        raise ValidationError(
            "redis_url cannot be read; expected redis://user:password@host:port/0, rediss:// (TLS) or unix:///path, "
            "options that redis-py knows, and special characters in each part percent-encoded"
        )
    given = parse_qs(urlsplit(url).query)
    if refused := [name for name in _REFUSED if name in given]:
        raise ValidationError(f"redis_url sets {', '.join(refused)}; take it out: cached values are bytes, not text")
    return client


def _client(url: str, timeout_s: float, connect_timeout_s: float) -> redis.Redis | None:
    if not is_unambiguous(url.partition("://")[2]):
        return None
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=connect_timeout_s,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
            health_check_interval=0,
        )
        # Else an option that does not exist would be found by the first write, after its commit.
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (ValueError, TypeError, redis.RedisError):
        return None
    return client
