"""The real MiniLM, held against sentence-transformers on real texts: docstrings of the standard library."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedq import core
from embedq.core.engine import Engine
from embedq.deploy.demo import texts as demo_texts

TOLERANCE = 1e-5


def load(directory: Path, **settings: Any) -> Engine:
    return core.load(str(directory), device="cpu", precision="float32", **settings)


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    """1,000 docstrings of the standard library: 20 longer than any limit, and of the others the short ones."""
    found = [one.text for one in demo_texts.read(3000)]
    chosen = sorted(found, key=len)[-20:] + [text for text in found if len(text) <= 300][:980]
    assert len(chosen) == 1000
    return random.Random(0).sample(chosen, 1000)


@pytest.fixture(scope="module")
def engine(minilm: Path) -> Iterator[Engine]:
    """The real MiniLM in float32."""
    with load(minilm) as engine:
        yield engine


@pytest.fixture(scope="module")
def vectors(engine: Engine, real_texts: list[str]) -> np.ndarray:
    """(1000, 384) what the engine makes of the real texts, in batches of its own choice."""
    dense = engine.embed(real_texts).dense
    assert dense is not None
    return dense


def test_vectors_of_real_texts_are_those_of_sentence_transformers(
    minilm: Path, real_texts: list[str], vectors: np.ndarray
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        reference = SentenceTransformer(str(minilm), device="cpu", local_files_only=True)
        wanted = reference.encode(real_texts, batch_size=32, show_progress_bar=False)
    cosines = (vectors * wanted).sum(axis=1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(wanted, axis=1)
    print(
        f"\nMiniLM, 1,000 texts, against sentence-transformers: "
        f"lowest cosine {cosines.min():.8f}, largest difference {np.abs(vectors - wanted).max():.2e}"
    )
    assert vectors.dtype == np.float32
    assert cosines.min() >= 0.99999
    np.testing.assert_allclose(vectors, wanted, atol=TOLERANCE)


def test_a_text_alone_gives_the_vector_it_has_in_any_batch(
    engine: Engine, real_texts: list[str], vectors: np.ndarray
) -> None:
    chosen = random.Random(1).sample(range(1000), 40)
    alone = np.concatenate([engine.embed([real_texts[index]]).dense for index in chosen])
    print(f"\nMiniLM, a text alone against in a batch: largest difference {np.abs(alone - vectors[chosen]).max():.2e}")
    np.testing.assert_allclose(alone, vectors[chosen], atol=TOLERANCE)


def test_the_order_of_the_texts_changes_nothing_but_the_order(
    engine: Engine, real_texts: list[str], vectors: np.ndarray
) -> None:
    order = random.Random(2).sample(range(1000), 60)
    again = np.asarray(engine.embed([real_texts[index] for index in order]))
    np.testing.assert_allclose(again, vectors[order], atol=TOLERANCE)


def test_token_rows_are_unit_vectors_whatever_the_batch(engine: Engine, real_texts: list[str]) -> None:
    together = engine.embed([*real_texts[:8], ""], outputs=["colbert"]).colbert
    assert together is not None
    for text, rows in zip([*real_texts[:8], ""], together, strict=True):
        (alone,) = engine.embed([text], outputs=["colbert"]).colbert or []
        np.testing.assert_allclose(rows, alone, atol=TOLERANCE)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=TOLERANCE)
    assert len(together[-1]) == 1  # of the empty text only the closing token is left
