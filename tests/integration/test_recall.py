"""Measured recall against NumPy's exact answers, on vectors of real texts; and each way in which it could lie."""

import threading

import numpy as np
import psycopg
import pytest
from psycopg import sql as compose

import db
from db import recall as recall_module
from db import search as search_module
from db.filters import Filter
from db.page_sample import page_samples
from db.recall import RecallRequest, measure_recall
from db.recall_sample import Questions, choose_questions
from db.registry import active_model
from db.search import Query, Searcher
from db.tuning import tune_ef_search, tuning_due
from db.vectors import BinaryVector, encode
from tests.integration.real_texts import DIMENSIONS, nearest, scaled, vectors
from tests.servers import database_at, execute

TEXTS, HELD_OUT = 4_000, 300


def documents(rows, prefix="d"):
    return [{"id": f"{prefix}{n:05}", "text": f"text {n}", "embedding": vector} for n, vector in enumerate(rows)]


def unit_rows(count, dimensions=8, seed=3):
    return np.random.default_rng(seed).standard_normal((count, dimensions)).astype(np.float32)


def number(id_):
    return int(id_[1:])


# -- real texts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    """Stored vectors, and others that are only asked for."""
    rows = np.random.default_rng(1).permutation(vectors(TEXTS + HELD_OUT))
    return rows[HELD_OUT:], rows[:HELD_OUT]


