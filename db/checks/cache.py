"""Redis and the cached answers in it. Its faults cost time, not truth, unless an answer differs from the database."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import redis

from ..embedding_model import Model
from ..engine import StoreConnection
from ..errors import ValidationError
from ..filters import Filter
from ..query_cache import QueryCache, decoded
from ..reading import cache_key
from ..search import Query, Searcher
from ..types import SearchResult
from .base import Examination, Found, Needs, age, check, fail, megabytes, ok, warn

logger = logging.getLogger("vectorkeep")

_NO_CACHE = "no cache is configured"
# A sample, and never more than so many rounds through Redis for it.
_SAMPLE = 20
_SCANS_AT_MOST = 50
_KEYS_A_SCAN = 200
# An answer that another process replaced while the database was asked is looked at once more.
_ATTEMPTS = 2


@check("redis", Needs.NOTHING, "Redis or Valkey is reachable")
def redis_reachable(examination: Examination) -> Iterator[Found]:
    if (client := examination.redis) is None:
        if examination.redis_trouble:
            yield warn(examination.redis_trouble, "expected redis://, rediss:// or unix://")
        else:
            yield ok(_NO_CACHE)
        return
    try:
        info: Mapping[str, Any] = client.info("server")
    except redis.RedisError as exc:
        yield warn(
            f"Redis does not answer: {exc}; searches are right, but none is served from the cache",
            "start it, or correct VECTORKEEP_REDIS_URL ('none' for no cache)",
        )
        return
    version = info.get("valkey_version") or info.get("redis_version", "of unknown version")
    yield ok(f"{'Valkey' if 'valkey_version' in info else 'Redis'} {version}, up for {age(info['uptime_in_seconds'])}")


@check(
    "redis persistence", Needs.NOTHING, "Redis saves nothing that it would bring back old, and can save what it must"
)
def redis_persistence(examination: Examination) -> Iterator[Found]:
    if (client := examination.redis) is None:
        yield ok(_NO_CACHE)
        return
    yield judge_persistence(client.info("persistence"), _save_points(client), examination.settings.consistency)


def _save_points(client: redis.Redis) -> str:
    try:
        return str(client.config_get("save").get("save", ""))
    except redis.ResponseError:  # hosted ones do not tell
        return ""


def judge_persistence(info: Mapping[str, Any], save_points: str, consistency: str) -> Found:
    """What Redis's INFO persistence and its save points mean for a cache."""
    append_only = bool(info.get("aof_enabled"))
    saved = f"save {save_points!r}, append-only file {'on' if append_only else 'off'}"
    if info.get("rdb_last_bgsave_status", "ok") != "ok" or info.get("aof_last_write_status", "ok") != "ok":
        return warn(
            f"Redis could not save to its disk ({saved}) and may refuse every write until it can",
            "make room on its disk, or switch saving off: redis-cli CONFIG SET save ''",
        )
    if consistency == "bounded" and save_points and not append_only:
        return warn(
            f"Redis saves snapshots ({saved}): restarted from one, it serves answers from before it, up to the bound",
            "redis-cli CONFIG SET save '', or consistency strict",
        )
    return ok(f"{saved}; a cache needs neither")


@check("redis memory", Needs.NOTHING, "Redis has a memory limit, and evicts at it")
def redis_memory(examination: Examination) -> Iterator[Found]:
    if (client := examination.redis) is None:
        yield ok(_NO_CACHE)
        return
    yield judge_memory(client.info("memory"))


def judge_memory(info: Mapping[str, Any]) -> Found:
    """What Redis's INFO memory means for a cache."""
    used, most, policy = info["used_memory"], info.get("maxmemory", 0), info.get("maxmemory_policy", "unknown")
    remedy = "redis-cli CONFIG SET maxmemory-policy allkeys-lru"
    if most and policy == "noeviction":
        return warn(
            f"{megabytes(used)} of {megabytes(most)} used, policy noeviction: when it is full it takes no invalidation",
            remedy,
        )
    if not most:
        return warn(
            f"{megabytes(used)} used, no limit, policy {policy}: it grows until the machine has no memory left",
            f"redis-cli CONFIG SET maxmemory 256mb; {remedy}",
        )
    return ok(f"{megabytes(used)} of {megabytes(most)} used, policy {policy}")


