import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from db.embedder import CallableEmbedder, WordLlamaEmbedder, checked, embedder_by_name
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
    with pytest.raises(ValidationError, match=r"'bert'; expected one of: wordllama"):
        embedder_by_name("bert")


def test_wordllama_gives_unit_vectors_that_find_related_texts():
    embedder = embedder_by_name("wordllama")
    vectors = checked(
        embedder, ["How do I read a file?", "Opening and reading files", "The moon is far away"]
    )
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
