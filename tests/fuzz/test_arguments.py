"""Numbers, texts and choices that calls take; and names that look like patterns, which never become any in Redis."""

import math
import threading
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace

import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

import db
from tests.fuzz.conftest import DIMENSIONS, examples
from tests.fuzz.strategies import is_key, is_text, json_like, mostly_texts, numbers

VECTOR = [1.0] * DIMENSIONS
PATTERNS = ["*", "?", "s*", "s?", "[s]*", "s[12]", "[^a]*", "s:1", ":", "s\\*", "{s1}", "vectorkeep:*", "s1\r\n", "s 1"]

ints = st.one_of(st.integers(-2, 12), st.integers(), st.sampled_from([10**9, 10_000, 10_001, 1000, 1001]))
no_ints = st.one_of(st.booleans(), numbers.filter(lambda v: not isinstance(v, int)), json_like, st.just(np.int64(3)))
any_count = st.one_of(ints, no_ints)


def is_count(value, highest):
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= highest


@examples(60)
@given(any_count, any_count)
def test_k_and_ef_search_are_counts(store, report, k, ef_search):
    assert len(report.tried(lambda: store.search(VECTOR, k), valid=is_count(k, 10_000)) or ()) == 0
    if is_count(k, 10_000):
        report.accepted()
    found = report.tried(
        lambda: store.search(VECTOR, ef_search=ef_search), valid=ef_search is None or is_count(ef_search, 1000)
    )
    if found is not None:
        report.accepted()


@examples(20)
@given(json_like, st.sampled_from(["level", "consistency", "workspace", "source_id"]))
def test_choices_and_names_of_a_search_are_checked(store, report, value, name):
    good = {"level": ["documents", "chunks"], "consistency": ["strict", "bounded", None]}.get(name)
    valid = value is None or is_key(value) if good is None else isinstance(value, str | None) and value in good
    if report.tried(lambda: store.search(VECTOR, **{name: value}), valid=valid) is not None:
        report.accepted()


@examples(40)
@given(mostly_texts, st.sampled_from(["search", "embed"]))
def test_texts_to_embed_are_texts(store, report, text, call):
    if call == "search" and not isinstance(text, str):
        return
    if report.tried(lambda: getattr(store, call)(text), valid=is_text(text)) is not None:
        report.accepted()


no_numbers = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, -1, -0.5, 10**5000, 1e300]), st.booleans()
) | json_like.filter(lambda v: v is not None and not isinstance(v, int | float))
ARGUMENTS = {
    "batch_size of upsert": lambda store, v: store.batch_upsert([], batch_size=v),
    "batch_size of cleanup": lambda store, v: store.cleanup_orphaned(dry_run=True, batch_size=v),
    "batch_size of hashes": lambda store, v: store.iter_hashes(batch_size=v),
    "bulk": lambda store, v: store.batch_upsert([], bulk=v if not isinstance(v, bool) else None),
    "min_age": lambda store, v: store.cleanup_orphaned(dry_run=True, min_age=v),
    "sample": lambda store, v: store.measure_recall(sample=v),
    "recall's deadline": lambda store, v: store.measure_recall(deadline_s=v),
    "retention": lambda store, v: store.maintain(retention_days=v),
    "threshold": lambda store, v: store.maintain(index_stale_threshold=v),
    "maintenance's deadline": lambda store, v: store.maintain(deadline_s=v),
    "ttl": lambda store, v: store.pause_ingestion("why", ttl_s=v),
}


@examples(80)
@given(st.sampled_from(sorted(ARGUMENTS)), no_numbers)
def test_what_is_no_number_is_refused_where_one_is_wanted(store, report, name, value):
    if name == "bulk" and value == "auto":
        return
    report.tried(lambda: ARGUMENTS[name](store, value), valid=False)


@pytest.mark.parametrize("min_age", [timedelta.max, timedelta.min, timedelta(days=40_000), "1 day", 3])
def test_ages_that_no_server_can_reckon_with_are_refused(store, report, min_age):
    report.tried(lambda: store.cleanup_orphaned(dry_run=True, min_age=min_age), valid=False)


