"""Rebuilds: the new tables are the old ones in all that was not to change, and nobody meets anything in between."""

import os

import pytest
from alembic import command

import db
from db.config import Settings
from db.migrate import alembic_config
from db.pause import current_pause
from db.rebuild import rebuild
from db.rebuild_forecast import forecast
from db.rebuild_plan import RebuildPlan
from db.rebuild_runs import previous_tables, retire_previous, unfinished_rebuild
from db.rollback import roll_back
from db.swap import exchange
from tests.integration.counting import Counting, items
from tests.servers import database_of

DOCUMENTS = "SELECT * FROM embeddings ORDER BY id"
CHUNKS = "SELECT * FROM chunks ORDER BY id"

# All that a table has beside its rows, as text, schemas left out.
_CATALOG = """
    SELECT 'index', indexname, replace(indexdef, schemaname || '.', '') FROM pg_indexes
    WHERE schemaname = 'public' AND tablename IN ('embeddings', 'chunks')
    UNION ALL
    SELECT 'constraint', conname, conrelid::regclass || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid IN ('embeddings'::regclass, 'chunks'::regclass)
    UNION ALL
    SELECT 'table', relname, concat_ws(' ', reloptions, relrowsecurity, relforcerowsecurity, relreplident,
                                       pg_get_userbyid(relowner), (SELECT reloptions FROM pg_class AS toast
                                                                   WHERE toast.oid = pg_class.reltoastrelid))
    FROM pg_class WHERE oid IN ('embeddings'::regclass, 'chunks'::regclass)
    UNION ALL
    SELECT 'grant', relname, concat_ws(' ', grantee::regrole, privilege_type, is_grantable)
    FROM pg_class, aclexplode(coalesce(relacl, acldefault('r', relowner)))
    WHERE oid IN ('embeddings'::regclass, 'chunks'::regclass)
    UNION ALL
    SELECT 'column', attname, concat_ws(' ', attrelid::regclass, format_type(atttypid, atttypmod), attnotnull,
                                        attstorage, attstattarget, attoptions, attacl, attidentity,
                                        pg_get_expr(adbin, adrelid))
    FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid IN ('embeddings'::regclass, 'chunks'::regclass) AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT 'policy', policyname, concat_ws(' ', tablename, permissive, roles, cmd, qual, with_check) FROM pg_policies
    WHERE schemaname = 'public'
    UNION ALL
    SELECT 'trigger', tgname, tgenabled::text || pg_get_triggerdef(oid) FROM pg_trigger
    WHERE tgrelid IN ('embeddings'::regclass, 'chunks'::regclass) AND NOT tgisinternal
    UNION ALL
    SELECT 'comment', pg_describe_object(classoid, objoid, objsubid), description FROM pg_description
    WHERE pg_describe_object(classoid, objoid, objsubid) ~ 'embeddings|chunks'
      AND pg_describe_object(classoid, objoid, objsubid) !~ 'vectorkeep_previous'
    ORDER BY 1, 2, 3
"""


@pytest.fixture
def settings(database_url, redis_url):
    return Settings.load({"database_url": database_url, "redis_url": redis_url})


@pytest.fixture
def filled(embedding_store, embedder):
    """A store of all kinds of rows: of several chunks, without chunks, without a vector, detached."""
    long = " ".join(f"Sentence number {n} of a long text." for n in range(120))
    embedding_store.embed_batch([*items(40), {"id": "long", "text": long, "source_id": "s0"}])
    embedding_store.batch_upsert(
        [
            {"id": "bare", "text": "without a vector", "source_id": "mine", "metadata": {"workspace": "w"}},
            {"id": "own", "text": "with a vector of its own", "embedding": [1.0] * 16, "source_id": "mine"},
            {"id": "gone", "text": "to be detached", "source_id": "gone", "chunks": [{"text": "a piece"}]},
        ]
    )
    embedding_store.delete_by_source_id("gone", cascade=False)
    embedder.asked.clear()
    return embedding_store


