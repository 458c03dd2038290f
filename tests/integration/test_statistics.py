"""Statistics and diagnostics: true counts, sizes in bytes, and a verdict that gives its reasons."""

import pytest

import db
from ops.stats import _fields

VECTOR = [1.0, *[0.0] * 7]


def fill(store, count=3, source="s", workspace=None):
    metadata = {"workspace": workspace} if workspace else {}
    store.batch_upsert(
        [
            {
                "id": f"{source}/{n}", "text": "t", "source_id": source, "metadata": metadata,
                "embedding": [float(n + 1), 1.0, *[0.0] * 6], "chunks": [{"text": "c", "embedding": VECTOR}],
            }
            for n in range(count)
        ]
    )  # fmt: skip


def test_an_empty_store_has_statistics(database_url, redis_url):
    with db.connect(database_url, redis_url) as store:
        statistics = store.get_statistics()
        assert (statistics.documents, statistics.chunks, statistics.sources) == (0, 0, [])
        assert (statistics.index_health, statistics.indexes, statistics.reasons) == ("healthy", [], [])
        assert statistics.storage_mb > 0
        assert statistics.performance.avg_search_ms == statistics.performance.cache_hit_rate == 0
        assert store.get_diagnostics().index is None


def test_counts_are_the_stores_or_a_workspaces(store):
    fill(store, 3, "b", "w")
    fill(store, 2, "a", "w")
    fill(store, 1, "ä source")
    everything, workspace, none = store.get_statistics(), store.get_statistics("w"), store.get_statistics("missing")
    assert (everything.documents, everything.chunks) == (6, 6)
    assert sorted(everything.sources) == ["a", "b", "ä source"]
    assert (workspace.documents, workspace.chunks, workspace.sources) == (5, 5, ["a", "b"])
    assert (none.documents, none.chunks, none.sources) == (0, 0, [])
    assert workspace.storage_mb == pytest.approx(everything.storage_mb, rel=0.2)
    assert workspace.index_health == everything.index_health == "healthy"


def test_storage_is_that_of_all_our_tables_in_mebibytes(store, sql):
    fill(store, 50)
    [(size,)] = sql("""
        SELECT sum(pg_total_relation_size(oid)) FROM pg_class
        WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'alembic_version'
    """)
    assert store.get_statistics().storage_mb == pytest.approx(float(size) / 1024**2, rel=0.05)


def test_detached_chunks_are_counted(store):
    fill(store, 2)
    store.delete_by_source_id("s", cascade=False)
    statistics = store.get_statistics()
    assert (statistics.documents, statistics.chunks, statistics.sources) == (0, 2, [])


@pytest.mark.parametrize("workspace", ["", 3])
def test_a_workspace_that_cannot_be_any_is_refused(store, workspace):
    with pytest.raises(db.ValidationError, match="workspace is"):
        store.get_statistics(workspace)


def test_a_table_too_large_to_be_counted_is_estimated_and_the_figures_say_so(store, sql, monkeypatch):
    fill(store, 200)
    store.batch_upsert([{"id": f"plain{n}", "text": "t"} for n in range(50)])
    counted, rows = store.get_statistics(), store.get_diagnostics()
    assert (counted.estimated, [index.estimated for index in counted.indexes], rows.estimated) == (
        [],
        [False] * 2,
        False,
    )
    monkeypatch.setattr("db.row_counts.COUNTED_ROWS", 220)
    sql("ANALYZE embeddings, chunks")
    sql("DELETE FROM chunks")  # still counted: it is below
    about, rows = store.get_statistics(), store.get_diagnostics()
    assert (about.estimated, [index.estimated for index in about.indexes]) == (["documents"], [True, False])
    assert (about.documents, about.chunks, rows.total_rows, rows.estimated) == (counted.documents, 0, 250, True)
    [documents, _] = about.indexes
    assert (documents.indexed_rows, documents.rows_without_vector) == (200, 50)
    assert store.get_statistics("none").estimated == []
    shown = _fields(about, ())
    assert shown["estimated"] == ["documents"]
    assert "about 200 rows" in shown["index.embeddings_vector_idx"]


# -- health --------------------------------------------------------------------------------------------------


def test_a_healthy_store_reports_both_indexes_and_no_reason(store, sql):
    fill(store)
    statistics = store.get_statistics()
    assert (statistics.index_health, statistics.reasons) == ("healthy", [])
    assert [(r.name, r.table, r.valid, r.indexed_rows, r.unindexed_rows) for r in statistics.indexes] == [
        ("embeddings_vector_idx", "embeddings", True, 3, 0),
        ("chunks_vector_idx", "chunks", True, 3, 0),
    ]
    report = statistics.indexes[0]
    assert report.size_bytes == sql("SELECT pg_relation_size('embeddings_vector_idx')")[0][0]
    assert (report.needs_rebuild, report.recall, report.verdict) == (False, None, "healthy")


