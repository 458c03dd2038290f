"""Ways to break the library inside a worker, to show that the checker sees it."""

import random

import db.ingestion
import db.query_cache
import db.upsert


def apply(names):
    for name in names:
        {"no fence": _no_fence, "no invalidation": _no_invalidation, "split": _split, "forget": _forget}[name]()


def _no_fence():
    """A hit is always taken for true."""

    def look_up(cache, key, connection):
        value, slot = cache._read(key, connection.identity)
        return (db.query_cache._result(value), slot) if value is not None else (None, slot)

    db.query_cache.QueryCache.look_up_strict = look_up


def _no_invalidation():
    """Redis is told of no write."""
    db.query_cache.QueryCache.invalidate = lambda cache, tags: True


def _split():
    """The documents are committed before their chunks are written."""

    def copy_new(transaction, new, model_id, now, _sent):
        db.upsert.copy_documents(transaction.cursor, new, model_id, now)
        _commit(transaction.cursor)
        db.upsert.copy_chunks(transaction.cursor, new)
        return True

    chunks_of_updated = db.upsert._chunks_of_updated

    def split(transaction, documents, stored):
        _commit(transaction.cursor)
        chunks_of_updated(transaction, documents, stored)

    db.upsert._copy_new, db.upsert._chunks_of_updated = copy_new, split


class _Undone(Exception):
    """Carries what a write would have returned out of its transaction."""


def _forget():
    """One batch in ten is acknowledged and rolled back."""
    run_write = db.ingestion.run_write

    def forgetful(database, work, **options):
        def undone(transaction):
            raise _Undone(work(transaction))

        if random.random() > 0.1:
            return run_write(database, work, **options)
        try:
            return run_write(database, undone, **options)
        except _Undone as exc:
            return exc.args[0]

    db.ingestion.run_write = forgetful


def _commit(cursor):
    cursor.execute("COMMIT", prepare=False)
    cursor.execute("BEGIN", prepare=False)
