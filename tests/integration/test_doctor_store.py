"""What the doctor finds in a store: each fault is really made, told, mended where that is safe, and gone after."""

import threading

import psycopg
import pytest

import db
from db.checks.base import Examination, Limits
from db.checks.indexes import invalid_indexes
from db.locks import LOCK_CLASS, Purpose
from tests.integration.examining import Examiner, plain_owner

VECTOR = [1.0, *[0.0] * 7]


def fill(store, count=20):
    store.batch_upsert(
        {"id": f"d{n}", "text": "t", "embedding": [1.0, n, *[0.0] * 6], "chunks": [{"text": "c", "embedding": VECTOR}]}
        for n in range(count)
    )


@pytest.fixture
def examine(database_url, store):
    fill(store)
    return Examiner(database_url)


def valid(sql, index):
    return sql("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)", index) == [(True,)]


def interrupted(database_url, statement, until, sql):
    """Run `statement` until it waits for a transaction that is open, then end its session, as a crash would."""
    started = threading.Event()

    def build():
        with psycopg.connect(database_url, autocommit=True) as connection:
            pids.append(connection.info.backend_pid)
            started.set()
            with pytest.raises(psycopg.OperationalError):
                connection.execute(statement)

    pids = []
    with psycopg.connect(database_url) as open_one:
        open_one.execute("SELECT count(*) FROM embeddings")
        open_one.execute("INSERT INTO embeddings (id, text) VALUES ('uncommitted', 't')")
        thread = threading.Thread(target=build)
        thread.start()
        started.wait(10)
        until(lambda: sql("SELECT count(*) FROM pg_index WHERE NOT indisvalid") != [(0,)])
        yield
        sql("SELECT pg_terminate_backend(%s, 10000)", pids[0])
        thread.join(10)
        open_one.rollback()
    yield


# -- indexes -------------------------------------------------------------------------------------------------


def test_an_index_whose_build_was_killed_halfway_is_built_again(examine, sql, database_url, until):
    sql("DROP INDEX embeddings_workspace_idx")
    build = "CREATE INDEX CONCURRENTLY embeddings_workspace_idx ON embeddings (workspace)"
    steps = interrupted(database_url, build, until, sql)
    next(steps)
    being_built = examine.one("invalid indexes")
    assert (being_built.status, "is being built by process" in being_built.evidence) == ("ok", True)
    next(steps)
    found = examine.mends("invalid indexes")
    assert (found.status, "embeddings_workspace_idx" in found.evidence) == ("fail", True)
    assert valid(sql, "embeddings_workspace_idx")


def test_what_a_killed_reindex_left_is_dropped(examine, sql, database_url, until):
    steps = interrupted(database_url, "REINDEX INDEX CONCURRENTLY embeddings_vector_idx", until, sql)
    list(steps)
    assert sql("SELECT count(*) FROM pg_class WHERE relname LIKE '%\\_ccnew'") == [(1,)]
    found = examine.mends("invalid indexes")
    assert "_ccnew" in found.evidence
    assert "DROP INDEX CONCURRENTLY" in found.remedy
    assert sql("SELECT count(*) FROM pg_class WHERE relname LIKE '%\\_cc%'") == [(0,)]
    assert valid(sql, "embeddings_vector_idx")