@pytest.fixture(scope="module")
def texts_url(servers, postgres_url, postgres_version, texts):
    """A database that holds the texts, made once for this module."""
    name = compose.Identifier(f"vk_texts_{threading.get_native_id()}")
    template = compose.Identifier(servers.template(postgres_version))
    execute(postgres_url, compose.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, template))
    url = database_at(postgres_url, name.as_string().strip('"'))
    with db.connect(url, False, model_id="texts", dimensions=DIMENSIONS, query_samples=0) as store:
        with store.bulk_load():
            assert store.batch_upsert(documents(texts[0])).failed == 0
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("ANALYZE embeddings")
    yield url
    execute(postgres_url, compose.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture
def texts_store(texts_url):
    with db.connect(texts_url, False, query_samples=0, target_recall=0.99) as store:
        yield store
        with store.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM query_samples")
            connection.exec_driver_sql("DELETE FROM recall_measurements")
            connection.exec_driver_sql("UPDATE embedding_models SET ef_search = NULL, ef_search_reason = NULL")


# Of 2,000 answers one may be as near as the last that counts, but for the rounding of float32.
TO_THE_LAST_ANSWER = 1.5 / 2000


def numpys_recall(store, stored, questions, ef_search, k=10):
    """Of the answers that NumPy gives, the share that the store's searches find. Questions: (vector, own row)."""
    found, unit = 0, scaled(stored)
    for vector, own in questions:
        reach, distances = nearest(unit, vector, k, without=own)
        hits = [number(hit.id) for hit in store.search(vector, k if own is None else k + 1, ef_search=ef_search)]
        hits = [n for n in hits if n != own][:k]
        found += sum(distances[n] <= reach + 1e-6 for n in hits)
    return found / (k * len(questions))


def ask(url, questions):
    """Leave `questions` behind as if they had been searched for."""
    with psycopg.connect(url, autocommit=True) as connection:
        db.vectors.register(connection)
        connection.cursor().executemany(
            "INSERT INTO query_samples (model_id, level, embedding) VALUES ('texts', 'documents', %s::vector)",
            [(BinaryVector(encode(vector)),) for vector in questions],
        )


@pytest.fixture
def questions(monkeypatch):
    """Of each measurement, what it asked: rows are picked at random."""
    seen, choose = [], recall_module.choose_questions

    def kept(*arguments):
        seen.append(choose(*arguments).asked)
        return Questions(seen[-1], 0)

    monkeypatch.setattr(recall_module, "choose_questions", kept)
    return seen


def test_the_figure_is_numpys_to_the_last_answer(texts_store, texts_url, texts, questions):
    """Few candidates show it best where the scan of a question differs from that of a user's search."""
    stored, asked = texts
    ask(texts_url, asked[:100])
    report = texts_store.measure_recall(sample=200, ef_search=10)
    truth = numpys_recall(texts_store, stored, as_asked(questions[0]), ef_search=10)
    assert report.recall == pytest.approx(truth, abs=TO_THE_LAST_ANSWER)
    assert report.interval[0] < report.recall < report.interval[1] <= 1
    assert (report.sample, report.queries_from_searches, report.queries_from_store) == (200, 100, 100)
    assert (report.through_index, report.looked_up, report.unreachable, report.notes) == (200, 100, 0, [])
    only_asked = numpys_recall(texts_store, stored, [(vector, None) for vector in asked[:100]], ef_search=10)
    assert only_asked < report.recall  # stored vectors flatter an index, which has been built around them


def as_asked(questions):
    """For numpys_recall, what a measurement asked."""
    return [(question.vector, question.row_id and number(question.row_id)) for question in questions]


def test_searches_are_tuned_to_the_target_and_new_stores_use_it(texts_store, texts_url, texts, monkeypatch, capsys):
    stored, asked = texts
    ask(texts_url, asked[:60])
    before = texts_store.measure_recall(sample=60, ef_search=10)
    with texts_store._parts.database.maintenance() as connection:
        model, settings = texts_store.model, texts_store.settings
        tuning = tune_ef_search(connection, model, settings, sample=60)
        [row] = connection.execute("SELECT ef_search, ef_search_reason FROM embedding_models").fetchall()
    assert row == (tuning.ef_search, tuning.reason)
    assert before.recall < 0.99
    assert tuning.ef_search > 10
    assert f"{tuning.ef_search} is the lowest that meets 0.99" in tuning.reason
    # The default of 100 may be the right one already: then nothing new is there to be confirmed.
    confirmed = next(iter(tuning.confirmed.values()), tuning.reports["documents"])
    assert confirmed.ef_search == tuning.ef_search
    questions = [(vector, None) for vector in asked[150:210]]
    truth = [numpys_recall(texts_store, stored, questions, ef) for ef in (10, tuning.ef_search)]
    assert truth[0] < truth[1]
    with capsys.disabled():
        print(f"\nef_search 10: {before.recall:.3f}, tuned {tuning.ef_search}: {confirmed.recall:.3f}; NumPy {truth}")

    used = []
    monkeypatch.setattr(search_module, "_prepare_scan", spied(search_module._prepare_scan, used))
    with db.connect(texts_url, False, query_samples=0) as store:
        store.search(asked[0])
        store.search(asked[0], ef_search=33)
    with db.connect(texts_url, False, query_samples=0, ef_search=100) as store:
        store.search(asked[0])
    texts_store._parts.model.refresh_tuning()
    texts_store.search(asked[0])
    assert used == [tuning.ef_search, 33, 100, tuning.ef_search]


def test_stored_vectors_alone_tune_no_search_below_the_default(texts_store, texts_url, admin):
    """They flatter the index: what suffices for them does not for others."""
    with texts_store._parts.database.maintenance() as connection:
        connection.execute("TRUNCATE query_samples")
        settings = texts_store.settings.model_copy(update={"target_recall": 0.8})
        tuning = tune_ef_search(connection, texts_store.model, settings, sample=100)
    [report] = tuning.reports.values()
    assert report.recommended_ef_search < 100
    assert tuning.ef_search == 100
    assert tuning.reason.startswith("not below 100, for only 0 queries of real searches are known")


def test_a_level_without_anything_to_search_for_leaves_the_other_to_be_tuned(database_url, sql):
    rows = unit_rows(5000, 64)
    with db.connect(database_url, False, model_id="m", dimensions=64) as store:
        with store.bulk_load():
            store.batch_upsert(
                {"id": f"d{n}", "text": "t", "chunks": [{"text": "c", "embedding": row}]} for n, row in enumerate(rows)
            )
        sql("VACUUM ANALYZE")
        with store._parts.database.maintenance() as connection:
            assert tuning_due(connection, store.model, store.settings).keys() == {"chunks"}
            tuning = tune_ef_search(connection, store.model, store.settings, sample=30)
    assert tuning.reports.keys() == {"chunks"}
    assert "chunks: of 30 queries" in tuning.reason


@pytest.mark.parametrize(("tuned", "due"), [(None, True), (39, True), (40, False), (60, False)])
def test_what_is_tuned_high_enough_is_not_measured_again_for_a_setting_that_is_too_low(filled, sql, tuned, due):
    """The other level may need more than this one."""
    filled.measure_recall(sample=20)
    sql("UPDATE recall_measurements SET recall = 0.9, target = 0.95, ef_search = 20, recommended_ef_search = 40")
    sql("UPDATE embedding_models SET ef_search = %s", tuned)
    with filled._parts.database.maintenance() as connection:
        found = tuning_due(connection, active_model(connection), filled.settings)
    assert ("documents" in found) == due


def test_a_few_rows_are_picked_out_of_a_part_of_the_pages(filled):
    with filled._parts.database.maintenance() as connection:
        part, whole = page_samples(connection, "embeddings", 2)
        of_part, of_whole = (
            connection.execute(compose.SQL("SELECT count(*) FROM embeddings {}").format(clause)).fetchone()[0]
            for clause in (part, whole)
        )
        assert of_part < of_whole == 3000
        for rows in (2, 500):  # a part of it would do, all of it is read
            chosen = choose_questions(connection, active_model(connection), "documents", Filter(), rows)
            assert len({question.row_id for question in chosen.asked}) == rows


@pytest.mark.parametrize("counters", ["go on", "begin anew"])
@pytest.mark.parametrize(("more", "why"), [(500, None), (700, "23% of the rows have changed since it was measured")])
def test_it_is_measured_again_where_much_has_changed(filled, sql, until, counters, more, why):
    filled.measure_recall(sample=20)
    sql("UPDATE recall_measurements SET recall = 1")
    if counters == "begin anew":
        sql("SELECT pg_stat_reset()")
    before = counted(filled, sql)
    filled.batch_upsert(documents(unit_rows(more, seed=4), prefix="e"))
    until(lambda: counted(filled, sql) == before + more)
    sql("ANALYZE embeddings")
    with filled._parts.database.maintenance() as connection:
        found = tuning_due(connection, active_model(connection), filled.settings)
    assert found.get("documents") == why


def spied(function, used):
    def call(connection, query, rows):
        used.append(query.ef_search)
        return function(connection, query, rows)

    return call


def test_where_no_ef_search_meets_the_target_what_was_tuned_stays(texts_store, texts_url, texts, admin):
    ask(texts_url, texts[1][:60])
    with texts_store._parts.database.maintenance() as connection:
        connection.execute("UPDATE embedding_models SET ef_search = 77")
        texts_store._parts.model.refresh_tuning()
        settings = texts_store.settings.model_copy(update={"target_recall": 1.0})
        tuning = tune_ef_search(connection, texts_store.model, settings, sample=60)
        [row] = connection.execute("SELECT ef_search, ef_search_reason FROM embedding_models").fetchall()
    [report] = tuning.reports.values()
    if report.recommended_ef_search is None:  # a lucky graph may find all of them
        assert row == (77, tuning.reason)
        assert "below the target of 1" in tuning.reason
        assert "no ef_search tried meets 1" in report.notes[-1]


# -- what could make it lie ----------------------------------------------------------------------------------


@pytest.fixture
def filled(store, sql, until):
    """3,000 random vectors under an index that was built over them."""
    with store.bulk_load():
        store.batch_upsert(documents(unit_rows(3000)))
    sql("ANALYZE embeddings")
    until(lambda: counted(store, sql) == 3000)
    return store


def counted(store, sql):
    """Rows that the server knows to be inserted: a session that is idle tells what it counted late."""
    with store.pool.connection() as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
    [(rows,)] = sql("SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'embeddings'")
    return rows


def index_scans(sql, name):
    sql("SELECT pg_stat_clear_snapshot()")
    [(count,)] = sql("SELECT idx_scan FROM pg_stat_all_indexes WHERE indexrelname = %s", name)
    return count


@pytest.mark.every_server
def test_the_exact_side_scans_no_vector_index_not_even_one_of_the_users_own(database_url, sql, until):
    """An index over the plain column serves the exact form, too, where index scans are not off and planned anew."""
    with db.connect(database_url, False, model_id="m", dimensions=8, distance="l2") as store:
        with store.bulk_load():
            store.batch_upsert(documents(unit_rows(3000)))
        sql("ALTER TABLE embeddings ALTER COLUMN embedding TYPE vector(8)")
        sql("CREATE INDEX own ON embeddings USING hnsw (embedding vector_l2_ops)")
        sql("ANALYZE embeddings")
        before = index_scans(sql, "own")
        report = store.measure_recall(sample=20)
        until(lambda: index_scans(sql, "embeddings_vector_idx") > 0)
        assert index_scans(sql, "own") == before
    assert report.through_index == 20


def test_an_exact_side_that_would_use_an_index_is_no_comparison(database_url, sql, monkeypatch):
    class Deaf(psycopg.Connection):
        """A session in which index scans cannot be switched off."""

        def execute(self, query, *args, **kwargs):
            return super().execute("SELECT" if "enable_indexscan" in str(query) else query, *args, **kwargs)

    with db.connect(database_url, False, model_id="m", dimensions=8, distance="l2") as store:
        with store.bulk_load():
            store.batch_upsert(documents(unit_rows(3000)))
        sql("ALTER TABLE embeddings ALTER COLUMN embedding TYPE vector(8)")
        sql("CREATE INDEX own ON embeddings USING hnsw (embedding vector_l2_ops)")
        sql("ANALYZE embeddings")
        monkeypatch.setattr("db.engine.psycopg.connect", Deaf.connect)
        with pytest.raises(db.MeasurementError, match="exact side would use the index own"):
            store.measure_recall(sample=5)


def test_a_cached_plan_of_any_values_does_not_reach_the_exact_side(filled, sql):
    """psycopg prepares after five runs, and a generic plan is kept whatever is set after it."""
    with filled._parts.database.maintenance() as connection:
        connection.prepare_threshold = 0
        connection.execute("SET plan_cache_mode = force_generic_plan")
        request = RecallRequest(ef_search=10, target=0.95, sample=40)
        first = measure_recall(connection, Searcher(), filled.model, request)
        assert (first.through_index, first.sample) == (40, 40)
        prepared = connection.execute("SELECT statement FROM pg_prepared_statements").fetchall()
    assert not [text for (text,) in prepared if "<#>" in text and "::halfvec" not in text]


def test_equal_distances_count_whichever_of_them_came(store, sql):
    rows = np.repeat(unit_rows(500), 4, axis=0)
    with store.bulk_load():
        store.batch_upsert(documents(rows))
    sql("ANALYZE embeddings")
    report = store.measure_recall(sample=100, k=1, ef_search=1)  # one candidate beside itself: any of three equals
    assert report.through_index == 100
    same_id = 0
    with store._parts.database.maintenance() as connection:
        for n in range(0, 2000, 20):
            query = Query(rows[n], 1, "documents", Filter(), 1, False, exclude_id=f"d{n:05}")
            [hit] = Searcher().search(connection, query, store.model).result
            same_id += number(hit.id) == (n // 4 * 4 if n % 4 else n + 1)
    assert same_id / 100 < 0.8 < 0.9 < report.recall


def test_the_row_itself_is_in_neither_answer(filled):
    rows = unit_rows(3000)
    with filled._parts.database.maintenance() as connection:
        for n in (0, 7, 2999):
            for exact in (False, True):
                query = Query(rows[n], 10, "documents", Filter(), 100, exact, exclude_id=f"d{n:05}")
                result = Searcher().search(connection, query, filled.model).result
                assert (len(result), result.exact) == (10, exact)
                assert f"d{n:05}" not in [hit.id for hit in result]
    lonely = np.eye(8, dtype=np.float32)[0]
    filled.batch_upsert([{"id": "x", "text": "t", "embedding": -lonely, "metadata": {"workspace": "w"}}])
    with pytest.raises(db.ValidationError, match="no question has an answer but itself"):
        filled.measure_recall(workspace="w")


def leave_out_of_the_index(sql, count):
    """Write rows that the vector index does not get: what a damaged graph cannot reach."""
    ready = "UPDATE pg_index SET indisready = %s WHERE indexrelid = 'embeddings_vector_idx'::regclass"
    sql(ready, False)
    sql(
        """
        INSERT INTO embeddings (id, text, embedding)
        SELECT 'lost' || n, 't', (SELECT array_agg(random() - 0.5) FROM generate_series(1, 8) WHERE n > 0)::vector
        FROM generate_series(1, %s) AS n
        """,
        count,
    )
    sql(ready, True)
    sql("ANALYZE embeddings")


def test_rows_that_the_index_lost_are_unreachable_and_missed(filled, sql):
    leave_out_of_the_index(sql, 900)
    report = filled.measure_recall(sample=120)
    share = report.unreachable / report.looked_up
    assert 0.05 < share < 0.5  # 900 of 3,900
    assert report.recall < 0.9
    assert report.recommended_ef_search is None
    assert "no ef_search tried meets 0.95" in report.notes[0]


def test_rows_without_a_vector_or_a_direction_are_no_damage(filled, sql):
    filled.batch_upsert([{"id": f"n{n}", "text": "t"} for n in range(500)])
    sql("UPDATE embeddings SET embedding = array_fill(0::real, ARRAY[8])::vector WHERE id < 'd00600'")
    sql("ANALYZE embeddings")
    report = filled.measure_recall(sample=150)
    assert 10 < report.zero_vectors < 60  # 600 of 3,000 with a vector
    assert report.sample == 150 - report.zero_vectors
    assert report.unreachable == 0
    index = filled.get_statistics().indexes[0]
    assert index.rows_without_vector == 500


def test_a_row_that_went_meanwhile_is_not_unreachable(filled, sql, monkeypatch):
    asked = recall_module.choose_questions

    def choose(*arguments):
        questions = asked(*arguments)
        filled.delete([question.row_id for question in questions.asked])
        return questions

    monkeypatch.setattr(recall_module, "choose_questions", choose)
    assert filled.measure_recall(sample=20).unreachable == 0


# -- searches that do without the index ----------------------------------------------------------------------


def test_without_an_index_it_says_so(filled, sql):
    sql("DROP INDEX embeddings_vector_idx")
    report = filled.measure_recall(sample=10)
    assert (report.recall, report.through_index, report.looked_up) == (1.0, 0, 0)
    assert report.notes == ["no search used the vector index: all rows were compared, as in a user's search of these"]


def test_a_filter_is_measured_as_its_users_search(filled):
    rows = [{**d, "metadata": {"workspace": "w", "even": n % 2 == 0}} for n, d in enumerate(documents(unit_rows(200)))]
    filled.batch_upsert(rows)
    report = filled.measure_recall(sample=30, workspace="w", where={"even": True})
    assert (report.recall, report.sample, report.through_index) == (1.0, 10, 0)  # more would tell nothing
    half = filled.measure_recall(sample=30, where={"even": {"$exists": False}})
    assert half.through_index == 30


def test_chunks_are_measured_as_documents_are(database_url, sql):
    store = db.connect(database_url, False, model_id="test-model", dimensions=64)
    with store, store.bulk_load():
        store.batch_upsert(
            [{"id": d["id"], "text": "t", "chunks": [{"text": "c", "embedding": d["embedding"]}]}
             for d in documents(unit_rows(5000, 64))]
        )  # fmt: skip
    sql("ANALYZE chunks")
    with db.connect(database_url, False) as store:
        report = store.measure_recall(level="chunks", sample=20)
    assert (report.level, report.through_index, report.looked_up) == ("chunks", 20, 20)
    assert report.recall > 0.9


# -- its bounds ----------------------------------------------------------------------------------------------


def test_past_its_time_it_reports_what_it_has(filled, monkeypatch):
    report = filled.measure_recall(sample=3000, deadline_s=2)
    assert 0 < report.sample < 3000
    assert "the time of 2 s was over" in report.notes[0]


def test_a_comparison_longer_than_the_whole_time_is_told(filled, sql):
    sql("""
        CREATE FUNCTION slow(id text) RETURNS bool LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1); RETURN true; END'
    """)
    sql("ALTER TABLE embeddings ENABLE ROW LEVEL SECURITY")
    sql("ALTER TABLE embeddings FORCE ROW LEVEL SECURITY")
    sql("CREATE POLICY slowly ON embeddings USING (slow(id))")
    [(name,)] = sql("SELECT current_database()")
    role = f"{name}_slow"
    sql(f"CREATE ROLE {role}")
    try:
        sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} SET role = {role}")
        with pytest.raises(db.UnavailableError, match="give it a longer deadline_s"):
            filled.measure_recall(sample=5, deadline_s=0.5)
    finally:
        sql(f"ALTER ROLE CURRENT_USER IN DATABASE {name} RESET role")
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")


@pytest.mark.parametrize("wrong", [{"k": 0}, {"sample": 0}, {"sample": True}, {"level": "x"}, {"ef_search": 1001},
                                   {"deadline_s": 0}, {"where": {"$x": 1}}])  # fmt: skip
def test_what_cannot_be_asked_is_refused(store, wrong):
    store.batch_upsert(documents(unit_rows(3)))
    with pytest.raises(db.ValidationError):
        store.measure_recall(**wrong)


def test_with_nothing_stored_there_is_nothing_to_measure(database_url, store):
    with pytest.raises(db.ValidationError, match="there is nothing to measure"):
        store.measure_recall()
    store.batch_upsert([{"id": "a", "text": "t"}])
    with pytest.raises(db.ValidationError, match="there is nothing to measure"):
        store.measure_recall()


def test_the_figures_are_kept(filled, sql):
    reports = [filled.measure_recall(sample=20), filled.measure_recall(sample=20, where={"no": {"$exists": False}})]
    kept = sql("SELECT level, filtered, k, sample, recall, ef_search, target FROM recall_measurements ORDER BY id")
    assert kept == [
        ("documents", filtered, 10, 20, report.recall, 100, 0.95)
        for filtered, report in zip([False, True], reports, strict=True)
    ]
    index = filled.get_statistics().indexes[0]
    assert (index.recall, index.recall_interval) == (reports[0].recall, reports[0].interval)


def test_a_role_that_may_not_write_measures_all_the_same(filled, sql, url_as, until):
    [(role,)] = sql("SELECT current_database() || '_reader'")
    sql(f"CREATE ROLE {role} LOGIN PASSWORD 'reader'")
    sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    try:
        with db.connect(url_as(role, "reader"), False) as reader:
            report = reader.measure_recall(sample=10)
        assert report.through_index == 10
        assert "not kept in recall_measurements: permission denied" in report.notes[0]
    finally:
        until(lambda: not sql("SELECT 1 FROM pg_stat_activity WHERE usename = %s", role))
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")
