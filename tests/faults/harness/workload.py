"""One worker process: writes its own documents, or reads everybody's, until it is told to stop or dies."""

import logging
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter

import db
from db import faults

from . import content, mutations
from .ledger import Writer, now

DOCUMENTS = 12
DETACHABLE = 3
MOVED = "moved"  # a source that documents of all writers move through
_MANY = 200  # more than there are owned documents, so that nothing is cut off


def sources(slots):
    return [f"s{slot}" for slot in slots] + [f"t{slot}" for slot in slots] + [MOVED]


class Stop(threading.Event):
    """Set by SIGTERM: the operation under way is finished first."""

    def __init__(self):
        super().__init__()
        signal.signal(signal.SIGTERM, lambda *_: self.set())


class WriterWorker:
    """Upserts, embeds, syncs, deletes and cleans up: each operation told before it begins and once it returned."""

    def __init__(self, store, orders, ledger):
        self.store, self.ledger = store, ledger
        self.slot, self.rng = orders["slot"], random.Random(orders["seed"])
        self.source = f"s{self.slot}"
        self.ids = [f"d{self.slot}-{n}" for n in range(DOCUMENTS)]
        # {id: [version, source or None]}; of those that are not certain another version may be stored
        self.state = {id_: [0, None] for id_ in self.ids} | orders["state"]
        self.certain = set(orders["certain"])
        self.weights = {"upsert": 30, "embed": 20, "delete": 10, "sync": 8, "detach": 4, "cleanup": 2}
        self.weights |= {"orphan": 2, "bulk": 1, "maintain": 1}
        if orders["prefer"]:
            self.weights[orders["prefer"]] += sum(self.weights.values())

    def run(self, stop):
        while not stop.is_set():
            [kind] = self.rng.choices(list(self.weights), list(self.weights.values()))
            getattr(self, kind)()

    def upsert(self, **options):
        intended = {id_: self._next(id_) for id_ in self._pick(4)}
        given = [content.document(id_, *state) for id_, state in intended.items()]
        self._write("upsert", intended, lambda: self.store.batch_upsert(given, **options))

    def bulk(self):
        self.upsert(bulk=True)

    def embed(self):
        intended = {id_: self._next(id_) for id_ in self._pick(4)}
        given = [content.item(id_, *state) for id_, state in intended.items()]
        self._write("embed", intended, lambda: self.store.embed_batch(given, batch_size=2))

    def sync(self):
        """Some stay as they are, some change, some go; those that moved elsewhere are left alone."""
        intended, given = {}, []
        for id_ in self.ids:
            version, source = self.state[id_]
            choice = self.rng.random()
            if id_ not in self.certain or (choice < 0.4 and source != MOVED):
                intended[id_] = [version + 1, self.source]
                given.append(content.item(id_, *intended[id_]))
            elif source == self.source and choice < 0.6:
                intended[id_] = [version + 1, None]
            elif source == self.source:
                given.append(content.item(id_, version, source))
        options = {"source_id": self.source, "allow_empty": True, "wait_s": 5}
        self._write("sync", intended, lambda: self.store.sync(given, **options))

    def delete(self):
        intended = {id_: [self.state[id_][0] + 1, None] for id_ in self._pick(2)}
        self._write("delete", intended, lambda: self.store.delete(list(intended)))

    def detach(self):
        """Documents of another source are made, then deleted without their chunks."""
        ids = [f"t{self.slot}-{n}" for n in range(DETACHABLE)]
        made = {id_: [self.state.get(id_, [0])[0] + 1, f"t{self.slot}"] for id_ in ids}
        given = [content.document(id_, *state) for id_, state in made.items()]
        self._write("upsert", made, lambda: self.store.batch_upsert(given))
        gone = {id_: [version + 1, None] for id_, (version, _) in made.items()}
        self._write("detach", gone, lambda: self.store.delete_by_source_id(f"t{self.slot}", cascade=False))

    def orphan(self):
        given = [{"id": f"o{self.slot}-{n}", "text": "no vector", "embedding": None} for n in range(3)]
        self._write("orphan", {}, lambda: self.store.batch_upsert(given))

    def cleanup(self):
        self._write("cleanup", {}, lambda: self.store.cleanup_orphaned(batch_size=2))

    def maintain(self):
        self._write("maintain", {}, lambda: self.store.maintain(deadline_s=5))

    def _pick(self, at_most):
        return self.rng.sample(self.ids, self.rng.randint(1, at_most))

    def _next(self, id_):
        version = self.state[id_][0] + 1
        return [version, MOVED if version % 7 == 0 else self.source]

    def _write(self, kind, intended, work):
        number = self.ledger.intend(kind, intended)
        self.state |= intended
        self.certain -= intended.keys()
        try:
            result = work()
        except Exception as exc:  # noqa: BLE001  (what is not ours is a finding)
            tell_error(self.ledger, kind, exc)
            return
        failed = [id_ for id_, _ in getattr(result, "errors", ())]
        self.ledger.tell("ack", n=number, failed=failed)
        self.certain |= intended.keys() - set(failed)