@pytest.mark.parametrize("index", ["embeddings_vector_idx", "chunks_document_id_chunk_index_key", "embeddings_pkey"])
def test_an_invalid_index_is_built_again_whatever_depends_on_it(examine, sql, index):
    sql(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{index}'::regclass")
    assert index in examine.mends("invalid indexes").evidence
    assert valid(sql, index)


def test_a_build_in_a_copy_of_the_database_hides_no_invalid_index(
    examine, sql, make_database, servers, postgres_version, until
):
    """Its tables have the same OIDs."""
    copy = make_database(servers.template(postgres_version))
    with psycopg.connect(copy, autocommit=True) as there:

        def run(statement, *values):
            return there.execute(statement, values or None).fetchall()

        build = "CREATE INDEX CONCURRENTLY other_idx ON embeddings (workspace, id)"
        steps = interrupted(copy, build, until, run)
        next(steps)
        [(same,)] = there.execute("SELECT 'embeddings'::regclass::oid").fetchall()
        assert sql("SELECT 'embeddings'::regclass::oid") == [(same,)]
        sql("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'embeddings_vector_idx'::regclass")
        assert "embeddings_vector_idx" in examine.mends("invalid indexes").evidence
        next(steps)


@pytest.mark.parametrize("index", ["twice_ccnew", "embeddings_vector_idx", "embeddings_workspace_idx"])
def test_an_index_that_has_become_valid_since_is_left_alone(examine, sql, index):
    sql("CREATE INDEX twice_ccnew ON embeddings (source_id)")
    made = sql("SELECT %s::regclass::oid", index)
    sql(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{index}'::regclass")
    with Examination(examine.settings, Limits()) as examination:
        examination.open()
        [found] = invalid_indexes.look(examination)
        sql(f"UPDATE pg_index SET indisvalid = true WHERE indexrelid = '{index}'::regclass")
        files = "SELECT oid, relfilenode FROM pg_class WHERE oid = %s"
        before = sql(files, made[0][0])
        with pytest.raises(db.BusyError, match=f"{index} is no longer invalid"):
            found.mend()
    assert sql(files, made[0][0]) == before


def test_an_index_that_another_role_builds_unseen_is_left_alone(examine, sql, database_url, until):
    sql("DROP INDEX embeddings_workspace_idx")
    build = "CREATE INDEX CONCURRENTLY embeddings_workspace_idx ON embeddings (workspace)"
    with plain_owner(database_url) as url:
        steps = interrupted(database_url, build, until, sql)
        next(steps)
        found = Examiner(url).one("invalid indexes", fix=True)
        next(steps)
        assert (found.status, found.fixed) == ("warn", False)
        assert "not permitted to see that; left alone" in found.evidence
        assert Examiner(url).one("invalid indexes", fix=True).fixed


@pytest.mark.parametrize(
    "index", ["embeddings_created_at_idx", "write_log_undelivered_idx", "embedding_models_one_active_idx"]
)
def test_a_missing_index_is_built_as_the_migrations_made_it(examine, sql, index):
    definition = sql("SELECT pg_get_indexdef(%s::regclass)", index)
    sql(f"DROP INDEX {index}")
    assert index in examine.mends("missing indexes").evidence
    assert sql("SELECT pg_get_indexdef(%s::regclass)", index) == definition


def test_a_missing_key_is_told_with_the_sql_that_makes_it(examine, sql):
    sql("ALTER TABLE chunks DROP CONSTRAINT chunks_document_id_chunk_index_key")
    found = examine.one("missing indexes", fix=True)
    assert (found.status, found.fixed) == ("fail", False)
    for statement in found.remedy.split("'")[1::2]:
        sql(statement)
    assert examine.one("missing indexes").status == "ok"


def test_a_key_of_the_tables_that_a_rebuild_replaced_is_not_taken_for_it(examine, sql):
    sql("CREATE SCHEMA vectorkeep_previous")
    sql("CREATE TABLE vectorkeep_previous.chunks (LIKE public.chunks INCLUDING ALL)")
    for name in ("chunks_document_id_chunk_index_key", "chunks_document_id_fkey"):
        sql(f"ALTER TABLE public.chunks DROP CONSTRAINT {name}")
        sql(f"ALTER TABLE vectorkeep_previous.chunks DROP CONSTRAINT IF EXISTS {name}")
        sql(f"ALTER TABLE vectorkeep_previous.chunks ADD CONSTRAINT {name} CHECK (true)")
    assert examine.one("missing indexes").status == "fail"
    assert examine.statuses()["constraints"] == "fail"


def test_a_vector_index_that_cannot_be_built_leaves_nothing_behind_and_is_told(examine, sql):
    sql("DROP INDEX embeddings_vector_idx")
    sql("UPDATE embeddings SET embedding = '[1,2,3]' WHERE id = (SELECT min(id) FROM embeddings)")
    found = examine.one("vector indexes", fix=True)
    assert (found.status, found.fixed) == ("fail", False)
    assert "not fixed: expected 8 dimensions, not 3" in found.evidence
    assert sql("SELECT to_regclass('embeddings_vector_idx')") == [(None,)]


def test_a_vector_index_that_an_interrupted_bulk_load_left_out_is_built(examine, sql, database_url):
    sql("DROP INDEX embeddings_vector_idx")
    with psycopg.connect(database_url, autocommit=True) as loader:
        loader.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.BULK_LOAD)))
        found = examine.one("vector indexes", fix=True)
        assert (found.status, found.fixed) == ("ok", False)
        assert f"a bulk load runs in process {loader.info.backend_pid}" in found.evidence
        assert not valid(sql, "embeddings_vector_idx")
    found = examine.mends("vector indexes")
    assert found.status == "fail"
    assert valid(sql, "embeddings_vector_idx")