def pack(items_, **changes):
    return lambda: [{**item, **changes} for item in items_]


@pytest.mark.every_server
def test_a_copy_is_equal_in_rows_and_catalog_and_costs_no_embedding(filled, settings, sql, embedder, database_url):
    before = sql(DOCUMENTS), sql(CHUNKS), sql(_CATALOG)
    oids = sql("SELECT 'embeddings'::regclass::oid, 'embeddings_vector_idx'::regclass::oid")
    result = rebuild(settings, RebuildPlan(), embedder)
    assert (sql(DOCUMENTS), sql(CHUNKS), sql(_CATALOG)) == before
    assert sql("SELECT 'embeddings'::regclass::oid, 'embeddings_vector_idx'::regclass::oid") != oids
    assert embedder.asked == []
    assert (result.documents, result.copied, result.ingested, result.embedded) == (43, 43, 0, 0)
    assert result.chunks == len(before[1])
    assert result.recall == result.recall_before == 1
    command.check(alembic_config(database_url))
    assert sql("SELECT count(*) FROM pg_namespace WHERE nspname = 'vectorkeep_shadow'") == [(0,)]
    assert sql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'chunks_vector_idx'::regclass") == [(True,)]


@pytest.fixture
def reader(sql):
    """A role that may read."""
    role = f"reader_{os.getpid()}"
    sql(f"CREATE ROLE {role}")
    yield role
    sql(f"DROP OWNED BY {role}")
    sql(f"DROP ROLE {role}")


ADDED = """
    ALTER TABLE embeddings ADD COLUMN team text DEFAULT 'red' NOT NULL,
        ADD COLUMN number bigint GENERATED ALWAYS AS IDENTITY, ADD COLUMN counted serial,
        ADD COLUMN letters int GENERATED ALWAYS AS (length(text)) STORED,
        ADD CONSTRAINT "embeddings of teams" CHECK (team <> '');
    ALTER TABLE embeddings SET (autovacuum_vacuum_scale_factor = 0.01, toast.autovacuum_enabled = false);
    ALTER TABLE embeddings ALTER source_id SET STATISTICS 500, ALTER text SET STORAGE EXTERNAL;
    CREATE INDEX "Embeddings of teams" ON embeddings USING btree (lower(team)) WHERE team <> 'blue';
    GRANT SELECT ON embeddings TO {role} WITH GRANT OPTION;
    GRANT UPDATE (text) ON chunks TO {role};
    GRANT INSERT ON chunks TO PUBLIC;
    ALTER TABLE embeddings ENABLE ROW LEVEL SECURITY;
    CREATE POLICY "only red" ON embeddings AS RESTRICTIVE FOR SELECT TO {role} USING (team = 'red');
    CREATE POLICY anything ON embeddings USING (true) WITH CHECK (workspace IS NULL);
    CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
    CREATE TRIGGER note BEFORE INSERT OR UPDATE OF text ON chunks FOR EACH ROW EXECUTE FUNCTION noted();
    CREATE TRIGGER asleep AFTER DELETE ON embeddings EXECUTE FUNCTION noted();
    ALTER TABLE embeddings DISABLE TRIGGER asleep;
    COMMENT ON TABLE embeddings IS 'it''s documents'; COMMENT ON COLUMN embeddings.team IS 'whose';
    COMMENT ON INDEX "Embeddings of teams" IS 'by team'; COMMENT ON POLICY anything ON embeddings IS 'all';
    COMMENT ON CONSTRAINT chunks_pkey ON chunks IS 'the key'; COMMENT ON TRIGGER note ON chunks IS 'none'
"""


