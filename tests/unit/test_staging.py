"""Rows packed for binary COPY, read back here field by field."""

import struct
from datetime import UTC, datetime, timedelta, timezone

import pytest

from db import staging
from db.documents import prepare
from db.vectors import as_vector, encode


class Codec:
    model_id = "m"

    def encode(self, value):
        return encode(as_vector(value))


NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)


def unpacked(row):
    [count] = struct.unpack_from(">h", row)
    fields, at = [], 2
    for _ in range(count):
        [size] = struct.unpack_from(">i", row, at)
        at += 4
        fields.append(None if size == -1 else row[at : at + size])
        at += max(size, 0)
    assert at == len(row), "bytes are left over"
    return fields


def document_fields(document, created_at=NOW, updated_at=NOW):
    [row] = staging._document_rows([prepare(document, Codec())], "m", created_at, updated_at)
    return dict(zip(staging._DOCUMENT_COLUMNS, unpacked(row), strict=True))


def microseconds(moment):
    return struct.unpack(">q", moment)[0]


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (datetime(2000, 1, 1, tzinfo=UTC), 0),
        (datetime(2000, 1, 1, 0, 0, 0, 1, tzinfo=UTC), 1),
        (datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), -1),
        (datetime(2000, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))), 0),
        (datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), 252_455_615_999_999_999),
        (datetime(1, 1, 1, tzinfo=UTC), -63_082_281_600_000_000),
    ],
)
def test_a_time_is_whole_microseconds_since_2000(moment, expected):
    size, value = struct.unpack(">iq", staging._time(moment))
    assert (size, value) == (8, expected)


def test_a_year_of_microseconds_loses_no_digit():
    for days in range(0, 20_000, 1777):
        moment = datetime(1980, 1, 1, tzinfo=UTC) + timedelta(days=days, microseconds=days * 7 + 1)
        expected = (moment - datetime(2000, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        assert struct.unpack(">iq", staging._time(moment))[1] == expected


def test_a_document_is_packed_column_by_column():
    given = {
        "id": "ä", "text": "höre", "embedding": [1, 2], "metadata": {"workspace": "w", "n": 1}, "source_id": "s",
    }  # fmt: skip
    fields = document_fields(given)
    assert fields["id"].decode() == "ä"
    assert fields["text"].decode() == "höre"
    assert (fields["source_id"], fields["workspace"], fields["model_id"]) == (b"s", b"w", b"m")
    assert fields["embedding"] == struct.pack(">HHff", 2, 0, 1, 2)
    assert fields["metadata"] == b'\x01{"n":1,"workspace":"w"}'
    assert len(fields["text_hash"]) == len(fields["content_hash"]) == len(fields["vector_hash"]) == 32
    assert microseconds(fields["created_at"]) == microseconds(fields["updated_at"]) > 0


def test_what_is_absent_is_null_and_not_empty():
    fields = document_fields({"id": "a", "text": "t"}, created_at=None)
    absent = {name for name, value in fields.items() if value is None}
    assert absent == {"workspace", "embedding", "vector_hash", "chunks_hash", "model_id", "created_at"}


def test_times_that_are_given_are_kept():
    created, updated = NOW - timedelta(days=2), NOW - timedelta(days=1)
    fields = document_fields({"id": "a", "text": "t", "created_at": created, "updated_at": updated})
    assert struct.pack(">i", 8) + fields["created_at"] == staging._time(created)
    assert struct.pack(">i", 8) + fields["updated_at"] == staging._time(updated)


def test_chunks_carry_their_documents_source_and_workspace():
    document = prepare(
        {"id": "a", "text": "t", "source_id": "s", "metadata": {"workspace": "w"},
         "chunks": [{"text": "x"}, {"text": "y", "embedding": [1, 2], "metadata": {"k": 1}}]},
        Codec(),
    )  # fmt: skip
    rows = [dict(zip(staging._CHUNK_COLUMNS, unpacked(row), strict=True)) for row in staging._chunk_rows([document])]
    assert [(r["id"], r["document_id"], r["source_id"], r["workspace"]) for r in rows] == [
        (b"a#0", b"a", b"s", b"w"),
        (b"a#1", b"a", b"s", b"w"),
    ]
    assert [struct.unpack(">i", r["chunk_index"])[0] for r in rows] == [0, 1]
    assert [r["embedding"] is None for r in rows] == [True, False]
    assert rows[1]["metadata"] == b'\x01{"k":1}'


def test_documents_without_chunks_give_no_chunk_rows():
    documents = [prepare({"id": "a", "text": "t"}, Codec()), prepare({"id": "b", "text": "t", "chunks": ()}, Codec())]
    assert list(staging._chunk_rows(documents)) == []
