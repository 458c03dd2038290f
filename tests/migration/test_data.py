"""What is stored survives every step, and what a step needs to know it works out from what is stored."""

from hashlib import sha256

import psycopg
import pytest
from alembic import command

from db.errors import BusyError
from db.migrate import alembic_config, current_revision, head_revision, upgrade

pytestmark = pytest.mark.every_server

DOCUMENTS = """
    INSERT INTO embeddings (id, source_id, text, embedding, metadata, created_at) VALUES
        ('a', 's1', 'Grüße', '[1,2,3]', '{"workspace": "w", "n": 1}', '2020-01-01+00'),
        ('b', 's2', '', NULL, '{"workspace": 7}', '2021-01-01+00'),
        ('', 's3', 'empty id', '[1,0,0]', '{}', '2022-01-01+00')
"""
CHUNKS = """
    INSERT INTO chunks (id, document_id, chunk_index, text, embedding, metadata) VALUES
        ('a#0', 'a', 0, 'Grü', '[1,2,3]', '{}'),
        ('a#1', 'a', 1, 'ße', NULL, '{}'),
        ('gone#0', 'gone', 0, 'dangling', NULL, '{"workspace": "w2"}'),
        ('none', NULL, 0, 'of nobody', NULL, '{}')
"""


def content(connection: psycopg.Connection) -> tuple[list, list]:
    documents = connection.execute(
        "SELECT id, source_id, text, embedding::text, metadata, created_at FROM embeddings ORDER BY id"
    ).fetchall()
    chunks = connection.execute(
        "SELECT id, document_id, chunk_index, text, embedding::text, metadata, created_at FROM chunks ORDER BY id"
    ).fetchall()
    return documents, chunks


@pytest.mark.parametrize("revision", ["0001", "0002", "0003"])
def test_rows_of_an_earlier_revision_survive(empty_database_url, empty, revision):
    upgrade(empty_database_url, revision)
    empty.execute(DOCUMENTS)
    empty.execute(CHUNKS)
    before = content(empty)
    assert upgrade(empty_database_url) == (revision, head_revision())
    assert content(empty) == before
    command.check(alembic_config(empty_database_url))


def test_hashes_sources_and_workspaces_are_filled(empty_database_url, empty):
    upgrade(empty_database_url, "0001")
    empty.execute(DOCUMENTS)
    empty.execute(CHUNKS)
    upgrade(empty_database_url)
    assert empty.execute("SELECT id, workspace, text_hash FROM embeddings ORDER BY id").fetchall() == [
        ("", None, sha256(b"empty id").digest()),
        ("a", "w", sha256("Grüße".encode()).digest()),
        ("b", None, sha256(b"").digest()),
    ]
    assert empty.execute("SELECT id, source_id, workspace, text_hash FROM chunks ORDER BY id").fetchall() == [
        ("a#0", "s1", "w", sha256("Grü".encode()).digest()),
        ("a#1", "s1", "w", sha256("ße".encode()).digest()),
        ("gone#0", "batch", "w2", sha256(b"dangling").digest()),
        ("none", "batch", None, sha256(b"of nobody").digest()),
    ]


def test_every_batch_is_filled(empty_database_url, empty):
    upgrade(empty_database_url, "0001")
    empty.execute("INSERT INTO embeddings (id, text) SELECT i, 't' || i FROM generate_series(1, 4500) AS i")
    empty.execute(
        "INSERT INTO chunks (id, document_id, chunk_index, text) "
        "SELECT i, i, 0, 'c' || i FROM generate_series(1, 4500) AS i"
    )
    upgrade(empty_database_url)
    for table in ("embeddings", "chunks"):
        wrong = empty.execute(
            f"SELECT count(*) FROM {table} WHERE text_hash IS DISTINCT FROM sha256(convert_to(text, 'UTF8'))"
        ).fetchone()
        assert wrong == (0,)


def test_chunks_that_share_a_position_are_numbered(empty_database_url, empty):
    upgrade(empty_database_url, "0001")
    empty.execute(
        "INSERT INTO chunks (id, document_id, chunk_index, text) VALUES "
        "('c9', 'a', 0, ''), ('c10', 'a', 0, ''), ('c1', 'a', 5, ''), ('d1', 'b', 3, ''), ('d2', 'b', 4, '')"
    )
    upgrade(empty_database_url)
    assert empty.execute("SELECT id, chunk_index FROM chunks ORDER BY document_id, chunk_index").fetchall() == [
        ("c9", 0), ("c10", 1), ("c1", 2), ("d1", 3), ("d2", 4),
    ]  # fmt: skip