@pytest.mark.every_server
def test_what_an_owner_added_to_the_tables_stays(filled, settings, sql, admin, reader):
    admin.execute(ADDED.format(role=reader))
    sql("UPDATE embeddings SET team = 'blue' WHERE id = 'own'")
    before = sql(DOCUMENTS), sql(CHUNKS), sql(_CATALOG)
    for _ in range(2):  # a second time drops the tables that the first has replaced
        rebuild(settings, RebuildPlan())
        assert sql(_CATALOG) == before[2]
        assert (sql(DOCUMENTS), sql(CHUNKS)) == before[:2]
    [(number, counted)] = sql("SELECT max(number), max(counted) FROM embeddings")
    filled.batch_upsert([{"id": "later", "text": "goes on counting"}])
    assert sql("SELECT number, counted, team FROM embeddings WHERE id = 'later'") == [(number + 1, counted + 1, "red")]
    retire_previous(admin, 0)
    assert filled.batch_upsert([{"id": "last", "text": "after the old tables went"}]).inserted == 1


def test_a_foreign_key_that_is_not_valid_stays_so_and_dangling_chunks_stay(filled, settings, sql, admin):
    sql("ALTER TABLE chunks DROP CONSTRAINT chunks_document_id_fkey")
    sql("INSERT INTO chunks (id, document_id, chunk_index, text) VALUES ('dangling', 'nowhere', 0, 'text')")
    sql(
        "ALTER TABLE chunks ADD CONSTRAINT chunks_document_id_fkey FOREIGN KEY (document_id) "
        "REFERENCES embeddings (id) ON DELETE CASCADE NOT VALID"
    )
    before = sql(CHUNKS), sql(_CATALOG)
    rebuild(settings, RebuildPlan())
    assert (sql(CHUNKS), sql(_CATALOG)) == before
    assert sql("SELECT confrelid::regclass::text FROM pg_constraint WHERE contype = 'f' AND "
               "conrelid = 'chunks'::regclass") == [("embeddings",)]  # fmt: skip


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("CREATE VIEW texts AS SELECT id, text FROM embeddings", "view texts"),
        ("CREATE TABLE likes (id text REFERENCES embeddings)", "likes_id_fkey"),
        ("CREATE MATERIALIZED VIEW pieces AS SELECT text FROM chunks", "pieces"),
        ("CREATE FUNCTION first(embeddings) RETURNS text LANGUAGE sql AS 'SELECT $1.text'", "function first"),
    ],
)
def test_what_would_stay_with_the_old_tables_is_named_before_anything_is_done(filled, settings, sql, statement, named):
    sql(statement)
    with pytest.raises(db.SchemaError, match=named):
        rebuild(settings, RebuildPlan())
    assert sql("SELECT count(*) FROM rebuild_runs") == [(0,)]


def test_a_source_is_read_again_and_unchanged_texts_cost_no_embedding(filled, settings, sql, embedder):
    """Not even where the vector cache has retired them: what is stored is enough."""
    sql("DELETE FROM vector_cache")
    kept = [row for row in sql(DOCUMENTS) if row[1] != "s1"]
    of_source = [item for item in items(40) if item["source_id"] == "s1"]
    before = sql("SELECT * FROM embeddings WHERE source_id = 's1' ORDER BY id")
    result = rebuild(settings, RebuildPlan(sources={"s1": pack(of_source)}), embedder)
    assert embedder.asked == []
    assert (result.copied, result.ingested, result.embedded) == (len(kept), len(of_source), 0)
    assert result.cache_hits == len(of_source)
    assert [row for row in sql(DOCUMENTS) if row[1] != "s1"] == kept
    assert sql("SELECT * FROM embeddings WHERE source_id = 's1' ORDER BY id") == before
    assert filled.embed_batch(items(40)).skipped == 40


