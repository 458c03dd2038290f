"""The checks of a filled shadow read the vectors of the rows that they ask about, and no others."""

import pytest

from db import shadow_checks
from db.embedding_model import Model
from db.recall_sample import has_vectors
from db.shadow_checks import Side

# Vectors of this size lie outside the row; each that is read is one look into the table behind.
_FILL = """
    INSERT INTO embeddings (id, text, embedding)
    SELECT 'd' || n, repeat('word ', 20), (SELECT array_agg(random()) FROM generate_series(1, 1024) WHERE n > 0)::vector
    FROM generate_series(1, %s) AS n
"""
_READ = """
    SELECT pg_stat_get_xact_numscans(indexrelid) FROM pg_index JOIN pg_class ON indrelid = reltoastrelid
    WHERE pg_class.oid = 'embeddings'::regclass
"""


@pytest.fixture
def side(admin):
    return Side(admin, Model("m", 1024, "cosine"), 40)


def test_whether_there_are_vectors_is_told_without_reading_one(side, admin, sql):
    assert not has_vectors(side.connection, "documents")
    sql(_FILL, 300)
    with admin.transaction():
        before = sql(_READ)
        assert has_vectors(side.connection, "documents")
        assert sql(_READ) == before


@pytest.mark.parametrize("wanted", [20, 1])  # of so few the table has many pages, and a part of them is enough
def test_a_sample_reads_the_vectors_of_its_own_rows(side, admin, sql, wanted, monkeypatch):
    monkeypatch.setattr(shadow_checks, "_SAMPLE", wanted)
    sql(_FILL, 1000)
    with admin.transaction():
        [(before,)] = sql(_READ)
        sample = shadow_checks._sample(side, "documents")
        [(read,)] = sql(_READ)
    assert len(sample) == wanted
    assert {len(vector) for vector in sample.values()} == {1024}
    assert read - before == wanted


def test_vectors_of_another_model_are_not_sampled(side, sql):
    sql("INSERT INTO embeddings (id, text, embedding) VALUES ('other', 'text', '[1, 2, 3]')")
    assert shadow_checks._sample(side, "documents") == {}
