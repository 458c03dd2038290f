"""batch_upsert: what becomes of each document, and that a bad one never stops the others."""

import gc
import os
import threading
import weakref
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pytest
from psycopg.sql import SQL, Identifier

import db
from db import Document
from db.documents import prepare
from db.migrate import upgrade
from db.transactions import run_write
from db.upsert import UpsertBatch
from tests.servers import database_at, execute

from .upserts import counts, doc, vector


def test_each_document_counts_by_what_became_of_its_row(store):
    assert counts(store.batch_upsert([doc("a"), doc("b"), doc("c")])) == {"inserted": 3}
    result = store.batch_upsert([doc("a"), doc("b", "other"), doc("d")])
    assert counts(result) == {"inserted": 1, "updated": 1, "unchanged": 1}
    assert result.duration_ms > 0


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_last_one_of_an_id_wins_within_a_batch_and_across_batches(store, batch_size):
    given = [doc("a", "1"), doc("a", "2"), doc("b", "1"), doc("a", "3"), doc("b", "1")]
    assert counts(store.batch_upsert(given, batch_size=batch_size)) == {"inserted": 2, "superseded": 3}
    assert [d.text for d in store.get(["a", "b"])] == ["3", "1"]


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_a_first_load_that_repeats_ids_counts_and_stores_as_any_other(store, size):
    """It compares nothing until an id comes again, and then it does."""
    given = [doc(f"{n % 5}", f"text {n // 10}", embedding=[1.0, n % 5, *[0.0] * 6]) for n in range(15)]
    result = store.batch_upsert(given, batch_size=size)
    assert counts(result) == {"inserted": 5, "superseded": 10}
    assert [d.text for d in store.get([str(n) for n in range(5)])] == ["text 1"] * 5
    again = store.batch_upsert(given[10:], batch_size=size)
    assert counts(again) == {"unchanged": 5}


def test_a_first_load_that_another_writer_overtakes_loses_nothing(store, sql):
    """What the other wrote first is updated, or left alone where it is the same."""

    def documents():
        yield doc("a", "a")
        store.batch_upsert([doc("b", "other"), doc("c", "c")])
        yield doc("b", "b")
        yield doc("c", "c")
        yield doc("d", "d")

    result = store.batch_upsert(documents(), batch_size=1)
    assert counts(result) == {"inserted": 2, "updated": 1, "unchanged": 1}
    assert sql("SELECT id, text FROM embeddings ORDER BY id") == [("a", "a"), ("b", "b"), ("c", "c"), ("d", "d")]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_invalid_document_never_wins_over_a_valid_one(store, batch_size):
    result = store.batch_upsert([doc("a", "good"), doc("a", ""), doc("a", "\0")], batch_size=batch_size)
    assert counts(result) == {"inserted": 1, "failed": 2}
    assert store.get(["a"])[0].text == "good"


def test_five_kinds_of_bad_documents_among_good_ones(store):
    given = [
        doc("good 1", embedding=vector(1)),
        doc("x" * 1025),
        doc("nul", "a\0b"),
        doc("good 2"),
        doc("short", embedding=[1.0, 2.0]),
        doc("nan", embedding=vector(float("nan"))),
        doc("zero", embedding=[0.0] * 8),
        doc("metadata", metadata={"a": object()}),
        doc("good 3"),
        {"text": "nameless"},
        "no document",
    ]
    result = store.batch_upsert(given)
    assert counts(result) == {"inserted": 3, "failed": 8}
    reasons = dict(result.errors)
    assert reasons["x" * 1025] == "id has 1025 bytes; expected at most 1024"
    assert "NUL" in reasons["nul"]
    assert "2 dimensions, the store expects 8" in reasons["short"]
    assert "NaN" in reasons["nan"]
    assert "all zeros" in reasons["zero"]
    assert "not JSON-serializable" in reasons["metadata"]
    assert [reason for id_, reason in result.errors if id_ == "None"] == [
        "id is missing; expected at least id and text",
        "got a str; expected a Document or a mapping",
    ]
    assert [d.id for d in store.get([f"good {n}" for n in (1, 2, 3)])] == ["good 1", "good 2", "good 3"]


def test_what_was_written_reads_back_as_it_was(store):
    metadata = {"workspace": "w", "a": [1, 2.5, None, {"ä": "😀"}], "big": 2**63, "small": 5e-324, "yes": True}
    exact = np.array([0.1, -1e-30, 3e38, 1, 2, 3, 4, 5], np.float32)
    store.batch_upsert([doc("ä/1", "line\r\n\ttext 😀\\N", metadata=metadata, source_id="s", embedding=exact)])
    [stored] = store.get(["ä/1"])
    assert (stored.text, stored.metadata, stored.source_id) == ("line\r\n\ttext 😀\\N", metadata, "s")
    assert stored.embedding.tobytes() == exact.tobytes()


