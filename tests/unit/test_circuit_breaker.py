import logging
import threading

import pytest
import redis

from db import circuit_breaker
from db.circuit_breaker import CircuitBreaker


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(circuit_breaker, "time", clock)
    return clock


def fail(breaker, reason="timed out"):
    with breaker.guard():
        raise redis.TimeoutError(reason)


def test_it_is_closed_while_nothing_fails():
    breaker = CircuitBreaker()
    for _ in range(3):
        with breaker.guard():
            pass
        assert breaker.closed
    assert breaker.failures == 0


def test_an_error_of_redis_is_swallowed_and_keeps_callers_away_for_five_seconds(clock):
    breaker = CircuitBreaker()
    fail(breaker)
    assert not breaker.closed
    clock.now += 4.9
    assert not breaker.closed
    clock.now += 0.2
    assert breaker.closed


def test_after_the_rest_one_caller_alone_tries(clock):
    breaker = CircuitBreaker()
    fail(breaker)
    clock.now += 6
    assert [breaker.closed for _ in range(5)] == [True, False, False, False, False]


def test_of_many_threads_one_tries(clock):
    breaker = CircuitBreaker()
    fail(breaker)
    clock.now += 6
    ready, tried = threading.Barrier(8), []

    def ask():
        ready.wait()
        if breaker.closed:
            tried.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tried) == 1


def test_a_success_closes_it_for_everyone(clock):
    breaker = CircuitBreaker()
    fail(breaker)
    clock.now += 6
    assert breaker.closed
    with breaker.guard():
        pass
    assert [breaker.closed for _ in range(3)] == [True, True, True]


def test_a_failed_try_begins_another_rest(clock):
    breaker = CircuitBreaker()
    fail(breaker)
    clock.now += 6
    assert breaker.closed
    fail(breaker)
    clock.now += 4
    assert not breaker.closed
    assert breaker.failures == 2


def test_one_warning_for_each_time_that_redis_stops_answering(clock, caplog):
    caplog.set_level(logging.INFO, "vectorkeep")
    breaker = CircuitBreaker()
    for _ in range(5):
        fail(breaker)
        clock.now += 6
    assert [r.getMessage() for r in caplog.records] == ["cache.unavailable"]
    with breaker.guard():
        pass
    fail(breaker, "gone again")
    assert [r.getMessage() for r in caplog.records].count("cache.unavailable") == 2


def test_an_error_that_is_not_redis_own_passes_through_and_opens_nothing():
    breaker = CircuitBreaker()
    with pytest.raises(ZeroDivisionError), breaker.guard():
        raise ZeroDivisionError
    assert breaker.closed
