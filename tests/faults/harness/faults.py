"""The faults, by class: each is a function of the world that injects it, and returns when it is over."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import psycopg
import redis

from . import workload

HOLD_S = (0.3, 2.0)


@dataclass
class World:
    servers: object
    crew: object
    rng: random.Random

    def pause(self, least, most):
        time.sleep(self.rng.uniform(least, most))


@dataclass(frozen=True)
class Fault:
    family: str
    name: str
    inject: Callable[[World], bool | None]  # False where there was nothing to strike
    often: int = 1


FAULTS: list[Fault] = []


def fault(family, name, often=1):
    def register(inject):
        FAULTS.append(Fault(family, name, inject, often))
        return inject

    return register


# -- workers ---------------------------------------------------------------------------------------------


@fault("worker", "kill -9", often=6)  # each brings one that dies at a named point, perhaps
def kill_worker(world):
    world.crew.kill()


# -- PostgreSQL ------------------------------------------------------------------------------------------


@fault("postgres", "pg_terminate_backend of all")
def terminate_backends(world):
    with world.servers.connect() as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'vectorkeep%'"
        )


@fault("postgres", "pg_terminate_backend in a statement")
def terminate_active(world):
    return _strike_active(world, lambda connection, pid: connection.execute("SELECT pg_terminate_backend(%s)", (pid,)))


@fault("postgres", "pg_cancel_backend in a statement")
def cancel_active(world):
    return _strike_active(world, lambda connection, pid: connection.execute("SELECT pg_cancel_backend(%s)", (pid,)))


@fault("postgres", "pg_cancel_backend in a search")
def cancel_search(world):
    """The answer that an index scan began may come back then, told to be incomplete."""
    strike = lambda connection, pid: connection.execute("SELECT pg_cancel_backend(%s)", (pid,))  # noqa: E731
    return _strike_active(world, strike, "query LIKE '%SELECT pg_current_snapshot()::text, (SELECT%'")


@fault("postgres", "kill -9 of a backend in a transaction")
def kill_backend(world):
    struck = _strike_active(world, lambda _, pid: os.kill(pid, signal.SIGKILL))
    world.servers.wait_until_postgres_serves()
    return struck


@fault("postgres", "kill -9 of a backend in COPY or COMMIT")
def kill_backend_in_copy(world):
    strike = lambda _, pid: os.kill(pid, signal.SIGKILL)  # noqa: E731
    struck = _strike_active(world, strike, "(query ILIKE 'COPY%' OR query ILIKE 'COMMIT%')")
    world.servers.wait_until_postgres_serves()
    return struck


def _strike_active(world, strike, condition="true"):
    """Strike the first backend of the library that is seen in a transaction; False where none is for 5 s."""
    busy = f"""SELECT pid FROM pg_stat_activity
               WHERE application_name = 'vectorkeep' AND xact_start IS NOT NULL AND state <> 'idle' AND {condition}"""
    deadline = time.monotonic() + 5
    with suppress(psycopg.OperationalError), world.servers.connect() as connection:
        while time.monotonic() < deadline:
            if rows := connection.execute(busy.encode()).fetchall():
                strike(connection, world.rng.choice(rows)[0])
                return True
        return False
    return True  # this session went down with the others


@fault("postgres", "kill -9 of the postmaster")
def kill_postmaster(world):
    world.servers.signal_postgres(signal.SIGKILL)
    world.servers.postgres.ensure_running()


@fault("postgres", "immediate shutdown")
def immediate_shutdown(world):
    world.servers.signal_postgres(signal.SIGQUIT)
    world.servers.postgres.ensure_running()


@fault("postgres", "restart")
def restart(world):
    world.servers.signal_postgres(signal.SIGINT)
    world.pause(*HOLD_S)
    world.servers.postgres.ensure_running()


# -- the network -----------------------------------------------------------------------------------------


@fault("network", "reply to COMMIT lost")
def lose_commit_reply(world):
    return _cut_at_commit(world, "after")


@fault("network", "COMMIT lost")
def lose_commit(world):
    return _cut_at_commit(world, "before")


def _cut_at_commit(world, when):
    proxy = world.servers.postgres_proxy
    before, proxy.cut_at_commit = proxy.commits_cut, when
    deadline = time.monotonic() + 5
    while proxy.commits_cut == before and time.monotonic() < deadline:
        time.sleep(0.005)
    proxy.cut_at_commit = ""
    return proxy.commits_cut > before


@fault("network", "cut")
def cut(world):
    world.servers.postgres_proxy.cut()


@fault("network", "reset")
def reset(world):
    world.servers.postgres_proxy.cut(reset=True)


@fault("network", "refused")
def refuse(world):
    with _undone(world.servers.postgres_proxy.refuse, True, False):
        world.pause(*HOLD_S)


@fault("network", "latency")
def latency(world):
    proxy = world.servers.postgres_proxy
    proxy.latency_s = world.rng.uniform(0.01, 0.1)
    world.pause(1, 3)
    proxy.latency_s = 0.0


@fault("network", "blackhole to the server")
def blackhole_to_server(world):
    _blackhole(world, "to_server")


@fault("network", "blackhole to the client")
def blackhole_to_client(world):
    _blackhole(world, "to_client")


def _blackhole(world, direction):
    """Nothing comes through for a while; then all that was held back does, or the line is cut."""
    proxy = world.servers.postgres_proxy
    proxy.hold(direction, True)
    world.pause(*HOLD_S)
    if world.rng.random() < 0.5:
        proxy.cut()
    proxy.hold(direction, False)


# -- Redis -----------------------------------------------------------------------------------------------


@fault("redis", "killed, restarted empty")
def kill_redis(world):
    world.servers.kill_valkey()
    world.pause(*HOLD_S)
    world.servers.valkey.ensure_running()


@fault("redis", "stopped")
def stop_redis(world):
    """For 1 to 30 s, evenly on a logarithmic scale: half of them outlast a rest of the circuit breaker."""
    pid = world.servers.valkey.pid()
    with _undone(lambda number: os.kill(pid, number), signal.SIGSTOP, signal.SIGCONT):
        time.sleep(30 ** world.rng.random())


@fault("redis", "unreachable for the writers only")
def hide_redis(world):
    with _undone(world.servers.writers_redis_proxy.refuse, True, False):
        world.pause(1, 4)


@fault("redis", "evicting")
def evict(world):
    with world.servers.redis() as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used + 20_000)
        world.pause(1, 3)
        client.config_set("maxmemory", "128mb")


@fault("redis", "an old snapshot restored")
def restore_redis(world):
    """What a restart from an old dump brings: all keys as they were, with the ends that they had."""
    with world.servers.redis() as client:
        old = [(key, client.dump(key), client.pexpiretime(key)) for key in client.scan_iter(count=1000)]
        world.pause(0.5, 3)
        client.flushdb()
        for key, value, expires in old:
            if value is not None:
                with suppress(redis.ResponseError):
                    client.restore(key, expires, value, replace=True, absttl=True)


# -- limits ----------------------------------------------------------------------------------------------


@fault("limits", "tables locked for longer than a statement may take")
def lock_tables(world):
    with world.servers.connect() as connection, connection.transaction():
        connection.execute("SET LOCAL lock_timeout = '4s'; LOCK TABLE embeddings")
        world.pause(4, 7)


@fault("limits", "deadlock")
def deadlock(world):
    """Rows locked against the order in which writers lock theirs, until somebody was a victim."""
    deadline = time.monotonic() + 6
    ids = sorted(f"d{slot}-{n}" for slot in world.crew.slots for n in range(workload.DOCUMENTS))
    lock = "SELECT FROM embeddings WHERE id = %s FOR UPDATE"
    with world.servers.connect() as connection:
        connection.execute("SET lock_timeout = '3s'")
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        [(before,)] = connection.execute(deadlocks).fetchall()
        while time.monotonic() < deadline:
            with suppress(psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable), connection.transaction():
                for id_ in reversed(ids):
                    connection.execute(lock, (id_,))
            connection.execute("SELECT pg_stat_clear_snapshot()")
            if connection.execute(deadlocks).fetchone() != (before,):
                return True
    return False


@fault("limits", "serialization failures")
def fail_serialization(world):
    """Half of all writing statements fail as under SERIALIZABLE."""
    with world.servers.connect() as connection:
        connection.execute("SET lock_timeout = '4s'")
        connection.execute("""
            CREATE OR REPLACE FUNCTION fail_at_times() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF random() < 0.5 THEN RAISE 'as if serializable' USING ERRCODE = 'serialization_failure'; END IF;
                RETURN NULL;
            END $$""")
        connection.execute("""
            CREATE TRIGGER fail_at_times AFTER INSERT OR UPDATE OR DELETE ON embeddings
            FOR EACH STATEMENT EXECUTE FUNCTION fail_at_times()""")
        world.pause(1, 2)
    with world.servers.connect() as connection:
        connection.execute("DROP TRIGGER fail_at_times ON embeddings")


@fault("limits", "max_connections reached")
def take_all_connections(world):
    with ExitStack() as taken:
        holders = []
        for attempt in range(200):
            with suppress(psycopg.OperationalError):
                holders.append(taken.enter_context(world.servers.connect()))
                continue
            if attempt < 100 and holders:  # those that are free now are held: the library's go, and find none
                holders[0].execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'vectorkeep%'"
                )
                if attempt > 60:
                    break
        world.pause(*HOLD_S)


@fault("limits", "disk full")
def fill_disk(world):
    """No file may grow beyond 64 kB: neither tables nor the log of changes, so the server goes down."""
    world.servers.limit_files(64 * 1024)
    world.pause(0.5, 2)
    if world.servers.postgres.pid():
        world.servers.signal_postgres(signal.SIGQUIT)
    world.servers.postgres.ensure_running()  # without the limit


class _undone:
    """`work(begin)` now, `work(end)` afterwards in any case."""

    def __init__(self, work, begin, end):
        self.work, self.begin, self.end = work, begin, end

    def __enter__(self):
        self.work(self.begin)

    def __exit__(self, *_):
        self.work(self.end)


def deck(rng, families=(), names=()):
    """All faults in random order, again and again."""
    chosen = [
        fault for fault in FAULTS if (not families or fault.family in families) and (not names or fault.name in names)
    ]
    while True:
        shuffled = [fault for fault in chosen for _ in range(fault.often)]
        rng.shuffle(shuffled)
        yield from shuffled
