"""Cutting, scaling and quantising, each against its definition or the library that set it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedq.core.vectors import finish, max_sim, normalized

PROPERTY = settings(max_examples=100)

ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.floats(-1000, 1000, width=32),
)


@PROPERTY
@given(ROWS)
def test_every_row_is_scaled_to_length_one_and_zero_stays_zero(rows: np.ndarray) -> None:
    scaled = normalized(rows)
    lengths = np.linalg.norm(scaled.astype(np.float64), axis=1)
    was_zero = np.linalg.norm(rows, axis=1) < 1e-6
    np.testing.assert_allclose(lengths[~was_zero], 1, atol=1e-5)
    assert np.isfinite(scaled).all()
    assert scaled.dtype == np.float32


@PROPERTY
@given(ROWS, st.integers(1, 9), st.booleans())
def test_components_are_cut_before_the_row_is_scaled(rows: np.ndarray, dimensions: int, normalize: bool) -> None:
    vectors, ranges = finish(rows, dimensions, normalize, "float32")
    cut = rows[:, :dimensions]
    np.testing.assert_array_equal(vectors, normalized(cut) if normalize else cut)
    assert ranges is None
    assert vectors.flags.c_contiguous


@PROPERTY
@given(ROWS)
def test_int8_and_its_ranges_give_each_value_back_within_a_step(rows: np.ndarray) -> None:
    vectors, ranges = finish(rows, None, False, "int8")
    assert ranges is not None
    assert (vectors.dtype, vectors.shape, ranges.dtype, ranges.shape) == (
        np.int8,
        rows.shape,
        np.float32,
        (2, rows.shape[1]),
    )
    steps = (ranges[1] - ranges[0]).astype(np.float64) / 255
    restored = ranges[0] + (vectors.astype(np.float64) + 128) * steps
    assert (np.abs(restored - rows) <= 1.01 * steps + 1e-6).all()


@PROPERTY
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 20)), elements=st.floats(-1, 1, width=32)))
def test_ubinary_holds_one_sign_per_bit(rows: np.ndarray) -> None:
    vectors, _ = finish(rows, None, False, "ubinary")
    bits = np.unpackbits(vectors, axis=1)[:, : rows.shape[1]]
    np.testing.assert_array_equal(bits, rows > 0)
    assert (vectors.dtype, vectors.shape[1]) == (np.uint8, -(-rows.shape[1] // 8))


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float32", (0, 16)), ("float16", (0, 16)), ("int8", (0, 16)), ("ubinary", (0, 2))]
)
def test_no_rows_give_no_vectors_of_the_right_width(dtype: str, shape: tuple[int, int]) -> None:
    vectors, _ = finish(np.empty((0, 32), np.float32), 16, True, dtype)  # type: ignore[arg-type]
    assert vectors.shape == shape
    assert vectors.dtype == np.dtype("uint8" if dtype == "ubinary" else dtype)


@pytest.mark.parametrize("precision", ["int8", "ubinary"])
def test_quantised_vectors_are_those_of_sentence_transformers(precision: Literal["int8", "ubinary"]) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    rows = np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32)
    ours, _ = finish(rows, None, False, precision)
    np.testing.assert_array_equal(ours, quantize_embeddings(rows, precision))


def test_float16_is_the_nearest_half_of_each_value() -> None:
    rows = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_array_equal(finish(rows, None, False, "float16")[0], rows.astype(np.float16))


def test_max_sim_is_the_mean_of_each_query_tokens_best_match() -> None:
    random = np.random.default_rng(1)
    query, passage = normalized(random.normal(size=(3, 8))), normalized(random.normal(size=(5, 8)))
    by_definition = sum(max(float(q @ p) for p in passage) for q in query) / len(query)
    assert max_sim(query, passage) == pytest.approx(by_definition, abs=1e-6)


def test_max_sim_without_tokens_is_zero() -> None:
    none, some = np.empty((0, 8), np.float32), np.ones((2, 8), np.float32)
    assert (max_sim(none, some), max_sim(some, none)) == (0.0, 0.0)