def test_of_a_source_what_changed_is_embedded_and_what_is_gone_goes(filled, settings, sql, embedder):
    sql("ALTER TABLE embeddings ADD COLUMN team text")
    sql("UPDATE embeddings SET team = id, created_at = '2020-01-01'")
    of_source = [item for item in items(40) if item["source_id"] == "s1"]
    changed, stays = {**of_source[0], "text": "another text"}, of_source[1]
    rebuild(settings, RebuildPlan(sources={"s1": pack([changed, stays])}), embedder)
    assert embedder.asked == ["another text"]
    assert sql("SELECT id, text, team, extract(year FROM created_at)::int FROM embeddings WHERE source_id = 's1'") == [
        (item["id"], item["text"], item["id"], 2020) for item in (changed, stays)
    ]
    assert sql("SELECT count(*) FROM chunks WHERE source_id = 's1'") == [(2,)]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "holds no documents"),
        ([{"id": "", "text": "no id"}], "1 documents of 's1' cannot be stored"),
        ([{"id": "x", "text": "fine"}, {"id": "y", "text": ""}], "y: text is ''"),
    ],
)
def test_a_source_that_cannot_be_stored_stops_it_and_changes_nothing(
    filled, settings, sql, admin, embedder, given, reason
):
    before = sql(DOCUMENTS), sql("SELECT 'embeddings'::regclass::oid")
    with pytest.raises(db.ValidationError, match=reason):
        rebuild(settings, RebuildPlan(sources={"s1": lambda: given}), embedder)
    assert (sql(DOCUMENTS), sql("SELECT 'embeddings'::regclass::oid")) == before
    assert unfinished_rebuild(admin) is None
    assert current_pause(admin) is None
    assert sql("SELECT state FROM rebuild_runs") == [("failed",)]
    assert filled.batch_upsert([{"id": "later", "text": "text"}]).inserted == 1


def test_a_source_whose_reading_fails_stops_it_and_the_error_passes_through(filled, settings, admin, embedder):
    def broken():
        yield items(2)[1]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        rebuild(settings, RebuildPlan(sources={"s1": broken}), embedder)
    assert unfinished_rebuild(admin) is None
    assert current_pause(admin) is None


def test_cached_answers_of_the_old_tables_are_not_served(filled, settings, embedder):
    query = filled.embed("text number 1")
    filled.search(query)
    assert filled.search(query).cached
    [changed] = [{**item, "text": "other words"} for item in items(2)[1:]]
    with db.connect(str(settings.database_url), settings.redis_url, consistency="bounded") as bounded:
        bounded.search(query)
        assert bounded.search(query).cached
        rebuild(settings, RebuildPlan(sources={"s1": pack([changed])}), embedder)
        for store in (filled, bounded):
            found = store.search(query)
            assert not found.cached
            assert "text number 1" not in [hit.text for hit in found]


def test_prepared_plans_of_pooled_connections_go_on(filled, settings):
    query = filled.embed("text number 1")
    with db.connect(settings.database_url, False, pool_max=1, prepare_threshold=1) as one:
        expected = [hit.id for hit in one.search(query)]
        for _ in range(3):
            assert [hit.id for hit in one.search(query)] == expected
            one.batch_upsert([{"id": "again", "text": "text", "metadata": {"n": 1}}])
        rebuild(settings, RebuildPlan())
        assert [hit.id for hit in one.search(query)] == expected
        assert one.batch_upsert([{"id": "again", "text": "text", "metadata": {"n": 2}}]).updated == 1
        assert [d.metadata for d in one.get(["again"])] == [{"n": 2}]


def test_writes_told_nowhere_are_not_overlooked_where_somebody_resumes(filled, settings, sql, embedder):
    """Whoever resumes in the middle lets writes into tables that are about to go."""

    def resuming():
        filled.resume_ingestion()
        filled.batch_upsert([{"id": "late", "text": "written in between"}])
        yield items(2)[1]

    with pytest.raises(db.BusyError, match=r"did not stay paused .* \(1 writes since\)"):
        rebuild(settings, RebuildPlan(sources={"s1": resuming}), embedder)
    assert sql("SELECT text FROM embeddings WHERE id = 'late'") == [("written in between",)]


def test_two_at_once_are_refused(filled, settings, embedder):
    def within():
        with pytest.raises(db.BusyError, match="rebuild is locked by process"):
            rebuild(settings, RebuildPlan())
        with pytest.raises(db.BusyError, match="maintenance is locked by process"):
            filled.maintain()
        yield items(2)[1]

    rebuild(settings, RebuildPlan(sources={"s1": within}), embedder)


