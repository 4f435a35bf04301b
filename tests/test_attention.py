"""Attention over sequences in one line: the softmax of all scores, whatever the lengths and however they are grouped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from embedq.core.models.encoders.attention import ByLength, cpu_scale, grouped_layout
from embedq.core.models.token_layout import TokenLayout
from embedq.core.sequence import Sequence, Tokens

HEADS, WIDTH = 2, 8

#: Lengths around the steps at which sequences are grouped.
LENGTHS = st.lists(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 50]), min_size=1, max_size=6)


def layout_of(lengths: list[int]) -> TokenLayout:
    return TokenLayout([Sequence(Tokens(np.zeros(length, np.int32))) for length in lengths], "cpu")


def states_of(num_rows: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Queries, keys and values of each row."""
    return scale * torch.randn(num_rows, 3 * HEADS * WIDTH, generator=torch.Generator().manual_seed(seed))


def one_by_one(states: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """torch's attention for each sequence by itself."""
    found = []
    for own in states[: sum(lengths)].split(lengths):  # type: ignore[no-untyped-call]
        queries, keys, values = own.view(len(own), 3, HEADS, WIDTH).permute(1, 2, 0, 3)
        found.append(functional.scaled_dot_product_attention(queries, keys, values, scale=1.0).transpose(0, 1))
    return torch.cat(found).reshape(-1, HEADS * WIDTH)


def attend(states: torch.Tensor, lengths: list[int], max_scores: int = 1_000_000) -> torch.Tensor:
    states = functional.pad(states, (0, 0, 0, 1))  # a row that is nobody's
    states[:, : HEADS * WIDTH] *= cpu_scale(1)
    there = grouped_layout(layout_of(lengths), len(states))
    return ByLength(HEADS, max_scores)(states, there)[: sum(lengths)]


@given(lengths=LENGTHS, seed=st.integers(0, 99), num_filling=st.integers(0, 20))
@settings(max_examples=60)
def test_each_token_sees_its_own_sequence_and_nothing_else(lengths: list[int], seed: int, num_filling: int) -> None:
    states = states_of(sum(lengths) + num_filling, seed)
    torch.testing.assert_close(attend(states, lengths), one_by_one(states, lengths), rtol=1e-5, atol=1e-5)


@given(lengths=LENGTHS, max_scores=st.sampled_from([64, 300, 2_000, 10_000]))
@settings(max_examples=40)
def test_scores_in_parts_give_the_same(lengths: list[int], max_scores: int) -> None:
    states = states_of(sum(lengths), 1)
    found = attend(states, lengths, max_scores)
    torch.testing.assert_close(found, one_by_one(states, lengths), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [6.0, 30.0])
def test_scores_beyond_the_range_of_exponentials_are_right_too(scale: float) -> None:
    """Scores of hundreds and of thousands, of both signs: their exponentials are 0 and infinite."""
    lengths = [3, 17, 17, 40]
    states = states_of(sum(lengths), 2, scale)
    torch.testing.assert_close(attend(states, lengths), one_by_one(states, lengths), rtol=1e-4, atol=1e-4)


def test_a_broken_sequence_breaks_no_other() -> None:
    lengths = [12, 14, 14, 40]
    states = states_of(sum(lengths), 3)
    expected = one_by_one(states, lengths)
    states[13] = torch.nan
    found = attend(states, lengths)
    assert found[12:26].isnan().any()
    for kept in (slice(0, 12), slice(26, 80)):
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=1e-5)
