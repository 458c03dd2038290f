"""A run: rounds of work under faults, each ended by stopping everybody and comparing all with what was told."""

import time
from contextlib import closing
from dataclasses import dataclass

import psycopg
import redis

import db

from . import content
from .checker import check_reads, check_stored, histories_of
from .crew import SETTINGS, Crew, seeded
from .faults import World, deck
from .ledger import Ledger, now
from .report import Report
from .servers import Servers

_DOCUMENTS = """
    SELECT id, source_id, (metadata ->> 'version')::int, text FROM embeddings WHERE metadata ? 'owned' ORDER BY id
"""
_CHUNKS = "SELECT document_id, origin_id, chunk_index, text FROM chunks ORDER BY document_id, chunk_index"
_SESSIONS = (
    "SELECT to_jsonb(activity)::text FROM pg_stat_activity AS activity WHERE application_name LIKE 'vectorkeep%'"
)
BACKGROUND = 1500  # documents that nobody changes, so that the vector index is worth its use
RECOVERY_S = 60


@dataclass(frozen=True)
class Plan:
    """`families` and names of `faults`, all where empty; `mutations` break the library in the workers."""

    seed: str
    seconds: float
    round_s: float = 20
    writers: int = 2
    readers: int = 1
    families: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    mutations: tuple[str, ...] = ()
    at_points: bool = True


def run(plan, tell=lambda line: None):
    """Run rounds until the time is over; the report of all of them."""
    report = Report(plan.seed, SETTINGS["bounded_ttl_s"])
    with closing(Servers()) as servers:
        prepare(servers)
        report.machine = servers.machine()
        tell(f"seed {plan.seed}, {report.machine}")
        started = time.monotonic()
        faults = deck(seeded(plan.seed, "deck"), plan.families, plan.faults)
        baseline = {}
        while (left := plan.seconds - (time.monotonic() - started)) > 0:
            rng = seeded(plan.seed, report.rounds)
            baseline = _round(servers, plan, report, rng, faults, baseline, min(left, plan.round_s))
            report.rounds += 1
            report.seconds = time.monotonic() - started
            tell(f"round {report.rounds}: {report.seconds:.0f} s, {report.as_dict()['faults_injected']} faults, "
                 f"{'ok' if report.ok else 'FAILED'}")  # fmt: skip
            if not report.ok:
                break
    return report


def prepare(servers):
    """The model, and documents that stay."""
    with open_store(servers) as store:
        texts = {f"b{n}": f"background {n}" for n in range(BACKGROUND)}
        store.batch_upsert(
            db.Document(id_, text, content.vector_of(text), {"n": 1}, "background") for id_, text in texts.items()
        )


def open_store(servers):
    return db.connect(
        servers.url, servers.redis_url(reads=True), embedder=content.Embedder(), maintenance_on_close=False,
        chunk_size=content.CHUNK_SIZE, chunk_overlap=0,
    )  # fmt: skip


def _round(servers, plan, report, rng, faults, baseline, seconds):
    ledger = Ledger()
    crew = Crew(
        servers, ledger, rng, writers=plan.writers, readers=plan.readers, mutations=plan.mutations,
        baseline={id_: [history.versions[-1].number, history.versions[-1].source] for id_, history in baseline.items()},
        at_points=plan.at_points,
    )  # fmt: skip
    began = now()
    crew.start()
    began = ledger.first_ack(began, RECOVERY_S)
    if began is None:
        report.unexpected.append("no write was acknowledged within the first minute of a round")
        began = now()
    _strike(World(servers, crew, rng), ledger, faults, report, began + int(seconds * 1e9))
    _note_deaths(crew, ledger, report)
    report.unexpected += [f"worker {pid} did not stop" for pid in crew.stop()] + crew.unexpected
    return _check(servers, ledger, baseline, report)


def _strike(world, ledger, faults, report, until):
    """One fault after the other, at random moments."""
    while now() < until:
        world.pause(0.1, 2)
        fault = next(faults)
        struck = _inject(fault, world)
        if struck is False:
            report.missed[f"{fault.family}: {fault.name}"] += 1
        elif fault.family == "worker":
            pass  # the crew saw it die, see below
        else:
            over = now()
            recovered = ledger.first_ack(over, RECOVERY_S)
            report.struck(fault.family, fault.name, recovered and (recovered - over) / 1e6)