def test_a_table_in_use_is_waited_for_and_named(filled, settings, sql, admin, database_url):
    with admin.transaction():
        admin.execute("SELECT count(*) FROM chunks")
        with pytest.raises(db.BusyError, match=f"waited 2 s for the tables.*process {admin.info.backend_pid}"):
            rebuild(settings, RebuildPlan(swap_wait_s=2))
    assert unfinished_rebuild(admin) is None
    assert sql("SELECT state FROM rebuild_runs") == [("failed",)]


def test_a_role_that_does_not_own_the_tables_is_told(filled, settings, sql, url_as, reader):
    sql(f"ALTER ROLE {reader} LOGIN PASSWORD 'secret'")
    sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {reader}")
    sql(f"GRANT EXECUTE ON FUNCTION pg_control_system() TO {reader}")
    with pytest.raises(db.PermissionDeniedError, match="the owner of the tables"):
        rebuild(settings.model_copy(update={"database_url": url_as(reader, "secret")}), RebuildPlan())


def test_an_owner_who_may_not_make_schemas_is_told_what_to_grant(filled, settings, sql, url_as, reader, database_url):
    sql(f"ALTER ROLE {reader} LOGIN PASSWORD 'secret'")
    name = database_of(database_url)
    for (table,) in sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        sql(f"ALTER TABLE {table} OWNER TO {reader}")
    sql(f"GRANT CREATE ON SCHEMA public TO {reader}")
    sql(f"GRANT EXECUTE ON FUNCTION pg_control_system() TO {reader}")
    as_owner = settings.model_copy(update={"database_url": url_as(reader, "secret")})
    with pytest.raises(db.PermissionDeniedError, match=rf"GRANT CREATE ON DATABASE \W?{name}"):
        rebuild(as_owner, RebuildPlan())
    sql(f"GRANT CREATE ON DATABASE {name} TO {reader}")
    before = sql(DOCUMENTS), sql(_CATALOG)
    rebuild(as_owner, RebuildPlan())
    assert (sql(DOCUMENTS), sql(_CATALOG)) == before
    sql(f"REASSIGN OWNED BY {reader} TO CURRENT_USER")


def test_the_previous_tables_are_retired_when_they_are_old_enough(filled, settings, sql, admin):
    assert previous_tables(admin) is None
    rebuild(settings, RebuildPlan())
    assert previous_tables(admin).bytes > 0
    assert retire_previous(admin, 3600) == 0
    assert previous_tables(admin) is not None
    assert retire_previous(admin, 0) > 0
    assert previous_tables(admin) is None
    assert sql("SELECT count(*) FROM pg_namespace WHERE nspname = 'vectorkeep_previous'") == [(0,)]


def test_a_forecast_tells_what_would_be_done_and_does_nothing(filled, settings, sql, embedder):
    of_source = [item for item in items(40) if item["source_id"] == "s1"]
    given = [{**of_source[0], "text": "new words"}, *of_source[1:]]
    before = sql("SELECT pg_current_wal_insert_lsn()")
    ahead = forecast(settings, RebuildPlan(sources={"s1": pack(given)}), embedder)
    assert (ahead.documents_copied, ahead.documents_read, ahead.texts_to_embed) == (30, 13, 1)
    assert ahead.bytes_needed > 0
    everything = forecast(settings, RebuildPlan(new_model=True), Counting("another"))
    result = rebuild(settings, RebuildPlan(new_model=True), Counting("another"))
    assert everything.texts_to_embed == result.embedded
    assert before is not None


# -- between the filling and the swap ------------------------------------------------------------------

_SCANS = """
    SELECT coalesce(sum(seq_scan), 0) + coalesce(sum(idx_scan), 0)
    FROM pg_stat_xact_user_tables WHERE relname IN ('embeddings', 'chunks')
"""


