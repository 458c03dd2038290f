"""Texts cut into chunks at the best boundary that fits: paragraphs, sentences, words."""

from dataclasses import dataclass

from semantic_text_splitter import TextSplitter

from .errors import ValidationError


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A piece of a text and where it stands there, in characters."""

    text: str
    start: int
    end: int


class Chunker:
    """Cuts texts into chunks of at most `size` characters, neighbours sharing up to `overlap`."""

    def __init__(self, size: int, overlap: int) -> None:
        if overlap >= size:
            raise ValidationError(f"chunk_overlap is {overlap}; expected less than chunk_size, {size}")
        self._size = size
        self._splitter = TextSplitter(size, overlap)

    def split(self, text: str) -> list[TextChunk]:
        """The chunks of `text` in order, at least one."""
        if len(text) <= self._size:
            return [TextChunk(text, 0, len(text))]
        pieces = self._splitter.chunk_indices(text)
        chunks = [TextChunk(piece, start, start + len(piece)) for start, piece in pieces]
        return chunks or [TextChunk(text, 0, len(text))]