def test_an_index_that_another_builds_is_left_to_it(examine, sql, admin):
    sql("DROP INDEX chunks_source_id_idx")
    for purpose in (Purpose.INDEX_BUILD, Purpose.BULK_LOAD, Purpose.MAINTENANCE):
        sql("SELECT pg_advisory_lock(%s, %s)", LOCK_CLASS, int(purpose))
        found = examine.one("missing indexes", fix=True)
        sql("SELECT pg_advisory_unlock_all()")
        assert found.status == "fail"
        assert f"not fixed: {purpose.name.lower()} is locked by process {admin.info.backend_pid}" in found.evidence
    assert examine.one("missing indexes", fix=True).fixed


def test_a_role_that_may_not_build_is_told_so(examine, sql, url_as):
    sql("DROP INDEX chunks_vector_idx")
    [(name,)] = sql("SELECT current_database()")
    role = f"{name}_worker"
    sql(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    try:
        sql(f"GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO {role}")
        found = Examiner(url_as(role, "pw")).one("vector indexes", fix=True)
        assert (found.status, found.fixed) == ("fail", False)
        assert "not fixed: this role may not build it" in found.evidence
    finally:
        sql(f"DROP OWNED BY {role}")
        sql(f"DROP ROLE {role}")


# -- rows ----------------------------------------------------------------------------------------------------


def unbind(sql):
    sql("ALTER TABLE chunks DROP CONSTRAINT chunks_document_id_fkey")
    sql("INSERT INTO chunks (id, document_id, chunk_index, text) VALUES ('dangling', 'nobody', 0, 't')")
    sql("""
        ALTER TABLE chunks ADD CONSTRAINT chunks_document_id_fkey
        FOREIGN KEY (document_id) REFERENCES embeddings (id) ON DELETE CASCADE NOT VALID
    """)


def test_a_dangling_chunk_is_told_and_left_to_cleanup(examine, store, sql):
    unbind(sql)
    found = examine.one("orphans", fix=True)
    assert found.status == "warn"
    assert found.evidence.startswith("1 chunks without a document")
    [key] = [one for one in examine.findings if one.check == "constraints"]
    assert (key.status, key.remedy, key.fixed) == ("fail", "vectorkeep cleanup", False)
    assert sql("SELECT count(*) FROM chunks WHERE id = 'dangling'") == [(1,)]
    store.cleanup_orphaned()
    assert examine.one("orphans").status == "ok"
    assert examine.statuses()["constraints"] == "ok"


def test_the_foreign_key_is_validated_once_no_chunk_dangles(examine, sql):
    unbind(sql)
    sql("DELETE FROM chunks WHERE id = 'dangling'")
    assert "chunks_document_id_fkey" in examine.mends("constraints").evidence
    assert sql("SELECT convalidated FROM pg_constraint WHERE conname = 'chunks_document_id_fkey'") == [(True,)]


def test_a_foreign_key_that_is_gone_is_told(examine, sql):
    sql("ALTER TABLE chunks DROP CONSTRAINT chunks_document_id_fkey")
    found = examine.one("constraints")
    assert found.status == "fail"
    sql(found.remedy.split("'")[1])
    assert "is not validated" in examine.one("constraints").evidence


def test_rows_without_vectors_are_counted(examine, sql):
    sql("UPDATE embeddings SET embedding = NULL WHERE id IN ('d1', 'd2')")
    sql("UPDATE chunks SET embedding = NULL WHERE document_id IN ('d2', 'd3')")
    found = examine.one("missing vectors")
    assert found.status == "warn"
    assert found.evidence.startswith("1 documents and 2 chunks")


def test_documents_that_are_found_by_their_chunks_lack_no_vector(examine, sql):
    sql("UPDATE embeddings SET embedding = NULL")
    found = examine.one("missing vectors")
    assert (found.status, found.evidence) == ("ok", "nothing lacks a vector")


def test_vectors_of_another_model_or_length_are_told(examine, sql):
    sql("UPDATE embeddings SET model_id = 'other' WHERE id = 'd4'")
    found = examine.one("one model")
    assert (found.status, "1 embeddings of the model other, 'd4'" in found.evidence) == ("fail", True)
    sql("DROP INDEX chunks_vector_idx")
    sql("UPDATE chunks SET embedding = '[1,2,3]' WHERE document_id = 'd5'")
    assert "1 chunks of 3 dimensions" in examine.one("one model").evidence


def test_a_vector_that_was_kept_while_its_text_changed_is_no_other_models(examine, store, sql):
    store.batch_upsert([{"id": "d6", "text": "another"}])
    found = examine.one("one model")
    assert (found.status, found.remedy) == ("warn", "ingest their sources again with an embedder")
    assert found.evidence.startswith("1 embeddings, 'd6' among them, with no model on record: kept while")
    sql("UPDATE embeddings SET model_id = 'other' WHERE id = 'd4'")
    found = examine.one("one model")
    assert (found.status, "'d4' among them" in found.evidence) == ("fail", True)
    assert "none" not in found.evidence


def test_vectors_without_a_registered_model_are_told(examine, sql):
    sql("DELETE FROM embedding_models")
    assert examine.one("one model").status == "fail"


def test_fixing_changes_no_document_and_no_chunk(examine, sql):
    unbind(sql)
    sql("DROP INDEX embeddings_vector_idx")
    sql("DROP INDEX chunks_source_id_idx")
    sql("UPDATE embeddings SET embedding = NULL WHERE id = 'd1'")
    state = "SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM {} AS t"
    before = [sql(state.format(table)) for table in ("embeddings", "chunks")]
    assert any(found.fixed for found in examine("vector indexes", fix=True))
    assert [sql(state.format(table)) for table in ("embeddings", "chunks")] == before


# -- keeping -------------------------------------------------------------------------------------------------


def test_autovacuum_that_is_off_for_a_table_is_told_and_dead_rows_with_it(examine, sql, until):
    sql("ALTER TABLE embeddings SET (autovacuum_enabled = false)")
    sql("ALTER TABLE chunks SET (autovacuum_enabled = false)")
    sql("INSERT INTO embeddings (id, text) SELECT 'x' || n, 't' FROM generate_series(1, 300) AS n")
    sql("DELETE FROM embeddings WHERE id LIKE 'x%'")
    sql("SELECT pg_stat_force_next_flush()")
    off = {found.evidence: found for found in examine("autovacuum", dead_rows=100)}
    until(lambda: any("300 dead rows" in found.evidence for found in examine("autovacuum", dead_rows=100)))
    sql(off["autovacuum is off for embeddings"].remedy.split("'")[1])
    sql(off["autovacuum is off for chunks"].remedy.split("'")[1])
    sql("VACUUM embeddings")
    until(lambda: examine.one("autovacuum", dead_rows=100).status == "ok")


def test_maintenance_that_was_long_ago_or_never_is_told(examine, store, sql):
    assert examine.one("maintenance").status == "ok"
    sql("UPDATE embedding_models SET created_at = now() - interval '30 days'")
    assert "never ended well" in examine.one("maintenance").evidence
    store.maintain()
    assert examine.one("maintenance").status == "ok"
    sql("UPDATE maintenance_runs SET finished_at = now() - interval '10 days'")
    found = examine.one("maintenance")
    assert (found.status, found.evidence) == ("warn", "ended well 10 days ago")


def test_a_pause_whose_owner_is_gone_is_ended_and_another_is_not(examine, store, sql, until):
    store.pause_ingestion("a rebuild")
    held = examine.one("pause", fix=True)
    assert (held.status, held.fixed) == ("ok", False)
    assert "a rebuild" in held.evidence
    [(pid,)] = sql("SELECT owner_pid FROM ingestion_pause")
    sql("SELECT pg_terminate_backend(%s, 10000)", pid)
    assert "a rebuild" in examine.mends("pause").evidence
    assert sql("SELECT count(*) FROM ingestion_pause") == [(0,)]


def test_what_a_killed_rebuild_left_is_cleared_and_one_that_runs_is_left_alone(examine, sql):
    sql("INSERT INTO rebuild_runs (state, model_id) VALUES ('filling', 'test-model')")
    sql("CREATE SCHEMA vectorkeep_shadow CREATE TABLE embeddings (LIKE public.embeddings)")
    with psycopg.connect(examine.settings.database_url, autocommit=True) as running:
        running.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, int(Purpose.REBUILD)))
        assert examine.one("rebuild", fix=True).status == "ok"
        assert sql("SELECT to_regclass('vectorkeep_shadow.embeddings') IS NOT NULL") == [(True,)]
    assert "interrupted in 'filling'" in examine.mends("rebuild").evidence
    assert sql("SELECT to_regclass('vectorkeep_shadow.embeddings')") == [(None,)]
    assert sql("SELECT count(*) FROM embeddings") == [(20,)]


def test_what_the_statistics_say_of_an_index_is_told(examine, sql):
    assert examine.one("index health").status == "ok"
    sql("CREATE INDEX twice ON embeddings (source_id)")
    told = examine("index health")
    assert [found.status for found in told] == ["warn"]
    assert "twice" in told[0].evidence


def test_calls_that_got_no_connection_are_counted(examine, database_url):
    small = db.connect(database_url, False, pool_max=1, pool_timeout_s=1)
    with small, small.pool.connection(), pytest.raises(db.UnavailableError):
        small.search(VECTOR)
    found = examine.one("pool")
    assert found.status == "warn"
    assert found.evidence.startswith("1 calls in the last day")
