"""The two sides of the benchmark do the same work: equal rows, equal indexes, and scratch databases that go."""

import psycopg
import pytest

from ops.benchmarks.plan import Run, UnequalWork
from ops.benchmarks.rows import KnownVectors, SyntheticVectors, documents, items
from ops.benchmarks.scratch import Scratch, Writes

VECTORS = SyntheticVectors(8)


def made_by(scratch, postgres_url):
    """How many of its databases there are."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        [(count,)] = connection.execute(
            "SELECT count(*) FROM pg_database WHERE starts_with(datname, %s)", (scratch._prefix,)
        ).fetchall()
        return count


@pytest.fixture
def scratch(postgres_url):
    return Scratch(postgres_url)


@pytest.fixture
def database(scratch):
    with scratch.database(VECTORS) as database:
        yield database


def rows_of(database):
    columns = "id, source_id, workspace, text, text_hash, content_hash, vector_hash, chunks_hash, model_id, metadata"
    rows = database.connection.execute(
        f"SELECT {columns}, embedding::text, created_at = updated_at FROM embeddings ORDER BY id"
    )
    return rows.fetchall()


@pytest.fixture
def run(scratch):
    return Run(scratch, rows=100, rounds=3, vectors=VECTORS, wide=None, say=lambda _text: None)


def test_copied_and_staged_rows_equal_ours(database):
    given = list(documents(VECTORS, 0, 300))
    with database.store() as store:
        assert store.batch_upsert(given).inserted == 300
    ours, fingerprint = rows_of(database), database.fingerprint()
    for by_hand in (database.by_hand.copy, database.by_hand.upsert):
        database.truncate()
        by_hand(given)
        assert rows_of(database) == ours
        assert database.fingerprint() == fingerprint
    assert ours[5][2] == "team-5"
    assert all(ours[0][4:7])


def test_changed_rows_equal_ours(database):
    database.by_hand.copy(documents(VECTORS, 0, 50))
    database.save()
    changed = list(documents(VECTORS, 0, 50, revision=1))
    with database.store() as store:
        assert store.batch_upsert(changed).updated == 50
    ours = rows_of(database)
    database.restore()
    assert rows_of(database) != ours
    database.by_hand.upsert(changed)
    assert [row[:-1] for row in rows_of(database)] == [row[:-1] for row in ours]
    kept = "SELECT count(*) FROM embeddings WHERE created_at < updated_at"
    assert database.connection.execute(kept).fetchone() == (50,)


def test_rows_by_hand_are_unchanged_to_the_library(database):
    given = list(documents(VECTORS, 0, 50))
    database.by_hand.copy(given)
    embedder = KnownVectors(VECTORS)
    before = database.writes()
    with database.store(embedder) as store:
        assert store.batch_upsert(given).unchanged == 50
        assert store.embed_batch(items(range(50))).skipped == 50
        other = items(range(0, 50, 10), metadata_revision=1)
        assert store.embed_batch(other).updated == 5
    assert embedder.asked == 0
    assert database.writes().since(before) == Writes(inserted=0, updated=5, hot_updated=5, deleted=0)


def test_the_index_by_hand_is_ours(database):
    definition = "SELECT indexdef FROM pg_indexes WHERE indexname = 'embeddings_vector_idx'"
    [ours] = database.connection.execute(definition).fetchall()
    database.drop_vector_indexes()
    assert database.connection.execute(definition).fetchall() == []
    database.by_hand.copy(documents(VECTORS, 0, 50))
    database.build_index(50)
    assert database.connection.execute(definition).fetchall() == [ours]


def test_sides_that_leave_different_rows_are_no_comparison(database, run):
    given = list(documents(VECTORS, 0, 20))
    hashed, unhashed = (
        lambda _round: database.by_hand.copy(given),
        lambda _round: database.by_hand.copy(given, hashed=False),
    )

    def compete(sides):
        return run.compete([database], sides, prepare=lambda _side: database.truncate(), equal=list(sides))

    times = compete({"one": hashed, "other": hashed})
    assert [len(seconds) for seconds in times.seconds.values()] == [3, 3]
    with pytest.raises(UnequalWork, match="'other' left"):
        compete({"one": hashed, "other": unhashed})


def test_sides_that_leave_different_indexes_are_no_comparison(database, run):
    sides = {"one": lambda _round: None, "other": lambda _round: database.drop_vector_indexes()}
    with pytest.raises(UnequalWork):
        run.compete([database], sides, equal=list(sides))


def test_scratch_databases_go_whatever_happens(scratch, postgres_url):
    class Interrupted(BaseException): ...

    def interrupted_in_the_middle():
        with scratch.database(VECTORS) as database, scratch.copy_of(database) as copy, copy.store():
            assert made_by(scratch, postgres_url) == 2
            assert copy.fingerprint() == database.fingerprint()
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted_in_the_middle()
    assert made_by(scratch, postgres_url) == 0


def test_autovacuum_is_off_and_the_store_has_the_model(database):
    off = "SELECT count(*) FROM pg_class WHERE 'autovacuum_enabled=off' = ANY(reloptions)"
    assert database.connection.execute(off).fetchone() == (4,)  # both tables and what they hold out of line
    with database.store() as store:
        assert (store.model.model_id, store.model.dimensions) == ("synthetic-8", 8)
        assert store.cache_client is None