def foreign_key(connection: psycopg.Connection) -> tuple:
    row = connection.execute(
        "SELECT convalidated, confdeltype FROM pg_constraint WHERE conname = 'chunks_document_id_fkey'"
    ).fetchone()
    assert row is not None
    return row


def test_the_key_stays_not_valid_while_chunks_dangle(empty_database_url, empty):
    upgrade(empty_database_url, "0003")
    empty.execute(CHUNKS)
    upgrade(empty_database_url)
    assert foreign_key(empty) == (False, "c")
    assert empty.execute("SELECT count(*) FROM chunks").fetchone() == (4,)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):  # new rows are bound all the same
        empty.execute("INSERT INTO chunks (id, document_id, chunk_index, text) VALUES ('x', 'nowhere', 0, '')")
    command.check(alembic_config(empty_database_url))


def test_the_key_is_validated_where_nothing_dangles(empty_database_url, empty):
    upgrade(empty_database_url, "0003")
    empty.execute(DOCUMENTS)
    empty.execute(CHUNKS)
    empty.execute("DELETE FROM chunks WHERE document_id = 'gone'")
    upgrade(empty_database_url)
    assert foreign_key(empty) == (True, "c")


INVALID = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"


def test_an_interrupted_index_build_is_mended(empty_database_url, empty):
    upgrade(empty_database_url, "0001")
    empty.execute(DOCUMENTS)
    empty.execute(CHUNKS)
    with psycopg.connect(empty_database_url) as other:
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT 1")  # its snapshot is what a CREATE INDEX CONCURRENTLY waits for in the end
        with pytest.raises(BusyError, match=rf"process {other.info.backend_pid} .*again"):
            upgrade(empty_database_url, lock_timeout_s=2)
    assert empty.execute(INVALID).fetchall() == [("embeddings_workspace_idx",)]
    assert current_revision(empty) == "0001"
    before = content(empty)
    assert upgrade(empty_database_url) == ("0001", head_revision())
    assert empty.execute(INVALID).fetchall() == []
    assert content(empty) == before
    command.check(alembic_config(empty_database_url))


def test_a_unique_index_that_failed_is_mended(empty_database_url, empty):
    upgrade(empty_database_url, "0001")
    empty.execute("INSERT INTO chunks (id, document_id, chunk_index, text) VALUES ('1', 'a', 0, ''), ('2', 'a', 0, '')")
    with pytest.raises(psycopg.errors.UniqueViolation):
        empty.execute(
            "CREATE UNIQUE INDEX CONCURRENTLY chunks_document_id_chunk_index_key ON chunks (document_id, chunk_index)"
        )
    upgrade(empty_database_url)
    assert empty.execute(INVALID).fetchall() == []
    command.check(alembic_config(empty_database_url))


# What an older program may do at the wrong moment.
MEANWHILE = """
    CREATE FUNCTION meanwhile() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO chunks (id, document_id, chunk_index, text) VALUES ('late', 'a', 0, '') ON CONFLICT DO NOTHING;
        RETURN NULL;
    END $$;
    CREATE TRIGGER meanwhile AFTER UPDATE OF chunk_index ON chunks FOR EACH ROW EXECUTE FUNCTION meanwhile()
"""


def test_chunks_that_are_given_one_position_meanwhile_are_numbered_by_the_next_run(empty_database_url, empty):
    upgrade(empty_database_url, "0001")
    empty.execute("INSERT INTO chunks (id, document_id, chunk_index, text) VALUES ('1', 'a', 0, ''), ('2', 'a', 0, '')")
    empty.execute(MEANWHILE)
    with pytest.raises(BusyError, match=r"\(a, 0\).*older version.*again"):
        upgrade(empty_database_url)
    empty.execute("DROP FUNCTION meanwhile CASCADE")
    assert upgrade(empty_database_url) == ("0001", head_revision())
    assert empty.execute("SELECT id, chunk_index FROM chunks ORDER BY 2").fetchall() == [
        ("1", 0),
        ("late", 1),
        ("2", 2),
    ]


@pytest.mark.parametrize("revision", ["0002", "0004"])
def test_a_revision_whose_stamp_was_lost_runs_again(empty_database_url, empty, revision):
    """As after a crash between the work and the stamp, which an autocommit block allows."""
    upgrade(empty_database_url, "0001")
    empty.execute(DOCUMENTS)
    upgrade(empty_database_url, revision)
    if revision == "0004":  # its tables come with the stamp, the key before
        empty.execute("DROP TABLE write_log, write_log_watermark")
    empty.execute("UPDATE alembic_version SET version_num = %s", (f"{int(revision) - 1:04}",))
    upgrade(empty_database_url)
    command.check(alembic_config(empty_database_url))
