"""Documents made ready to be stored: checked, hashed and encoded, before anything travels.

A stored row has one hash for each part that a caller can give or leave out. `content_hash` covers the
text, source and metadata; `vector_hash` the model and the vector's float32 bytes; `chunks_hash` all
chunks. A part that a document does not give is neither compared nor written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Protocol, TypeVar

import orjson

from .errors import ValidationError
from .types import Document, DocumentChunk, Item
from .values import BadJsonError, json_value, shown, utf8_size

MAX_KEY_BYTES = 1024
# Values of these types cannot come out of orjson changed.
_PLAIN = frozenset((str, int, bool, type(None)))
# Within a day of these a session's time zone may be in a year that Python does not have.
_FIRST, _LAST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)
_ESCAPED_NUL, _BACKSLASH = b"\\u0000", ord("\\")
_READY_MADE = (Document, Item, DocumentChunk)


# The classes of this file are made once for every input: frozen ones would take three times as long to make.
@dataclass(slots=True)
class PreparedChunk:
    id: str
    index: int
    text: str
    text_hash: bytes
    vector: bytes | None
    metadata: bytes


@dataclass(slots=True)
class HashedItem:
    """A checked item with the hashes by which it is compared, before anything is embedded."""

    id: str
    source_id: str
    workspace: str | None
    text: str
    metadata: bytes
    text_hash: bytes
    content_hash: bytes

    def follow(self, earlier: Any) -> None:
        """Take the place of an `earlier` version. An item says all there is to say."""


@dataclass(slots=True)
class PreparedDocument(HashedItem):
    """A document as the tables hold it. `chunks` None, `vector_given` False: what is stored stays.

    vector_of_other_text: the vector was given with an earlier text. It stays, but is no model's vector of this one.
    """

    vector_given: bool = False
    vector: bytes | None = None
    vector_hash: bytes | None = None
    chunks: tuple[PreparedChunk, ...] | None = None
    chunks_hash: bytes | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    vector_of_other_text: bool = False

    def follow(self, earlier: "PreparedDocument") -> None:
        """Take the place of an `earlier` version: parts that are absent here stay, as if that one were stored."""
        if not self.vector_given:
            self.vector_of_other_text = earlier.vector_of_other_text or earlier.text_hash != self.text_hash
            self.vector_given = earlier.vector_given
            self.vector, self.vector_hash = earlier.vector, earlier.vector_hash
        if self.chunks is None:
            self.chunks, self.chunks_hash = earlier.chunks, earlier.chunks_hash
        self.created_at = self.created_at or earlier.created_at


H = TypeVar("H", bound=HashedItem)


class VectorCodec(Protocol):
    """What a store's model asks of every vector (see `db.registry.StoreModel`)."""

    @property
    def model_id(self) -> str: ...

    def encode(self, value: Any) -> bytes:
        """`value` checked, in binary form. Raises ValidationError."""
        ...


def text_hash(text: str) -> bytes:
    return sha256(text.encode()).digest()


def content_hash(text_digest: bytes, source_id: str, metadata: bytes) -> bytes:
    """Hash of what the caller wrote. `metadata` is canonical JSON, see `canonical_metadata`."""
    return sha256(b"%b%b\0%b" % (text_digest, source_id.encode(), metadata)).digest()  # no source has a NUL


def prepare(document: Document | Mapping[str, Any], model: VectorCodec) -> PreparedDocument:
    """`document` checked and hashed. Raises ValidationError with the reason."""
    document = as_document(document)
    prepared = _hashed(PreparedDocument, document)
    _add_parts(prepared, document.embedding, document.chunks, model)
    prepared.vector_given = bool(document.embedding_given)
    if document.created_at is not None:
        prepared.created_at = _check_time("created_at", document.created_at)
    if document.updated_at is not None:
        prepared.updated_at = _check_time("updated_at", document.updated_at)
    return prepared


def hash_item(item: Item | Document) -> HashedItem:
    """What `item` says itself, checked and hashed. Raises ValidationError with the reason."""
    return _hashed(HashedItem, item)


def prepare_item(item: HashedItem, embedding: Any, chunks: Any, model: VectorCodec) -> PreparedDocument:
    """The document of a checked item; `embedding` and `chunks` None: what is stored stays."""
    prepared = PreparedDocument(
        item.id, item.source_id, item.workspace, item.text, item.metadata, item.text_hash, item.content_hash
    )
    _add_parts(prepared, embedding, chunks, model)
    return prepared


def _hashed(kind: type[H], item: Item | Document) -> H:
    check_key("id", item.id)
    check_key("source_id", item.source_id)
    check_text(item.text)
    metadata = canonical_metadata(item.metadata)
    digest = text_hash(item.text)
    workspace = workspace_of(item.metadata)
    hashed = content_hash(digest, item.source_id, metadata)
    return kind(item.id, item.source_id, workspace, item.text, metadata, digest, hashed)


def _add_parts(document: PreparedDocument, embedding: Any, chunks: Any, model: VectorCodec) -> None:
    if embedding is not None:
        document.vector_given = True
        document.vector = vector = model.encode(embedding)
        document.vector_hash = vector_hash(model.model_id, vector)
    if chunks is not None:
        document.chunks = prepared = _prepare_chunks(document.id, chunks, model)
        document.chunks_hash = chunks_hash(prepared) if prepared else None


def vector_hash(model_id: str, vector: bytes) -> bytes:
    return sha256(model_id.encode() + b"\0" + vector).digest()


