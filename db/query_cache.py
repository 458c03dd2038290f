"""Search results in Redis, served again only while they are still true.

A cached result carries the snapshot it was computed in and the one tag it depends on. In strict mode it
is valid only if `write_log` holds no write with that tag that the snapshot did not see, nothing that the
snapshot might have missed was pruned, and the store still lives the life that the answer was computed in:
one statement asks all three, so whatever happens to Redis, and wherever a writer dies, no answer is older
than an acknowledged write. In bounded mode the database is not
asked: every write changes the tag's generation in Redis, and no answer is served beyond `bounded_ttl_s`. Its age
goes by the clock of Redis, from before it was computed: what it has left of its expiry says nothing, since a Redis
that stood still takes a SET long after it was sent. Where that clock is set back, answers may be so much older.

Generations are random tokens, not counters: one that Redis evicted or lost never comes back by counting.
"""

import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import orjson
import redis
from psycopg import errors as pg
from psycopg import sql

from . import redis_client
from .circuit_breaker import CircuitBreaker
from .config import Settings
from .engine import BACKGROUND_WAIT_S, LIFE, Database, Identity, StoreConnection
from .transactions import EVERYTHING, LoggedWrite
from .types import Hit, SearchResult

logger = logging.getLogger("vectorkeep")

# What a cached value looks like. Part of its key: another version's values are never read.
_FORMAT = 2
_DIGEST_BYTES = 32

# A hit that is so many transactions old is stored again as of now.
_RENEWED_BEHIND = 1000
_NOW = sql.SQL("""
    pg_current_snapshot()::text,
    pg_snapshot_xmin(pg_current_snapshot())::text::bigint - pg_snapshot_xmin(%(snapshot)s::pg_snapshot)::text::bigint
""")

# ORDER BY ... LIMIT 1 and not EXISTS: a prepared EXISTS is planned as a scan of the whole log.
_STILL_TRUE = (
    sql.SQL("""
    SELECT {life},
           pg_snapshot_xmin(%(snapshot)s::pg_snapshot) >= (SELECT xid FROM write_log_watermark)
           AND (SELECT xid FROM write_log
                WHERE xid >= pg_snapshot_xmin(%(snapshot)s::pg_snapshot)
                  AND tags && %(tags)s
                  AND NOT pg_visible_in_snapshot(xid, %(snapshot)s::pg_snapshot)
                ORDER BY xid LIMIT 1) IS NULL, {now}
""")
    .format(life=LIFE, now=_NOW)
    .as_string()
    .encode()
)

# For tenants, who may not read the log.
_STILL_TRUE_ASKED = (
    sql.SQL("SELECT {life}, vectorkeep_still_true(%(snapshot)s::pg_snapshot, %(tags)s), {now}")
    .format(life=LIFE, now=_NOW)
    .as_string()
    .encode()
)

# What a process delivered it marks within some seconds: only what is older was left by one that could not.
_LEFT_AFTER_S = 5.0
_UNDELIVERED = """
    SELECT id, tags FROM write_log
    WHERE delivered_at IS NULL AND created_at < clock_timestamp() - make_interval(secs => %s)
    ORDER BY id LIMIT 500
    FOR UPDATE SKIP LOCKED
"""
# With them what triggers logged of the same transactions, as far as the same was told.
_DELIVERED = """
    UPDATE write_log SET delivered_at = clock_timestamp()
    FROM write_log AS told
    WHERE told.id = ANY(%s) AND write_log.xid = told.xid AND write_log.tags <@ told.tags
"""


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What a search asks, and the tag that its answer depends on."""

    question: Sequence[Any]
    tag: str

    def text(self, identity: Identity) -> str:
        return orjson.dumps([_FORMAT, identity.life, *self.question]).decode()


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an answer is to be stored: the place, and the life, generations and time before it was computed.

    opened: by the clock of Redis, in seconds.
    """

    name: str
    key: str
    life: str
    generations: list[str]
    opened: float


