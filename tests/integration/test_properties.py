"""Any sequence of writes and deletions leaves what a plain model in memory says."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from db import Document

IDS = "abcde"
SOURCES = ("s1", "s2")
WORKSPACES = ("w1", "w2")
VECTORS = [[1, 0], [0, 1], [1, 1], [-1, 0.5], [0.2, -1]]


def widened(vector):
    return [float(x) for x in vector] + [0.0] * 6


@dataclass
class Row:
    text: str
    source: str
    metadata: dict
    vector: list | None
    chunks: list


@dataclass
class Plain:
    """What the store should hold: rows by id, and the chunks that deletions left, by the id they were of."""

    rows: dict = field(default_factory=dict)
    detached: dict = field(default_factory=dict)

    def upsert(self, documents):
        counts = {"inserted": 0, "updated": 0, "unchanged": 0, "superseded": 0}
        # What an earlier document of the call gave and the last one of its id does not say, stays.
        last = {}
        for d in documents:
            last[d["id"]] = {**last.pop(d["id"], {}), **d}
        counts["superseded"] = len(documents) - len(last)
        for id_, d in last.items():
            counts[self._upsert_one(id_, d)] += 1
        return counts

    def _upsert_one(self, id_, d):
        old = self.rows.get(id_)
        left = self.detached.pop(id_, (None, []))[1]
        vector = d.get("embedding", old.vector if old else None)
        chunks = d.get("chunks")
        chunks = (old.chunks if old else left) if chunks is None else chunks
        self.rows[id_] = Row(d["text"], d["source_id"], d["metadata"], vector, chunks)
        return "inserted" if old is None else "unchanged" if old == self.rows[id_] else "updated"

    def delete(self, ids):
        gone = {id_ for id_ in ids if id_ in self.rows}
        removed = sum(len(self.rows.pop(id_).chunks) for id_ in gone)
        return len(gone), removed, 0

    def delete_source(self, source, cascade):
        gone = [id_ for id_, row in self.rows.items() if row.source == source]
        chunks = {id_: self.rows.pop(id_).chunks for id_ in gone}
        if not cascade:
            self.detached |= {id_: (source, c) for id_, c in chunks.items() if c}
            return len(gone), 0, sum(map(len, chunks.values()))
        left = [id_ for id_, (of, _) in self.detached.items() if of == source]
        removed = sum(map(len, chunks.values())) + sum(len(self.detached.pop(id_)[1]) for id_ in left)
        return len(gone), removed, 0

    def nearest(self, query, source, workspace):
        """Scores by id of the rows that a search should find, best first."""
        wanted = np.array(query, np.float64)
        scores = {}
        for id_, row in self.rows.items():
            if row.vector is None or (source and row.source != source):
                continue
            if workspace and row.metadata.get("workspace") != workspace:
                continue
            vector = np.array(row.vector, np.float64)
            scores[id_] = vector @ wanted / np.linalg.norm(vector) / np.linalg.norm(wanted)
        return scores


@st.composite
def documents(draw):
    document = {
        "id": draw(st.sampled_from(IDS)),
        "text": draw(st.sampled_from(["x", "y"])),
        "source_id": draw(st.sampled_from(SOURCES)),
        "metadata": draw(st.sampled_from([{}, {"n": 1}, {"workspace": "w1"}, {"workspace": "w2", "n": 1}])),
    }
    if draw(st.booleans()):
        document["embedding"] = draw(st.none() | st.sampled_from(VECTORS).map(widened))
    if draw(st.booleans()):
        texts = draw(st.lists(st.sampled_from(["c", "d", "e"]), max_size=3))
        document["chunks"] = [{"text": text} for text in texts]
    return document


steps = st.one_of(
    st.tuples(st.just("upsert"), st.lists(documents(), min_size=1, max_size=5), st.sampled_from([1, 2, 100])),
    st.tuples(st.just("upsert"), st.lists(documents(), min_size=1, max_size=5), st.sampled_from([1, 2, 100])),
    st.tuples(st.just("delete"), st.lists(st.sampled_from(IDS), max_size=3)),
    st.tuples(st.just("delete_source"), st.sampled_from(SOURCES), st.booleans()),
)


def run(store, plain, step):
    match step:
        case ("upsert", given_documents, batch_size):
            result = store.batch_upsert([Document(**d) for d in given_documents], batch_size=batch_size)
            expected = plain.upsert(given_documents)
            if batch_size > 5:  # in smaller batches a row may change and change back
                assert {name: getattr(result, name) for name in expected} == expected
            assert result.failed == 0
            assert result.inserted == expected["inserted"]
            assert result.superseded == expected["superseded"]
        case ("delete", ids):
            result = store.delete(ids)
            assert (result.deleted, result.chunks_removed, result.chunks_detached) == plain.delete(ids)
        case ("delete_source", source, cascade):
            result = store.delete_by_source_id(source, cascade=cascade)
            assert (result.deleted, result.chunks_removed, result.chunks_detached) == plain.delete_source(
                source, cascade
            )


def assert_same(store, plain, sql):
    stored = {d.id: d for d in store.get(list(IDS))}
    assert stored.keys() == plain.rows.keys()
    for id_, row in plain.rows.items():
        document = stored[id_]
        vector = None if document.embedding is None else pytest.approx(row.vector)
        assert (document.text, document.source_id, document.metadata) == (row.text, row.source, row.metadata)
        assert (row.vector is None) == (document.embedding is None)
        assert vector is None or document.embedding.tolist() == vector
        assert [c.text for c in document.chunks] == [c["text"] for c in row.chunks]
    detached = sql("SELECT origin_id, count(*) FROM chunks WHERE document_id IS NULL GROUP BY 1")
    assert dict(detached) == {id_: len(chunks) for id_, (_, chunks) in plain.detached.items()}
    for source, workspace in ((None, None), ("s1", None), (None, "w1"), ("s2", "w2")):
        query = widened([0.9, 0.3])
        hits = store.search(query, 10, source_id=source, workspace=workspace)
        expected = plain.nearest(query, source, workspace)
        assert hits.complete
        assert {hit.id: pytest.approx(hit.score, abs=1e-5) for hit in hits} == expected
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(steps, min_size=1, max_size=8))
def test_any_sequence_leaves_what_a_plain_model_says(store, sql, sequence):
    for source in SOURCES:
        store.delete_by_source_id(source)
    plain = Plain()
    for step in sequence:
        run(store, plain, step)
        assert_same(store, plain, sql)
    statistics = store.get_statistics()
    assert statistics.documents == len(plain.rows)
    assert statistics.sources == sorted({row.source for row in plain.rows.values()})