def part_of(given: Any, name: str) -> Any:
    """A part of an input as callers give them, ready-made or a mapping; None where it has none. Checks nothing."""
    if isinstance(given, _READY_MADE):  # before the mappings, which take longer to tell
        return getattr(given, name, None)
    return given.get(name) if isinstance(given, Mapping) else None


def as_document(value: Document | Mapping[str, Any]) -> Document:
    """`value` as a Document. Raises ValidationError where a mapping has keys that mean nothing."""
    if isinstance(value, Document):
        return value
    return Document(**_known_keys(value, Document, required=("id", "text")))


def as_item(value: Item | Mapping[str, Any]) -> Item:
    """`value` as an Item. Raises ValidationError where a mapping has keys that mean nothing."""
    if isinstance(value, Item):
        return value
    return Item(**_known_keys(value, Item, required=("id", "text")))


def _known_keys(value: Any, kind: type, *, required: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValidationError(f"got a {type(value).__name__}; expected a {kind.__name__} or a mapping")
    known = [f.name for f in fields(kind) if f.init]
    missing = [key for key in required if key not in value]
    unknown = [key for key in value if key not in known]
    if missing:
        raise ValidationError(f"{missing[0]} is missing; expected at least {' and '.join(required)}")
    if unknown:
        raise ValidationError(f"unknown key {shown(unknown[0])}; expected some of {', '.join(known)}")
    return dict(value)


def check_key(name: str, value: Any) -> str:
    """`value` as an id, source or workspace: a string, not empty, at most 1 KiB, that UTF-8 can hold."""
    if type(value) is str and value.isascii() and 0 < len(value) <= MAX_KEY_BYTES and "\0" not in value:
        return value  # nearly every one
    if not isinstance(value, str) or not value:
        raise ValidationError(f"{name} is {shown(value)}; expected a string that is not empty")
    size = utf8_size(name, value)
    if size > MAX_KEY_BYTES:
        raise ValidationError(f"{name} has {size} bytes; expected at most {MAX_KEY_BYTES}")
    return value


def check_text(value: Any, name: str = "text") -> None:
    if type(value) is str and value.isascii() and value and "\0" not in value:
        return
    if not isinstance(value, str) or not value:
        raise ValidationError(f"{name} is {shown(value)}; expected a string that is not empty")
    utf8_size(name, value)


def workspace_of(metadata: Mapping[str, Any]) -> str | None:
    """The workspace that `metadata` names, or None. Raises ValidationError where it is not a string."""
    if "workspace" not in metadata:
        return None
    return check_key("metadata['workspace']", metadata["workspace"])


def canonical_metadata(metadata: Any) -> bytes:
    """`metadata` as JSON with sorted keys: equal objects give equal bytes.

    Raises ValidationError where it is not an object or would not read back as it was written.
    """
    if (plain := _plain_json(metadata)) is not None:
        return plain
    if not isinstance(metadata, Mapping):
        raise ValidationError(f"metadata is {shown(metadata)}; expected an object")
    try:
        return orjson.dumps(json_value(metadata), option=orjson.OPT_SORT_KEYS)
    except BadJsonError as exc:
        raise ValidationError(f"metadata{exc.where} {exc.reason}") from None


def _plain_json(metadata: Any) -> bytes | None:
    """Flat and simple `metadata`, nearly all there is, as canonical JSON; None where it must be looked at closely."""
    if type(metadata) is not dict or not _PLAIN.issuperset(map(type, metadata.values())):
        return None
    try:
        data = orjson.dumps(metadata, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        return None
    return None if _BACKSLASH in data and _ESCAPED_NUL in data else data


def _prepare_chunks(document_id: str, chunks: Any, model: VectorCodec) -> tuple[PreparedChunk, ...]:
    if isinstance(chunks, str | bytes | Mapping) or not isinstance(chunks, Sequence):
        raise ValidationError(f"chunks is {shown(chunks)}; expected a sequence of chunks")
    return tuple(_prepare_chunk(document_id, n, chunk, model) for n, chunk in enumerate(chunks))


def _prepare_chunk(document_id: str, index: int, chunk: Any, model: VectorCodec) -> PreparedChunk:
    try:
        if not isinstance(chunk, DocumentChunk):
            chunk = DocumentChunk(**_known_keys(chunk, DocumentChunk, required=("text",)))
        check_text(chunk.text)
        return PreparedChunk(
            id=f"{document_id}#{index}",
            index=index,
            text=chunk.text,
            text_hash=text_hash(chunk.text),
            vector=None if chunk.embedding is None else model.encode(chunk.embedding),
            metadata=canonical_metadata(chunk.metadata),
        )
    except ValidationError as exc:
        raise type(exc)(f"chunk {index}: {exc}") from exc


def chunks_hash(chunks: Sequence[PreparedChunk]) -> bytes:
    """Hash of all that the chunks of one document hold, in order."""
    digest = sha256()
    for chunk in chunks:
        digest.update(chunk.text_hash)
        digest.update(sha256(chunk.metadata).digest())
        digest.update(b"\0" if chunk.vector is None else sha256(chunk.vector).digest())
    return digest.digest()


def _check_time(name: str, value: Any) -> datetime:
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise ValidationError(f"{name} is {shown(value)}; expected a datetime with a time zone")
    if not _FIRST <= value <= _LAST:
        raise ValidationError(f"{name} is {value}; expected a time from {_FIRST} to {_LAST}, which can be read back")
    return value