def test_a_missing_index_is_critical_and_says_what_to_run(store, sql):
    fill(store)
    sql("DROP INDEX embeddings_vector_idx")
    statistics = store.get_statistics()
    assert statistics.index_health == "critical"
    [reason] = statistics.reasons
    assert "embeddings: no vector index over 3 vectors" in reason
    assert "vectorkeep migrate --model test-model --dimensions 8" in reason
    report = statistics.indexes[0]
    assert (report.valid, report.indexed_rows, report.unindexed_rows, report.needs_rebuild) == (False, 0, 3, True)


def test_an_invalid_index_is_critical(store, sql):
    fill(store)
    sql("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'chunks_vector_idx'::regclass")
    statistics = store.get_statistics()
    assert statistics.index_health == "critical"
    assert "chunks: the vector index is invalid, its build was interrupted" in statistics.reasons[0]


def test_a_missing_index_over_no_vectors_harms_nobody(store, sql):
    store.batch_upsert([{"id": "a", "text": "t", "embedding": VECTOR}])
    sql("DROP INDEX chunks_vector_idx")
    assert store.get_statistics().index_health == "healthy"


def test_many_dead_rows_degrade_and_are_counted(store, sql, admin, until):
    sql("ALTER TABLE embeddings SET (autovacuum_enabled = false)")
    fill(store, 3000)
    sql("DELETE FROM embeddings WHERE id < 's/2'")
    sql("SELECT pg_stat_force_next_flush()")
    until(lambda: store.get_statistics().index_health == "degraded")
    statistics = store.get_statistics()
    assert any("dead rows" in reason and "VACUUM (ANALYZE) embeddings" in reason for reason in statistics.reasons)
    assert statistics.indexes[0].stale_percent > 20


# -- diagnostics ---------------------------------------------------------------------------------------------


def test_diagnostics_tell_rows_revision_and_a_location_without_password(store, sql, database_url):
    fill(store)
    diagnostics = store.get_diagnostics()
    assert diagnostics.total_rows == 3
    assert sql("SELECT version_num FROM alembic_version") == [(diagnostics.revision,)]
    [(name,)] = sql("SELECT current_database()")
    assert diagnostics.location.endswith(f"/{name}") or f"/{name}?" in diagnostics.location
    assert ":pw@" not in diagnostics.location
    assert diagnostics.index.name == "embeddings_vector_idx"


def test_diagnostics_tell_the_databases_own_revision_and_the_index_of_the_documents_or_that_it_is_missing(store, sql):
    """An older program on a newer schema, a document index that an interrupted load has left away."""
    fill(store)
    sql("UPDATE alembic_version SET version_num = '9999'")
    sql("DROP INDEX embeddings_vector_idx")
    diagnostics = store.get_diagnostics()
    assert diagnostics.revision == "9999"
    assert (diagnostics.index.table, diagnostics.index.exists, diagnostics.index.verdict) == (
        "embeddings",
        False,
        "critical",
    )


# -- performance ---------------------------------------------------------------------------------------------


def test_performance_is_that_of_the_recorded_operations(store, sql):
    sql("""
        INSERT INTO performance_metrics (operation, duration_ms, success, metadata, created_at) VALUES
            ('search', 10, true, '{"cached": true}', now()), ('search', 30, true, '{"cached": false}', now()),
            ('search', 20, true, '{}', now()), ('search', 900, false, '{}', now()),
            ('search', 900, true, '{}', now() - interval '8 days'),
            ('batch_upsert', 5, true, '{}', now()), ('embed_batch', 11, true, '{}', now()),
            ('sync', 5, true, '{}', now())
    """)
    performance = store.get_statistics().performance
    assert performance.avg_search_ms == 20
    assert performance.avg_insert_ms == 7
    assert performance.cache_hit_rate == pytest.approx(1 / 3)
    assert performance.percentiles["search"] == {"p50": 20, "p95": 29, "p99": pytest.approx(29.8)}
    assert performance.percentiles["sync"]["p99"] == 5


def test_of_very_many_operations_the_newest_tell(store, sql, monkeypatch):
    sql("""
        INSERT INTO performance_metrics (operation, duration_ms)
        SELECT 'search', CASE WHEN n <= 90 THEN 1000 ELSE 10 END FROM generate_series(1, 100) AS n
    """)
    assert store.get_statistics().performance.avg_search_ms == 901
    monkeypatch.setattr("db.statistics._NEWEST_METRICS", 10)
    assert store.get_statistics().performance.avg_search_ms == 10
