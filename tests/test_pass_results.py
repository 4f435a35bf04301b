"""Rows that can be right, and errors that a job may be told."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedq.core.batching.pass_results import as_failure, check_rows
from embedq.core.errors import DeviceFailure, DeviceOutOfMemory
from embedq.core.results import Sparse
from embedq.core.sequence import Sequence, num_computed_tokens
from tests.checkpoints import FakeModel
from tests.loops import tokens_of


def right_rows() -> dict[str, Any]:
    """Rows of each kind for two sequences."""
    return {
        "dense": np.ones((2, 3), np.float32),
        "colbert": [np.ones((4, 3), np.float32), np.ones((2, 3), np.float32)],
        "sparse": [Sparse(np.array([1, 2], np.int32), np.ones(2, np.float32)) for _ in range(2)],
    }


def _set(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def spoil(rows: dict[str, Any]) -> None:
        row = rows[name][1]
        (row.weights if isinstance(row, Sparse) else row)[..., -1] = value

    return spoil


def test_right_rows_pass() -> None:
    check_rows(FakeModel(), right_rows(), frozenset(right_rows()), 2)


@pytest.mark.parametrize("name", ["dense", "colbert", "sparse"])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda name: lambda rows: rows.update({name: rows[name][:-1]}), "returned 1 {name} rows for 2 sequences"),
        (lambda name: lambda rows: rows.update({name: [*rows[name], rows[name][0]]}), "3 {name} rows for 2 sequences"),
        (lambda name: lambda rows: rows.pop(name), "no {name} rows"),
        (lambda name: _set(name, np.nan), "NaN or infinite {name} values in float32"),
        (lambda name: _set(name, -np.inf), "NaN or infinite {name} values in float32"),
    ],
    ids=["one too few", "one too many", "missing", "nan", "infinite"],
)
def test_rows_that_cannot_be_right_are_refused(name: str, spoil: Any, told: str) -> None:
    rows = right_rows()
    spoil(name)(rows)
    with pytest.raises(DeviceFailure, match=told.format(name=name)):
        check_rows(FakeModel(), rows, frozenset(right_rows()), 2)


def test_only_what_was_wanted_is_checked() -> None:
    rows = right_rows()
    _set("colbert", np.nan)(rows)
    check_rows(FakeModel(), rows, frozenset({"dense"}), 2)
    with pytest.raises(DeviceFailure, match="colbert"):  # nothing but the wish tells the two apart
        check_rows(FakeModel(), rows, frozenset({"dense", "colbert"}), 2)


def piece(*lengths: int) -> list[Sequence]:
    return [Sequence(tokens) for tokens in tokens_of(*lengths)]


def test_a_padded_pass_has_the_tokens_of_its_longest_for_each_another_those_of_each() -> None:
    assert num_computed_tokens(piece(3, 9, 4), is_padded=True) == 27
    assert num_computed_tokens(piece(3, 9, 4), is_padded=False) == 16


def test_a_failed_allocation_says_what_did_not_fit_and_what_to_do() -> None:
    failure = as_failure(FakeModel(), piece(7), MemoryError())
    assert isinstance(failure, DeviceOutOfMemory)
    assert str(failure).startswith("7 tokens of one text or pair do not fit the memory of cpu beside model fake; lower")


def test_what_did_not_fit_is_counted_as_the_model_computes_it() -> None:
    model = FakeModel()
    told = str(as_failure(model, piece(7, 2), MemoryError()))
    model.is_padded = False
    assert (told[:9], str(as_failure(model, piece(7, 2), MemoryError()))[:8]) == ("14 tokens", "9 tokens")


def test_any_other_error_is_the_devices_and_named() -> None:
    failure = as_failure(FakeModel(), piece(7), ValueError("odd shape"))
    assert isinstance(failure, DeviceFailure)
    assert "model fake failed on a single sequence: ValueError: odd shape" in str(failure)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, DeviceOutOfMemory])
def test_what_a_pass_held_is_free_once_its_error_is_kept(error: type[Exception]) -> None:
    held: list[weakref.ref[np.ndarray]] = []

    def fail() -> None:
        tensor = np.ones(3)
        held.append(weakref.ref(tensor))
        raise error("of the pass")

    def failure_of_a_pass() -> Exception:
        try:
            fail()
        except Exception as raised:
            return as_failure(FakeModel(), piece(7), raised)
        raise AssertionError

    gc.disable()
    try:
        failure = failure_of_a_pass()
        assert held[0]() is None
        assert failure.__context__ is None
    finally:
        gc.enable()