def _inject(fault, world):
    """False where there was nothing to strike, or a lock that the harness wanted was not to be had."""
    try:
        return fault.inject(world)
    except (psycopg.Error, redis.RedisError):
        world.servers.wait_until_postgres_serves()
        return False


def _note_deaths(crew, ledger, report):
    for point, died, member in list(crew.strikes):
        acked = ledger.first_ack(died, RECOVERY_S, member if member in crew.slots else None)
        report.struck("worker", f"kill -9 {point}", acked and (acked - died) / 1e6)


def _check(servers, ledger, baseline, report):
    """Compare what the workers told with each other and with what is stored; returns the next baseline."""
    findings = report.findings
    with servers.connect() as connection:
        sessions = _wait_for_sessions_to_end(connection)
    report.connections_leaked += len(sessions) + sum(event["lent"] for event in ledger.closed)
    report.leaks += [f"a session without a worker: {session}" for session in sessions]
    report.leaks += [
        f"not given back in worker {event['slot']}: {event['where']}" for event in ledger.closed if event["lent"]
    ]
    with open_store(servers) as store, servers.connect() as connection:
        store.cleanup_orphaned()
        documents, chunks = (connection.execute(query).fetchall() for query in (_DOCUMENTS, _CHUNKS))
        histories = histories_of(ledger.operations, ledger.reads, baseline)
        check_reads(ledger.reads, histories, findings, SETTINGS["bounded_ttl_s"])
        stored = check_stored(documents, chunks, histories, findings)
        baseline = {id_: histories[id_].continued(version, now()) for id_, version in stored.items()}
        _check_store(store, connection, documents, chunks, findings)
    for operation in ledger.operations:
        report.operations[operation["kind"]] += operation["acked"] is not None
    for error in ledger.errors:
        report.refused[error["name"]] += 1
        if not error["known"]:
            report.unexpected.append(f"{error['kind']} raised {error['name']}: {error['text']}")
    return baseline


def _wait_for_sessions_to_end(connection):
    """The library's sessions once all workers are gone: none, as soon as the server has noticed."""
    deadline = time.monotonic() + 20
    while (sessions := connection.execute(_SESSIONS).fetchall()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return sessions


def _check_store(store, connection, documents, chunks, findings):
    """Statistics add up, nothing is detached after a cleanup, hashes belong to the rows, hits are exact ones."""
    statistics = store.get_statistics()
    rows = connection.execute("SELECT count(*), count(DISTINCT source_id) FROM embeddings").fetchone()
    told = (statistics.documents, len(statistics.sources), statistics.chunks)
    if told != (*rows, len(chunks)):
        findings.other.append(
            f"statistics tell {told} documents, sources and chunks; stored are {(*rows, len(chunks))}"
        )
    if rows[0] != BACKGROUND + len(documents):
        findings.other.append(f"{rows[0] - len(documents)} documents of the background are stored, not {BACKGROUND}")
    findings.half += [f"a chunk of {row[1]} is detached after a cleanup" for row in chunks if row[0] is None]
    _check_hashes(store, documents, findings)
    _check_hits(store, findings)


def _check_hashes(store, documents, findings):
    """The same again changes nothing: what is stored is what its hashes say."""
    again = store.embed_batch([content.item(id_, version, source) for id_, source, version, _ in documents])
    if again.skipped != len(documents):
        findings.other.append(f"embedding the same again changed {len(documents) - again.skipped} documents")


def _check_hits(store, findings):
    for level in ("documents", "chunks"):
        for number in range(5):
            vector = content.vector_of(f"probe {number}")
            every = {hit.id: hit.score for hit in store.search(vector, 5000, exact=True, level=level)}
            hits = list(store.search(vector, 10, level=level))
            wrong = [hit.id for hit in hits if abs(every.get(hit.id, 9) - hit.score) > 1e-5]
            if wrong or len({hit.id for hit in hits}) != min(10, len(every)):
                findings.other.append(f"a search of {level} found {len(hits)} hits, {wrong} of them not exact")