def test_no_table_is_read_through_while_every_search_waits(filled, settings, monkeypatch):
    before, after = [], []

    def observed(connection, what, *, prepare, conclude, **options):
        def look_and_prepare():
            before[:] = connection.execute(_SCANS).fetchall()
            prepare()

        def conclude_and_look():
            conclude()
            after[:] = connection.execute(_SCANS).fetchall()

        return exchange(connection, what, prepare=look_and_prepare, conclude=conclude_and_look, **options)

    monkeypatch.setattr("db.swap.exchange", observed)
    result = rebuild(settings, RebuildPlan())
    assert (result.documents, result.chunks) == (43, filled.get_statistics().chunks)
    assert after == before != []
    back = roll_back(settings)
    assert after == before
    assert (back.documents, back.chunks) == (result.documents, result.chunks)


def test_rows_that_somebody_else_put_into_the_new_tables_stop_it(filled, settings, sql, admin):
    def intruding(step, _details):
        if step == "checking":
            sql("INSERT INTO vectorkeep_shadow.embeddings (id, text) VALUES ('stray', 'of another rebuild')")

    with pytest.raises(db.ValidationError, match="44 rows are in the new embeddings, 43 were filled in"):
        rebuild(settings, RebuildPlan(on_progress=intruding))
    assert sql("SELECT count(*) FROM embeddings WHERE id = 'stray'") == [(0,)]
    assert unfinished_rebuild(admin) is None


@pytest.mark.every_server
@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("ALTER TABLE embeddings ADD COLUMN team text", "column embeddings.team"),
        ("ALTER TABLE chunks ALTER chunk_index TYPE bigint", "column chunks.chunk_index"),
        ("ALTER TABLE chunks ALTER text SET DEFAULT 'none'", "column chunks.text"),
        ("CREATE INDEX CONCURRENTLY langs ON embeddings ((metadata -> 'lang'))", "index embeddings.langs"),
        ("DROP INDEX CONCURRENTLY chunks_detached_idx", "index chunks.chunks_detached_idx"),
        ("ALTER TABLE chunks ADD CONSTRAINT given CHECK (text <> '') NOT VALID", "constraint chunks.given"),
        ("ALTER TABLE chunks DROP CONSTRAINT chunks_document_id_fkey", "constraint chunks.chunks_document_id_fkey"),
    ],
)
def test_what_somebody_changes_about_the_tables_meanwhile_is_not_lost(filled, settings, sql, admin, statement, named):
    changed = []

    def changing(step, _details):
        if step == "checking":
            sql(statement)
            changed.extend(sql(_CATALOG))

    with pytest.raises(db.BusyError, match=f"were altered meanwhile: {named}; nothing was changed"):
        rebuild(settings, RebuildPlan(on_progress=changing))
    assert sql(_CATALOG) == changed != []
    assert unfinished_rebuild(admin) is None
    assert current_pause(admin) is None
    rebuild(settings, RebuildPlan())
    assert sql(_CATALOG) == changed


def test_an_index_that_is_built_anew_meanwhile_is_no_change(filled, settings, sql):
    def building(step, _details):
        if step == "checking":
            sql("REINDEX TABLE CONCURRENTLY embeddings")
            sql("REINDEX TABLE CONCURRENTLY chunks")

    before = sql(_CATALOG)
    rebuild(settings, RebuildPlan(on_progress=building))
    assert sql(_CATALOG) == before


def test_a_rebuild_that_has_lost_its_lock_stops_writing(filled, settings, sql, embedder, monkeypatch):
    """Another one may have begun: what this one wrote from then on would be among that one's rows."""
    monkeypatch.setattr("db.rebuild._BATCH", 10)
    given = 0

    def losing():
        nonlocal given
        for given in range(1, 501):
            if given == 100:
                sql("SELECT pg_terminate_backend(pid, 10000) FROM pg_locks WHERE locktype = 'advisory' AND objid = 6 "
                    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")  # fmt: skip
            yield {"id": f"n{given}", "text": f"text {given}"}

    with pytest.raises(db.UnavailableError):
        rebuild(settings, RebuildPlan(sources={"s1": losing}), embedder)
    assert given < 150
