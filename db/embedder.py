"""Embedders: a function of the caller's, the small packaged model, or a local one, behind one protocol."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import OpenAISettings
from .errors import DimensionError, ValidationError, of_caller
from .openai_embedder import OpenAIEmbedder
from .types import Embedder

_TOKENIZED_AT_ONCE = 64
_TOKENS_AT_ONCE = 4096
_load_lock = threading.Lock()


class CallableEmbedder:
    """An embedder made of a function that takes a list of texts and returns one vector for each."""

    def __init__(self, fn: Callable[[list[str]], Any], model_id: str, dimensions: int) -> None:
        self._fn = fn
        self.model_id = model_id
        self.dimensions = dimensions

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """What the function returned for `texts`, as float32. Its exceptions pass through."""
        return _as_float32(self._fn(list(texts)), self.model_id)


class WordLlamaEmbedder:
    """The WordLlama model of the `wordllama` extra: 256 dimensions, unit length, no network, one core.

    The model is read when the first text is embedded and shared by all instances of the process.
    A text without any token (an empty one) has the zero vector.
    """

    model_id = "wordllama-l2-supercat-256"
    dimensions = 256

    def __init__(self) -> None:
        """Raises ValidationError where the extra is not installed."""
        if find_spec("wordllama") is None:
            raise ValidationError("the package wordllama is not installed; run: pip install 'vectorkeep[wordllama]'")

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of `texts`, float32, shape (len(texts), 256): the normalised mean of its tokens.

        The model's own `embed` pads every text of a batch to the longest one, which takes gigabytes where
        one of them is a book. Here each text is averaged by itself, some thousands of tokens at a time.
        """
        table, tokenizer = _load_wordllama()
        vectors = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            part = list(texts[start : start + _TOKENIZED_AT_ONCE])
            encodings = tokenizer.encode_batch_fast(part, add_special_tokens=False)
            for row, encoding in enumerate(encodings, start):
                vectors[row] = _unit(_token_sum(table, encoding.ids))
        return vectors