class ReaderWorker:
    """Searches through the cache and reads by id, in several threads on a small pool."""

    THREADS = 3  # more than connections: they wait for one another

    def __init__(self, store, orders, ledger):
        self.store, self.ledger, self.orders = store, ledger, orders
        self.vectors = [content.vector_of(f"question {n}") for n in range(3)]

    def run(self, stop):
        threads = [threading.Thread(target=self._read_on, args=(stop, n)) for n in range(self.THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _read_on(self, stop, number):
        rng = random.Random(self.orders["seed"] + number)
        filters = [{}, {"workspace": "w0"}, {"workspace": "w1"}]
        filters += [{"source_id": source} for source in sources(self.orders["slots"])]
        while not stop.is_set():
            reading = rng.choices([self.search, self.search_chunks, self.get], [8, 1, 1])[0]
            try:
                reading(rng, rng.choice(filters))
            except Exception as exc:  # noqa: BLE001
                tell_error(self.ledger, "read", exc)

    def search(self, rng, wanted):
        mode = rng.choices(["strict", "bounded"], [3, 1])[0]
        start = now()
        result = self.store.search(
            rng.choice(self.vectors), _MANY, where={"owned": True}, consistency=mode, **wanted
        )  # fmt: skip
        end = now()
        seen = Counter(hit.id for hit in result)
        twice = [f"{id_} is among the hits {count} times" for id_, count in seen.items() if count > 1]
        half = [torn for hit in result if (torn := _torn_hit(hit))]
        found = {hit.id: hit.metadata["version"] for hit in result}
        self._tell(start, end, mode, wanted, found, result, half=half, twice=twice)

    def search_chunks(self, rng, wanted):
        """All chunks of a source: those of each document must be of one version, and complete."""
        start = now()
        options = {"where": {"owned": True}, "level": "chunks", **wanted}
        result = self.store.search(rng.choice(self.vectors), 10 * _MANY, **options)
        end = now()
        documents = {}
        for hit in result:
            if hit.document_id is not None:
                documents.setdefault(hit.document_id, []).append(hit)
        half = [
            f"{id_} of version {hits[0].metadata['version']} with chunks {sorted(hit.text for hit in hits)}"
            for id_, hits in documents.items()
            if _are_other_chunks(hits, content.chunk_texts(id_, hits[0].metadata["version"]), result.complete)
        ]
        found = {id_: hits[0].metadata["version"] for id_, hits in documents.items()}
        self._tell(start, end, "strict", wanted, found, result, half=half)

    def get(self, rng, _wanted):
        slot = rng.choice(self.orders["slots"])
        ids = [f"d{slot}-{n}" for n in range(DOCUMENTS)]
        start = now()
        documents = self.store.get(ids)
        end = now()
        half, found = [], {}
        for document in documents:
            version = found[document.id] = document.metadata["version"]
            if torn := content.torn(document.id, version, document.text, [chunk.text for chunk in document.chunks]):
                half.append(torn)
        self._tell(start, end, "strict", {}, found, half=half, ids=ids)

    def _tell(self, start, end, mode, wanted, seen, result=None, *, half=(), twice=(), ids=None):
        """result: of a search, which says itself whether it is complete."""
        self.ledger.tell(
            "read", start=start, end=end, mode=mode, filter=wanted, seen=seen, half=list(half), twice=list(twice),
            ids=ids, cached=result is not None and result.cached, complete=result is None or result.complete,
        )  # fmt: skip


def _are_other_chunks(hits, expected, complete):
    found = Counter(hit.text for hit in hits)
    return found != Counter(expected) if complete else bool(found - Counter(expected))


def _torn_hit(hit):
    version = hit.metadata["version"]
    return "" if hit.text == content.text_of(hit.id, version) else f"{hit.id}: text is not of version {version}"


def tell_error(ledger, kind, exc):
    known = isinstance(exc, db.VectorKeepError) and not isinstance(exc, db.SchemaError | db.ValidationError)
    ledger.tell("error", kind=kind, name=type(exc).__name__, known=known, text=str(exc)[:500])


def main(orders, pipe):
    """The whole life of a worker process; `pipe` is a connection that it tells its ledger to."""
    ledger = Writer(pipe.fileno())
    logging.disable()
    try:
        _work(orders, ledger)
    except BaseException as exc:
        tell_error(ledger, "life", exc)
        raise


def _work(orders, ledger):
    faults._PLAN = faults._parse(orders["fault"])
    stop = Stop()
    mutations.apply(orders["mutations"])
    store = None
    while store is None and not stop.is_set():
        try:
            store = db.connect(
                orders["database_url"], orders["redis_url"], embedder=content.Embedder(),
                chunk_size=content.CHUNK_SIZE, chunk_overlap=0, maintenance_on_close=False, **orders["settings"],
            )  # fmt: skip
        except Exception as exc:  # noqa: BLE001
            tell_error(ledger, "connect", exc)
            stop.wait(0.2)
    if store is not None:
        kind = ReaderWorker if orders["reads"] else WriterWorker
        kind(store, orders, ledger).run(stop)
        lent = _still_lent(store.pool)
        where = [*_what_threads_do(), str(store.pool.get_stats())] if lent else []
        store.close()
        ledger.tell("closed", lent=lent, where=where)


def _what_threads_do():
    return ["".join(traceback.format_stack(frame)) for frame in sys._current_frames().values()]


def _still_lent(pool, within_s=20):
    """The connections that nobody gave back, once those that the pool replaces just now are there again."""
    deadline = time.monotonic() + within_s
    while True:
        stats = pool.get_stats()
        lent = stats["pool_size"] - stats["pool_available"]
        if not lent or time.monotonic() > deadline:
            return lent
        time.sleep(0.05)