@examples(40)
@given(st.datetimes(), st.integers(-23 * 60, 23 * 60))
def test_times_read_back_or_are_refused(store, report, time, offset_minutes):
    time = time.replace(tzinfo=timezone(timedelta(minutes=offset_minutes)))
    good = datetime(1, 1, 3, tzinfo=UTC) < time < datetime(9999, 12, 29, tzinfo=UTC)
    row = {"id": "t", "text": "t", "created_at": time, "updated_at": time}
    result = store.batch_upsert([row])
    report.rows(result, not result.failed, result.failed)
    assert result.failed == 0 or not good
    for document in store.get(["t"]):
        assert (document.created_at, document.updated_at) == (time, time)
        report.accepted()
    store.delete(["t"])


@pytest.mark.parametrize("time", [datetime.min, datetime.max])
@pytest.mark.parametrize("hours", [-12, 0, 14])
def test_times_at_the_ends_of_the_calendar_are_refused(store, report, time, hours):
    time = time.replace(tzinfo=timezone(timedelta(hours=hours)))
    report.rows(store.batch_upsert([{"id": "t", "text": "t", "created_at": time}]), 0, 1)


@examples(10)
@given(
    mostly_texts,
    st.one_of(st.integers(-1, 0), st.just(16_001), st.just(10**9), st.booleans(), st.just("8"), st.just(1.5)),
)
def test_a_model_that_no_store_can_have_is_refused(fuzz_empty, report, model_id, dimensions):
    for name, size in ((model_id, 8), ("m", dimensions)):
        embedder = SimpleNamespace(model_id=name, dimensions=size, embed=None)
        if not (is_key(name) and size == 8):
            report.tried(lambda e=embedder: fuzz_empty.embed_batch([{"id": "a", "text": "t"}], embedder=e), valid=False)
    assert fuzz_empty.model is None


@pytest.fixture(scope="module")
def fuzz_empty(fuzz_databases):
    with db.connect(fuzz_databases("empty"), False, maintenance_on_close=False) as opened:
        yield opened


@pytest.fixture
def commands(fuzz_redis_url):
    """All that was asked of the Redis database while the test ran. MONITOR tells of the server's others as well."""
    seen = []
    ready = threading.Event()

    def watch():
        with redis.Redis.from_url(fuzz_redis_url) as client, client.monitor() as monitor:
            ready.set()
            ours = client.get_connection_kwargs()["db"]
            for command in monitor.listen():
                if command["db"] != ours:
                    continue
                seen.append(command["command"])
                if "end-of-watch" in command["command"]:
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    assert ready.wait(10)

    def all_seen():
        with redis.Redis.from_url(fuzz_redis_url) as client:
            client.echo("end-of-watch")
        thread.join(10)
        assert not thread.is_alive()
        return seen

    return all_seen


def test_names_never_become_patterns_in_redis(store, fuzz_redis_url, commands, report):
    neighbours = ["s1", "s2", "a", "s11", "neighbour"]
    store.batch_upsert([{"id": s, "text": "t", "source_id": s, "embedding": VECTOR} for s in neighbours + PATTERNS])
    with redis.Redis.from_url(fuzz_redis_url) as client:
        foreign = {f"{pattern}{n}": b"kept" for n, pattern in enumerate([*PATTERNS, "s1", "vectorkeep:other:q:1"])}
        client.mset(foreign)
        for source in neighbours + PATTERNS:
            store.search(VECTOR, source_id=source)
        for pattern in PATTERNS:
            assert report.tried(lambda p=pattern: store.search(VECTOR, source_id=p), valid=True).cached
            assert [hit.id for hit in store.search(VECTOR, source_id=pattern)] == [pattern]
            store.delete_by_source_id(pattern)
            assert len(store.search(VECTOR, source_id=pattern)) == 0
            hits = [store.search(VECTOR, source_id=neighbour) for neighbour in neighbours]
            assert all(h.cached for h in hits), f"{pattern!r} reached its neighbours"
            report.accepted()
        assert client.mget(list(foreign)) == list(foreign.values())
        client.delete(*foreign)
    asked = {command.split(" ", 1)[0].upper() for command in commands()}
    assert asked & {"SET", "MGET"}
    assert not asked & {"KEYS", "SCAN", "EVAL", "EVALSHA", "PSUBSCRIBE", "FLUSHDB", "FLUSHALL", "SORT", "CONFIG"}