class SentenceTransformersEmbedder:
    """A model of the `sentence-transformers` extra: unit vectors, computed here.

    Given by name it is loaded when the first text is embedded, else the instance is used as it is.
    """

    def __init__(
        self, model: Any, *, model_id: str | None = None, dimensions: int | None = None, batch_size: int = 32
    ) -> None:
        """
        model: a name or a folder, or a `SentenceTransformer`.
        model_id: by default the name, or the folder's; an instance seldom knows its own.
        dimensions: asked of the model, which loads it, where not given.

        Raises ValidationError where the extra is not installed or the model has no name.
        """
        self._loading = threading.Lock()
        self._batch_size = batch_size
        if isinstance(model, str | Path):
            if find_spec("sentence_transformers") is None:
                raise ValidationError(
                    "the package sentence-transformers is not installed; "
                    "run: pip install 'vectorkeep[sentence-transformers]'"
                )
            self._name, self._model = str(model), None
            name = Path(model).resolve().name if Path(model).is_dir() else str(model)
        else:
            self._name, self._model = "", model
            name = _name_of_model(model)
        self.model_id = model_id or name
        if not self.model_id:
            raise ValidationError("the model does not tell its name; give model_id, which names it for good")
        self.dimensions = dimensions or _dimensions_of_model(self._loaded())

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of `texts`, float32, shape (len(texts), dimensions). The model's exceptions pass through."""
        returned = self._loaded().encode(
            list(texts),
            batch_size=self._batch_size,
            convert_to_numpy=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return _as_float32(returned, self.model_id)

    def _loaded(self) -> Any:
        with self._loading:
            if self._model is None:
                from sentence_transformers import SentenceTransformer  # here: it is an extra, and takes seconds

                self._model = SentenceTransformer(self._name)
            return self._model


def embedder_by_name(name: str) -> Embedder:
    """The embedder that the command line calls `name`. Raises ValidationError that lists the known ones."""
    if name not in _BY_NAME:
        raise ValidationError(f"unknown embedder {name!r}; expected one of: {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[name]()


def configured_embedder() -> Embedder:
    """The command line's embedder: `openai` where VECTORKEEP_OPENAI_MODEL names a model, else `wordllama`."""
    return embedder_by_name("openai" if os.environ.get("VECTORKEEP_OPENAI_MODEL") else "wordllama")


def _configured_openai() -> OpenAIEmbedder:
    """What VECTORKEEP_OPENAI_BASE_URL, _MODEL, _DIMENSIONS and _API_KEY describe."""
    settings = OpenAISettings.load({})
    key = settings.api_key
    return OpenAIEmbedder(
        settings.base_url,
        settings.model,
        settings.dimensions,
        api_key=key.get_secret_value() if key else None,
        batch_size=settings.batch_size,
        max_concurrency=settings.max_concurrency,
        timeout_s=settings.timeout_s,
    )


_BY_NAME: dict[str, Callable[[], Embedder]] = {"openai": _configured_openai, "wordllama": WordLlamaEmbedder}


def checked(embedder: Embedder, texts: Sequence[str]) -> NDArray[np.float32]:
    """The vectors of `texts`, float32, shape (len(texts), embedder.dimensions), every component finite.

    The one place that checks what an embedder returned. Raises DimensionError where the vectors have
    another length than the embedder says, ValidationError where their number is wrong or a component
    is NaN or infinite. The embedder's own exceptions pass through.
    """
    if not texts:
        return np.empty((0, embedder.dimensions), dtype=np.float32)
    with of_caller():
        returned = embedder.embed(texts)
    vectors = _as_float32(returned, embedder.model_id)
    name = f"embedder {embedder.model_id!r}"
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValidationError(
            f"{name} returned an array of shape {vectors.shape} for {len(texts)} texts; "
            f"expected ({len(texts)}, {embedder.dimensions})"
        )
    if vectors.shape[1] != embedder.dimensions:
        raise DimensionError(
            f"{name} returned vectors of {vectors.shape[1]} dimensions, it declares {embedder.dimensions}; "
            "correct its `dimensions`"
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise ValidationError(
            f"{name} returned NaN or an infinity for {int((~finite).sum())} of {len(texts)} texts, "
            f"first for number {bad}: {texts[bad][:60]!r}"
        )
    return np.array(vectors, order="C")  # a copy: the embedder may use its buffer again for the next texts


def _as_float32(returned: Any, model_id: str) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite; `checked` refuses it
            return np.asarray(returned, dtype=np.float32)
    except (TypeError, ValueError) as exc:
        raise ValidationError(
            f"embedder {model_id!r} returned {type(returned).__name__} that is no array of numbers: {exc}"
        ) from exc


def _name_of_model(model: Any) -> str:
    """The name that a `SentenceTransformer` has of its own, "" where it does not tell.

    Not its `base_model`: one that was trained further gives other vectors than that.
    """
    name = getattr(getattr(model, "model_card_data", None), "model_id", None)
    return name if isinstance(name, str) else ""


def _dimensions_of_model(model: Any) -> int:
    # The older name is deprecated since version 5.
    ask = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    dimensions = ask()
    if dimensions is None:
        raise ValidationError("the model does not tell the length of its vectors; give dimensions")
    return int(dimensions)


def _token_sum(table: NDArray[np.float32], ids: Sequence[int]) -> NDArray[np.float32]:
    total = np.zeros(table.shape[1], dtype=np.float32)
    for start in range(0, len(ids), _TOKENS_AT_ONCE):
        total += table.take(ids[start : start + _TOKENS_AT_ONCE], axis=0, mode="clip").sum(axis=0)
    return total


def _unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.linalg.norm(vector)
    return vector / np.float32(length) if length > 0 else vector


def _load_wordllama() -> tuple[NDArray[np.float32], Any]:
    with _load_lock:
        return _read_wordllama()


@cache
def _read_wordllama() -> tuple[NDArray[np.float32], Any]:
    """The token vectors, shape (vocabulary, 256), and the tokenizer."""
    # Unset, the tokenizer prints a warning in every process that forks after its first use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _root_logger_kept():
        import wordllama  # here: it is an extra

        # Without the folder it looks for its tokenizer in the home directory, and on the network.
        folder = Path(wordllama.__file__).parent
        model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
    model.tokenizer.no_padding()
    return model.embedding, model.tokenizer


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undo what wordllama does at import: it calls `logging.basicConfig(level=INFO)`."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
        root.setLevel(level)