@check(
    "invalidations",
    Needs.SCHEMA,
    "every write was told to Redis",
    fix="delivers them",
    fine="no write waits to be told to Redis",
)
def invalidations(examination: Examination) -> Iterator[Found]:
    if (cache := examination.cache) is None:
        yield ok(_NO_CACHE)
        return
    [(count, oldest_s)] = examination.rows(
        """
        SELECT count(*), extract(epoch FROM clock_timestamp() - min(created_at))::float8 FROM write_log
        WHERE delivered_at IS NULL AND created_at < clock_timestamp() - make_interval(secs => %s)
        """,
        examination.limits.undelivered_s,
    )
    if count:
        yield warn(
            f"{count} writes were never told to Redis, the oldest {age(oldest_s)} ago: bounded searches may serve "
            "answers from before them, up to the bound",
            "vectorkeep doctor --fix",
            mend=lambda: _deliver(cache),
        )


def _deliver(cache: QueryCache) -> str:
    delivered = 0
    while batch := cache.deliver_undelivered():
        delivered += batch
    return f"{delivered} delivered"


@dataclass(frozen=True, slots=True)
class _Cached:
    """An answer in Redis: where it lies, and the key that it says it answers."""

    name: str
    key: str


@check(
    "cached answers",
    Needs.SCHEMA,
    f"up to {_SAMPLE} cached answers that would be served are what the database answers",
    fix="removes from Redis those that differ",
)
def cached_answers(examination: Examination) -> Iterator[Found]:
    model, cache = examination.model, examination.cache
    if cache is None or model is None:
        yield ok(_NO_CACHE if cache is None else "nothing to compare")
        return
    compared = 0
    with examination.database.connection() as connection:
        for cached in _sample(cache, connection.identity.store):
            same = _is_right(cache, connection, model, cached)
            if same is None:
                continue
            compared += 1
            if not same:

                def mend(name: str = cached.name) -> str:
                    return f"removed {cache.client.delete(name)} answer"

                yield fail(
                    f"the cached answer {cached.name} differs from what the database answers",
                    "vectorkeep doctor --fix; then find out who else writes to that Redis, and whether SQL of your "
                    "own is told with store.record_write",
                    subject=cached.name,
                    mend=mend,
                )
    yield ok(f"{compared} cached answers compared with the database")


def _sample(cache: QueryCache, store: str) -> Iterator[_Cached]:
    """Some answers of this store. Bounded: so many calls of SCAN and no more, however large Redis is."""
    cursor, found = 0, 0
    for _ in range(_SCANS_AT_MOST):
        cursor, names = cache.client.scan(cursor, match=f"vectorkeep:{store}:q:*", count=_KEYS_A_SCAN)
        for name in names[: _SAMPLE - found]:
            if (cached := _parsed(_text(name), cache.client.get(name))) is not None:
                found += 1
                yield cached
        if cursor == 0 or found >= _SAMPLE:
            return


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _parsed(name: str, raw: Any) -> _Cached | None:
    value = decoded(raw)
    return None if value is None else _Cached(name, value["key"])


def _is_right(cache: QueryCache, connection: StoreConnection, model: Model, cached: _Cached) -> bool | None:
    """Whether the cached answer is the database's. None where it would not be served, or says what we do not know.

    The database is asked between two looks at the cache: an answer that lay there before and is still valid after was
    valid meanwhile. One that another process stored in between may be newer than what the database answered.
    """
    query = _query(cached.key)
    if query is None or cache_key(query, model).text(connection.identity) != cached.key:
        return None
    for _ in range(_ATTEMPTS):
        before = cache.client.get(cached.name)
        now = Searcher().search(connection, query, model).result
        served, _ = cache.look_up_strict(cache_key(query, model), connection)
        if served is None:
            return None
        if cache.client.get(cached.name) == before:
            break
    else:
        return None
    if served.exact and now.exact:
        return served.hits == now.hits
    return _agree(served, now)


def _query(key: str) -> Query | None:
    """The search that a cache key stands for."""
    try:
        _, _, _, _, _, vector, k, level, ef_search, exact, workspace, source, where = orjson.loads(key)
        filters = Filter(workspace, source, None if where is None else orjson.loads(where))
        # pgvector's binary form: the number of dimensions and two bytes unused, then the components.
        components = np.frombuffer(bytes.fromhex(vector), dtype=">f4", offset=4).astype(np.float32)
        return Query(components, k, level, filters, ef_search, exact)
    except (ValueError, TypeError, ValidationError, orjson.JSONDecodeError):
        return None


def _agree(served: SearchResult, now: SearchResult) -> bool:
    """Whether two answers of an index, which may miss rows, tell the same of each row that both have.

    The index may have been built again since, and then finds others: but not most of them.
    """
    by_id = {hit.id: hit for hit in now}
    common = [hit for hit in served if hit.id in by_id]
    return all(hit == by_id[hit.id] for hit in common) and 2 * len(common) >= len(served)


CHECKS = (redis_reachable, redis_persistence, redis_memory)
SCHEMA_CHECKS = (invalidations, cached_answers)
