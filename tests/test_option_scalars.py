"""Options that a program computed with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedq.core.errors import InvalidInput
from embedq.core.options import EmbedOptions, RerankOptions, check_pairs


@pytest.mark.parametrize(
    ("kind", "given", "as_python"),
    [
        (EmbedOptions, {"dimensions": np.int64(3), "max_length": np.int32(8)}, {"dimensions": 3, "max_length": 8}),
        (EmbedOptions, {"normalize": np.bool_(True), "model": np.str_("a")}, {"normalize": True, "model": "a"}),
        (EmbedOptions, {"outputs": [np.str_("dense")]}, {"outputs": ["dense"]}),
        (RerankOptions, {"top_k": np.int64(3), "normalize": np.False_}, {"top_k": 3, "normalize": False}),
        (RerankOptions, {"weights": list(np.array([1.0, 2.0, 3.0]))}, {"weights": (1.0, 2.0, 3.0)}),
        (RerankOptions, {"cutoff_layers": tuple(np.arange(2))}, {"cutoff_layers": (0, 1)}),
        (
            RerankOptions,
            {"compress_ratio": np.int16(2), "cutoff_layers": np.int8(4)},
            {"compress_ratio": 2, "cutoff_layers": 4},
        ),
    ],
)
def test_numpy_s_scalars_are_as_good_as_python_s(kind: Any, given: dict[str, Any], as_python: dict[str, Any]) -> None:
    assert kind.checked(given) == kind.checked(as_python)
    for name in given:
        assert type(getattr(kind.checked(given), name)) is type(getattr(kind.checked(as_python), name))


def test_a_wrong_scalar_of_numpy_is_refused_as_python_s_is() -> None:
    for value in (np.int64(0), np.float64(3.0), np.bool_(True)):
        with pytest.raises(InvalidInput, match="top_k must be a whole number from 1"):
            RerankOptions.checked({"top_k": value})


@pytest.mark.parametrize("of", [list, np.array, lambda pairs: np.array(pairs, dtype=object)])
def test_pairs_may_be_rows_of_an_array(of: Any) -> None:
    pairs = [("a query", "a passage"), ("another", "one more")]
    assert check_pairs(list(of(pairs))) == pairs
    assert check_pairs(of(pairs)) == pairs


def test_an_array_of_numbers_is_no_list_of_pairs() -> None:
    with pytest.raises(InvalidInput, match="pairs must be a list"):
        check_pairs(np.zeros((2, 2)))