def test_the_encoding_of_the_environment_changes_no_text(database_url, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    given = {"id": "ä", "text": "é 漢 🦉", "source_id": "ß", "metadata": {"workspace": "ø", "ключ": "значение"}}
    with db.connect(database_url, False, maintenance_on_close=False) as store:
        assert store.batch_upsert([given]).inserted == 1
        [stored] = store.get(["ä"])
        assert (stored.text, stored.source_id, stored.metadata) == (given["text"], "ß", given["metadata"])
        assert store.batch_upsert([{**given, "text": "ü"}]).updated == 1
        assert store.get(["ä"])[0].text == "ü"


def test_a_database_of_another_encoding_refuses_what_it_cannot_hold(postgres_url):
    name = f"latin_{os.getpid()}"
    execute(
        postgres_url, SQL("CREATE DATABASE {} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0").format(Identifier(name))
    )
    try:
        url = database_at(postgres_url, name)
        upgrade(url)
        with db.connect(url, False, maintenance_on_close=False) as store:
            result = store.batch_upsert([{"id": "a", "text": "é"}, {"id": "b", "text": "漢"}])
            assert (result.inserted, result.failed, result.errors[0][0]) == (1, 1, "b")
            assert "has no equivalent in encoding" in result.errors[0][1]
            assert store.get(["a"])[0].text == "é"
    finally:
        execute(postgres_url, SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))


def test_what_was_read_can_be_written_back_and_changes_nothing(store):
    store.batch_upsert([doc("a", embedding=vector(1), chunks=[{"text": "c", "embedding": vector(2)}]), doc("b")])
    assert counts(store.batch_upsert(store.get(["a", "b"]))) == {"unchanged": 2}


def test_a_server_side_refusal_is_isolated_in_few_transactions(store, sql):
    sql("ALTER TABLE embeddings ADD CONSTRAINT no_swearing CHECK (text <> 'damn')")
    given = [doc(f"{n:04}", "damn" if n == 397 else f"text {n}") for n in range(1024)]
    result = store.batch_upsert(given, batch_size=1024)
    assert counts(result) == {"inserted": 1023, "failed": 1}
    [(id_, reason)] = result.errors
    assert id_ == "0397"
    assert reason.startswith("refused by the server: ")
    assert "no_swearing" in reason
    # 10 halvings from 1024 to 1 leave 10 halves that the culprit is not in.
    assert sql("SELECT count(*) FROM write_log") == [(10,)]


