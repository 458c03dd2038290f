import psycopg
import pytest


@pytest.fixture
def filled(vectorkeep, folder):
    vectorkeep("ingest", folder, "--source", "handbook", "--workspace", "acme")
    return vectorkeep


def test_a_source_that_a_table_of_the_users_own_refers_to_is_no_defect(filled, database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE notes (document_id text REFERENCES embeddings (id))")
        connection.execute("INSERT INTO notes SELECT id FROM embeddings WHERE source_id = 'handbook' LIMIT 1")
    refused = filled("delete-source", "handbook", "--yes", code=6)
    assert 'constraint "notes_document_id_fkey" on table "notes"' in refused.err
    assert refused.err.count("\n") == 1


def test_a_source_is_deleted_only_when_told_so(filled):
    asked = filled("delete-source", "handbook", code=2)
    assert "--yes" in asked.err
    assert filled("stats").fields["documents"] == "3"
    assert filled("delete-source", "handbook", "--yes", "--json").json == {
        "deleted": 3,
        "chunks_removed": 3,
        "chunks_detached": 0,
    }
    assert filled("delete-source", "handbook", "-y").fields["deleted"] == "0"
    assert filled("stats").fields["documents"] == "0"


def test_kept_chunks_are_orphans_that_a_cleanup_counts_and_removes(filled):
    assert filled("delete-source", "handbook", "--yes", "--keep-chunks").fields["chunks_detached"] == "3"
    counted = filled("cleanup", "--dry-run", "--json").json
    assert (counted["orphaned_chunks"], counted["orphaned_embeddings"], counted["cleaned"]) == (3, 0, False)
    assert "Dry run - no changes made" in counted["details"]
    spared = filled("cleanup", "--min-age-days", "1", "--dry-run")
    assert spared.fields["orphaned_chunks"] == "0"
    cleaned = filled("cleanup", "--batch-size", "2")
    assert (cleaned.fields["orphaned_chunks"], cleaned.fields["cleaned"]) == ("3", "yes")
    assert "Vacuum completed" in cleaned.err
    assert filled("cleanup", "--json").json["orphaned_chunks"] == 0


def test_quiet_says_nothing_but_the_result(filled):
    ran = filled("cleanup", "--quiet")
    assert ran.fields["orphaned_chunks"] == "0"
    assert ran.err == ""


def test_stats_of_the_store_and_of_a_workspace(filled):
    fields = filled("stats").fields
    assert (fields["documents"], fields["chunks"], fields["sources"]) == ("3", "3", "handbook")
    assert fields["index_health"] == "healthy"
    assert fields["index.embeddings_vector_idx"].startswith("healthy, 3 rows")
    assert float(fields["storage_mb"]) > 0
    assert "p95" in fields["embed_batch_ms"]
    assert filled("stats", "--workspace", "acme").fields["documents"] == "3"
    other = filled("stats", "--workspace", "other", "--json").json
    assert (other["documents"], other["sources"]) == (0, [])
    assert other["storage_mb"] > 0


def test_maintain_tells_each_step(filled):
    rows = filled("maintain", "--dry-run").rows
    assert {outcome for _, outcome, _, _ in rows} <= {"skipped", "done"}
    done = filled("maintain", "--retention-days", "0", "--json").json
    assert {step["outcome"] for step in done["steps"]} <= {"skipped", "done"}
    assert done["rows_removed"] > 0
    names = {step["name"] for step in filled("maintain", "--skip-compaction", "--skip-index", "--json").json["steps"]}
    assert names < {step["name"] for step in done["steps"]}
    assert not [name for name in names if "vacuum" in name or "index" in name]


def test_maintain_by_two_at_once_says_who_is_busy(filled, database_url):
    from db.locks import LOCK_CLASS, Purpose

    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, Purpose.MAINTENANCE))
        ran = filled("maintain", code=7)
    assert ran.out == ""
    assert ran.err.startswith("vectorkeep: ")