class QueryCache:
    """The cache of one store. Every method does without Redis where Redis does not answer."""

    def __init__(self, database: Database, client: redis.Redis, settings: Settings) -> None:
        self.client = client
        self._database = database
        self._ttl_s = settings.cache_ttl_s
        self._bounded_ttl_s = settings.bounded_ttl_s
        self.breaker = CircuitBreaker()

    @staticmethod
    def connect(url: str, settings: Settings) -> redis.Redis:
        """The client of a cache: it waits no longer than a search may."""
        return redis_client.connect(
            url,
            timeout_s=settings.redis_timeout_ms / 1000,
            connect_timeout_s=settings.redis_connect_timeout_ms / 1000,
        )

    def look_up_bounded(self, key: CacheKey) -> tuple[SearchResult | None, Slot | None]:
        """A result of this generation and not older than the bound, or where to store a new one."""
        if self._database.identity is None:
            return None, None
        value, slot = self._read(key, self._database.identity)
        # An age below 0: the answer was stored before that clock was set back.
        if value is None or slot is None or not 0 <= slot.opened - value["opened"] <= self._bounded_ttl_s:
            return None, slot
        return _result(value), slot

    def look_up_strict(self, key: CacheKey, connection: StoreConnection) -> tuple[SearchResult | None, Slot | None]:
        """A result that no write has made wrong, or where to store a new one."""
        value, slot = self._read(key, connection.identity)
        if value is None:
            return None, slot
        parameters = {"snapshot": value["snapshot"], "tags": [key.tag, EVERYTHING]}
        statement = _STILL_TRUE if connection.identity.reads_log else _STILL_TRUE_ASKED
        try:
            [(life, still_true, now, behind)] = connection.execute(statement, parameters).fetchall()
        except pg.InsufficientPrivilege:  # revoked since this connection was opened
            life, still_true, now, behind = None, False, "", 0
        if life != connection.identity.life:
            self._database.identify(connection)
            return None, None
        if not still_true:
            return None, slot
        if slot is not None and behind > _RENEWED_BEHIND:
            self._renew(slot, value, now)
        return _result(value), slot

    def _renew(self, slot: Slot, value: Mapping[str, Any], snapshot: str) -> None:
        """Note that `value` was still true in the younger `snapshot`, which saw all writes that it was asked about.

        Else each hit would look at all writes since it was computed: 15 ms where those are 100,000.
        """
        with self.breaker.guard():
            self.client.set(slot.name, _encode({**value, "snapshot": snapshot}), xx=True, keepttl=True)

    def store(self, slot: Slot, result: SearchResult, snapshot: str) -> None:
        """Keep `result`, computed in `snapshot`, in the slot that its look-up gave.

        Not one that is incomplete: it ran out of time, and the next may have more, or an index that serves its filter.
        """
        if not result.complete:
            return
        if not all(math.isfinite(hit.distance) for hit in result) or not self.breaker.closed:
            return  # JSON has no infinity
        try:
            value = _encode(
                {
                    "key": slot.key,
                    "generations": slot.generations,
                    "snapshot": snapshot,
                    "opened": slot.opened,
                    "hits": [asdict(hit) for hit in result],
                    "complete": result.complete,
                    "exact": result.exact,
                }
            )
        except (orjson.JSONEncodeError, RecursionError):  # metadata that others stored, nested too deep for it
            return
        with self.breaker.guard():
            self.client.set(slot.name, value, ex=self._ttl_s)

    def invalidate(self, tags: Sequence[str]) -> bool:
        """Start a new generation of each tag. False where Redis did not take it: to be delivered later."""
        identity = self._database.identity
        if identity is None or not self.breaker.closed:
            return False
        with self.breaker.guard():
            pipeline = self.client.pipeline(transaction=False)
            for tag in tags:
                pipeline.set(_generation_name(identity, tag), secrets.token_hex(8), ex=2 * self._ttl_s)
            pipeline.execute()
            return True
        return False

    def deliver(self, write: LoggedWrite) -> bool:
        return self.invalidate(write.tags)

    def mark_delivered(self, write_ids: Sequence[int]) -> None:
        """Note that these were delivered; where this role may not, another one's process delivers them again."""
        with (
            suppress(pg.InsufficientPrivilege),
            self._database.connection(BACKGROUND_WAIT_S) as connection,
            connection.transaction(),
        ):
            connection.execute("SET LOCAL synchronous_commit = off")  # a mark lost is only delivered again
            connection.execute(_DELIVERED, (list(write_ids),))

    def deliver_undelivered(self) -> int:
        """Deliver the writes whose own process did not. Returns how many were delivered; 0 where this role may not."""
        with (
            suppress(pg.InsufficientPrivilege),
            self._database.connection(BACKGROUND_WAIT_S) as connection,
            connection.transaction(),
        ):
            rows = connection.execute(_UNDELIVERED, (_LEFT_AFTER_S,)).fetchall()
            tags = sorted({tag for _, write_tags in rows for tag in write_tags})
            if not rows or not self.invalidate(tags):
                return 0
            connection.execute(_DELIVERED, ([row[0] for row in rows],))
            return len(rows)
        return 0

    def _read(self, key: CacheKey, identity: Identity) -> tuple[Mapping[str, Any] | None, Slot | None]:
        if not identity.cacheable or not self.breaker.closed:
            return None, None
        text = key.text(identity)
        name = f"vectorkeep:{identity.store}:q:{sha256(text.encode()).hexdigest()}"
        names = [_generation_name(identity, tag) for tag in (key.tag, EVERYTHING)]
        with self.breaker.guard():
            pipeline = self.client.pipeline(transaction=False)
            pipeline.mget([name, *names])
            pipeline.time()
            (raw, *tokens), (seconds, microseconds) = pipeline.execute()
            now = seconds + microseconds / 1e6
            generations = [
                _token(token) if token else self._begin_generation(n) for n, token in zip(names, tokens, strict=True)
            ]
            value = _decode(raw, text, generations)
            return value, Slot(name, text, identity.life, generations, now)
        return None, None

    def _begin_generation(self, name: str) -> str:
        """The generation that is there now, a new one where there is none.

        In two commands: SET takes NX and GET together from Redis 7.0 on. One that changed in between is the newer one;
        where it is gone already, the answer goes by a token that nobody else has, and is never found.
        """
        token = secrets.token_hex(8)
        pipeline = self.client.pipeline(transaction=False)
        pipeline.set(name, token, ex=2 * self._ttl_s, nx=True)
        pipeline.mget([name])  # not GET: users of Redis were given the rights of docs/roles.md
        _, [present] = pipeline.execute()
        return _token(present) if isinstance(present, bytes) else token


def _generation_name(identity: Identity, tag: str) -> str:
    return f"vectorkeep:{identity.store}:g:{tag}"


def _token(raw: bytes) -> str:
    return raw.decode("latin-1")  # ours are ASCII; whatever else lies there is no reason to fail


def _encode(value: Mapping[str, Any]) -> bytes:
    data = orjson.dumps(value)
    return sha256(data).digest() + data


def decoded(raw: bytes | None) -> dict[str, Any] | None:
    """What was stored, whole and unchanged, else None."""
    if raw is None:
        return None
    digest, data = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if sha256(data).digest() != digest:
        logger.warning("cache.unreadable_value", extra={"bytes": len(raw)})
        return None
    value: dict[str, Any] = orjson.loads(data)
    return value


def _decode(raw: bytes | None, key: str, generations: list[str]) -> dict[str, Any] | None:
    """The stored value where it answers exactly `key` in these generations."""
    value = decoded(raw)
    if value is None or value["key"] != key or value["generations"] != generations:
        return None
    return value


def _result(value: Mapping[str, Any]) -> SearchResult:
    hits = tuple(Hit(**hit) for hit in value["hits"])
    return SearchResult(hits=hits, complete=value["complete"], cached=True, exact=value["exact"])