def test_what_a_trigger_refuses_lands_in_errors_with_the_servers_words(store, sql):
    sql("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN IF NEW.text = 'bad' THEN RAISE EXCEPTION 'we do not want %', NEW.id; END IF; RETURN NEW; END $$
    """)
    sql("CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON embeddings FOR EACH ROW EXECUTE FUNCTION refuse()")
    result = store.batch_upsert([doc("a", "bad"), doc("b"), doc("c", "bad"), doc("d")])
    assert counts(result) == {"inserted": 2, "failed": 2}
    assert sorted(result.errors) == [
        ("a", "refused by the server: we do not want a"),
        ("c", "refused by the server: we do not want c"),
    ]
    assert counts(store.batch_upsert([doc("b", "bad"), doc("d", "fine")])) == {"updated": 1, "failed": 1}
    assert store.get(["b"])[0].text == "text"


def test_a_refused_document_is_logged_nowhere_and_the_others_once(store, sql):
    sql("ALTER TABLE embeddings ADD CHECK (source_id <> 'bad')")
    store.batch_upsert([doc("a", source_id="bad"), doc("b", source_id="good")])
    assert sql("SELECT tags FROM write_log") == [(["source:good", "store"],)]


def test_a_generator_is_read_one_batch_ahead_of_what_is_written_and_not_kept(store):
    class Given(dict):
        pass

    alive = weakref.WeakSet()
    most, read, told = 0, 0, []

    def source():
        nonlocal most, read
        for n in range(500):
            given = Given(id=f"{n}", text=f"text {n}")
            alive.add(given)
            most, read = max(most, len(alive)), n + 1
            yield given
            del given

    def progress(processed, total):
        told.append((processed, total, read))

    # WeakSet needs a hash that a dict lacks.
    Given.__hash__ = object.__hash__
    gc.collect()
    assert counts(store.batch_upsert(source(), batch_size=50, on_progress=progress)) == {"inserted": 500}
    assert told == [(n, None, min(n + 50, 500)) for n in range(50, 501, 50)]
    assert most <= 101


def test_a_write_tells_when_new_rows_are_sent_before_the_server_has_answered(store, monkeypatch):
    sent, seen = threading.Event(), {}
    monkeypatch.setattr(db.faults, "point", lambda name: seen.setdefault(name, sent.is_set()))
    new = [prepare(doc(id_), store._parts.model) for id_ in "ab"]
    write = partial(UpsertBatch(new, set(), "m").write, sent=sent)
    run_write(store._parts.database, write, after_commit=lambda write: None)
    assert (seen["upsert.locked"], seen["upsert.copied_documents"]) == (False, True)


def test_progress_of_a_list_knows_the_total_and_counts_bad_ones_too(store):
    told = []
    store.batch_upsert([doc("a"), doc(""), doc("b")], batch_size=2, on_progress=lambda *t: told.append(t))
    assert told == [(2, 3), (3, 3)]


def test_an_empty_input_is_no_error(store, sql):
    assert counts(store.batch_upsert([])) == {}
    assert counts(store.batch_upsert(iter(()))) == {}
    assert sql("SELECT count(*) FROM write_log") == [(0,)]


@pytest.mark.parametrize("batch_size", [0, -1, 100_001, 2.5, "10"])
def test_a_batch_size_out_of_range_is_refused(store, batch_size):
    with pytest.raises(db.ValidationError, match="batch_size is"):
        store.batch_upsert([doc("a")], batch_size=batch_size)


def test_an_exception_of_the_generator_passes_through_and_earlier_batches_stay(store):
    def source():
        yield doc("a")
        yield doc("b")
        raise RuntimeError("file is broken")

    with pytest.raises(RuntimeError, match="file is broken"):
        store.batch_upsert(source(), batch_size=1)
    assert [d.id for d in store.get(["a", "b"])] == ["a", "b"]


# -- parts that are absent, and parts that are given empty ---------------------------------------------------


def test_an_absent_vector_stays_and_none_removes_it(store, sql):
    store.batch_upsert([doc("a", embedding=vector(1, 2))])
    assert counts(store.batch_upsert([doc("a", "other")])) == {"updated": 1}
    assert store.get(["a"])[0].embedding.tolist() == vector(1, 2)
    assert counts(store.batch_upsert([Document("a", "other", embedding=None)])) == {"updated": 1}
    assert sql("SELECT embedding, vector_hash, model_id FROM embeddings") == [(None, None, None)]
    assert counts(store.batch_upsert([Document("a", "other", embedding=None)])) == {"unchanged": 1}


def test_a_vector_alone_can_change(store):
    store.batch_upsert([doc("a", embedding=vector(1))])
    assert counts(store.batch_upsert([doc("a", embedding=vector(1.0000001))])) == {"updated": 1}
    assert counts(store.batch_upsert([doc("a", embedding=np.array(vector(1.0000001)))])) == {"unchanged": 1}


def test_a_batch_without_any_vector_needs_no_model(database_url, redis_url):
    with db.connect(database_url, redis_url) as store:
        assert counts(store.batch_upsert([doc("a"), Document("b", "t", embedding=None)])) == {"inserted": 2}
        assert store.model is None


# -- times ---------------------------------------------------------------------------------------------------

OLD = datetime(2001, 2, 3, 4, 5, 6, 789012, tzinfo=UTC)
NEWER = datetime(2011, 2, 3, 4, 5, 6, 789013, tzinfo=UTC)


def test_absent_times_are_the_time_of_the_write(store):
    before = datetime.now(UTC)
    store.batch_upsert([doc("a")])
    [first] = store.get(["a"])
    assert before <= first.created_at == first.updated_at <= datetime.now(UTC)
    store.batch_upsert([doc("a", "other")])
    [second] = store.get(["a"])
    assert second.created_at == first.created_at
    assert second.updated_at > first.updated_at


def test_given_times_are_kept_to_the_microsecond(store):
    store.batch_upsert([doc("a", created_at=OLD, updated_at=NEWER)])
    [stored] = store.get(["a"])
    assert (stored.created_at, stored.updated_at) == (OLD, NEWER)
    store.batch_upsert([doc("a", "other", created_at=NEWER, updated_at=OLD)])
    [stored] = store.get(["a"])
    assert (stored.created_at, stored.updated_at) == (NEWER, OLD)


def test_a_new_row_is_created_now_even_where_it_was_updated_long_ago(store):
    before = datetime.now(UTC)
    store.batch_upsert([doc("a", updated_at=OLD)])
    [stored] = store.get(["a"])
    assert stored.updated_at == OLD
    assert stored.created_at >= before


def test_other_times_alone_are_no_change(store):
    store.batch_upsert([doc("a", created_at=OLD)])
    assert counts(store.batch_upsert([doc("a", created_at=NEWER)])) == {"unchanged": 1}
    assert store.get(["a"])[0].created_at == OLD
