"""The results of a job behave like the arrays they hold, and show no value of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedq.core.codec import pack, unpack
from embedq.core.results import Embeddings, Ranking

PROPERTY = settings(max_examples=60)

DENSE = np.arange(12, dtype=np.float32).reshape(3, 4)
COLBERT = [np.full((count, 4), 7.25, np.float32) for count in (2, 0, 3)]


def test_embeddings_are_an_array_where_one_is_expected() -> None:
    embeddings = Embeddings(DENSE)
    np.testing.assert_array_equal(np.asarray(embeddings), DENSE)
    assert np.asarray(embeddings, dtype=np.float16).dtype == np.float16
    assert (np.stack([embeddings, embeddings]).shape, (DENSE @ np.asarray(embeddings).T).shape) == ((2, 3, 4), (3, 3))
    np.testing.assert_array_equal(np.linalg.norm(embeddings, axis=1), np.linalg.norm(DENSE, axis=1))


def test_embeddings_are_read_row_by_row() -> None:
    embeddings = Embeddings(DENSE)
    assert len(embeddings) == 3
    np.testing.assert_array_equal(embeddings[1], DENSE[1])
    np.testing.assert_array_equal(embeddings[1:], DENSE[1:])
    np.testing.assert_array_equal(list(embeddings), list(DENSE))


def test_an_array_made_of_embeddings_is_a_copy_only_if_asked_for() -> None:
    assert np.shares_memory(np.asarray(Embeddings(DENSE)), DENSE)
    assert not np.shares_memory(np.array(Embeddings(DENSE)), DENSE)


def test_embeddings_without_dense_vectors_give_their_token_rows() -> None:
    embeddings = Embeddings(None, COLBERT)
    assert len(embeddings) == 3
    assert embeddings[0] is COLBERT[0]
    assert [len(row) for row in embeddings] == [2, 0, 3]
    with pytest.raises(TypeError, match="colbert"):
        np.asarray(embeddings)
    np.testing.assert_array_equal(Embeddings(DENSE, COLBERT)[0], DENSE[0])  # with both, the dense ones


@pytest.mark.parametrize(
    ("embeddings", "shown"),
    [
        (Embeddings(DENSE), "3 × 4 float32"),
        (Embeddings(DENSE.astype(np.int8)), "3 × 4 int8"),
        (Embeddings(DENSE, COLBERT), "3 × 4 float32 + colbert"),
        (Embeddings(None, COLBERT), "3 × colbert"),
        (Embeddings(np.empty((0, 4), np.float32)), "0 × 4 float32"),
    ],
)
def test_embeddings_show_their_shape_and_no_value(embeddings: Embeddings, shown: str) -> None:
    assert (repr(embeddings), str(embeddings)) == (shown, shown)


def test_a_ranking_is_read_best_first() -> None:
    ranking = Ranking(np.array([0.25, 3, -1], np.float32), np.array([1, 0], np.int32), "m")
    assert list(ranking) == [(1, 3.0), (0, 0.25)]
    assert len(ranking) == 2
    assert repr(ranking) == "best 2 of 3 passages"


@pytest.mark.parametrize("colbert", [[], [np.empty((0, 4), np.float32)], COLBERT])
def test_token_rows_survive_their_travelling_form(colbert: list[np.ndarray]) -> None:
    back = Embeddings.from_map(Embeddings(None, colbert).to_map()).colbert
    assert back is not None
    assert [row.tolist() for row in back] == [row.tolist() for row in colbert]


def test_fields_of_a_later_version_are_passed_over() -> None:
    assert repr(Embeddings.from_map(Embeddings(DENSE).to_map() | {"later": [1]})) == "3 × 4 float32"


@PROPERTY
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=5)),
    st.none() | st.lists(st.integers(0, 4), max_size=4),
)
def test_embeddings_come_back_row_by_row(dense: np.ndarray, token_counts: list[int] | None) -> None:
    colbert = None if token_counts is None else [np.full((count, 3), count, np.float32) for count in token_counts]
    back = unpack(pack(Embeddings(dense, colbert, None, dense[:2], "m")))
    assert isinstance(back, Embeddings)
    np.testing.assert_array_equal(back.dense, dense)
    np.testing.assert_array_equal(back.int8_ranges, dense[:2])
    assert back.model == "m"
    if colbert is None:
        assert back.colbert is None
    else:
        assert [row.tolist() for row in back.colbert or []] == [row.tolist() for row in colbert]


def test_a_ranking_comes_back() -> None:
    back = unpack(pack({"result": Ranking(np.array([0.5, 2], np.float32), np.array([1, 0], np.int32), "m")}))["result"]
    assert isinstance(back, Ranking)
    assert (list(back), back.model, back.scores.dtype) == ([(1, 2.0), (0, 0.5)], "m", np.float32)


def test_embeddings_have_what_is_asked_of_an_array() -> None:
    embeddings = Embeddings(DENSE)
    assert (embeddings.shape, embeddings.ndim, embeddings.dtype) == ((3, 4), 2, np.float32)
    np.testing.assert_array_equal(embeddings.T, DENSE.T)
    assert np.shares_memory(embeddings.T, DENSE)
    assert embeddings.tolist() == DENSE.tolist()
    assert type(embeddings.tolist()[0][0]) is float


def test_what_arrived_is_read_only_and_its_copy_is_not() -> None:
    arrived = unpack(pack(Embeddings(DENSE)))
    assert not arrived.dense.flags.writeable
    changed = arrived.copy()
    changed *= 2
    np.testing.assert_array_equal(changed, DENSE * 2)
    np.testing.assert_array_equal(arrived.dense, DENSE)


@pytest.mark.parametrize("name", ["shape", "ndim", "dtype", "T"])
def test_embeddings_without_dense_vectors_have_no_shape(name: str) -> None:
    embeddings = Embeddings(None, COLBERT)
    assert not hasattr(embeddings, name)
    for ask in (embeddings.tolist, embeddings.copy):
        with pytest.raises(AttributeError, match="no dense vectors"):
            ask()
