"""Attention over sequences that lie in one line: each token sees the tokens of its own sequence, all of them.

Comes in: queries, keys and values of all tokens, (num_rows, 3 * dim), for a CPU queries times `cpu_scale`. Goes out:
(num_rows, dim). On CUDA torch's kernel for sequences of different lengths does it. On a CPU sequences of like
length are taken together, with three products of matrices, which is 1.5 to 3 times as fast as torch's fused
kernel up to 512 tokens (docs/measurements.md, "a pass without padding").
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from embedq.core.models.token_layout import TokenLayout

#: Sequences whose lengths are equal when rounded up to a multiple of this are taken together on a CPU. Kernels are
#: quickest at such widths, and it bounds how many different shapes they must be built for.
_STEP = 16

#: Scores that are in memory at a time: 16 MiB of bfloat16. More sequences and heads than that go in parts.
_MAX_SCORES = 8_000_000

#: Sums of powers within these are used as they are; beyond them they are made again, more slowly. bfloat16 and
#: float32 reach from 1e-38 to 3e38, and values of some 100,000, weighted by powers, must fit below that too.
_MIN_SUM, _MAX_SUM = 1e-33, 1e33


def cpu_scale(width: int) -> float:
    """What queries are multiplied by for `ByLength`: softmax's scale, and for powers of 2, a sixth quicker than of e."""
    return math.log2(math.e) / math.sqrt(width)


class VarlenLayout(NamedTuple):
    """Where a batch's sequences lie, for CUDA's attention."""

    num_tokens: int
    #: (num_sequences + 1,) int32 on the device: each sequence's first row, and the one behind the last.
    starts: torch.Tensor
    longest: int


def varlen_layout(layout: TokenLayout) -> VarlenLayout:
    """Made once for a batch."""
    return VarlenLayout(layout.num_tokens, layout.offsets, int(layout.lengths.max()))


class Varlen(nn.Module):
    """CUDA's attention."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads

    def forward(self, states: torch.Tensor, plan: VarlenLayout) -> torch.Tensor:
        """(num_rows, 3 * dim) -> (num_rows, dim)."""
        from torch.nn.attention.varlen import varlen_attn

        queries, keys, values = states.view(len(states), 3, self._num_heads, -1).unbind(1)
        # Seen through the joined rows, not copied: the kernel wants no more than a head's values side by side. And no
        # scale of ours: torch 2.10 takes none, and its own is the right one.
        attended = varlen_attn(queries, keys, values, plan.starts, plan.starts, plan.longest, plan.longest)
        assert isinstance(attended, torch.Tensor)
        return attended.flatten(1)


class GroupedLayout(NamedTuple):
    """How a batch's rows are grouped for a CPU's attention."""

    #: Rows from here on belong to no sequence; there is one at least where a place needs it.
    num_tokens: int
    #: (num_places,) the row of each place, `num_tokens` where the sequence has ended; (num_rows,) the place of each row,
    #: from `num_tokens` on that of the last token.
    rows: torch.Tensor
    places: torch.Tensor
    #: Of each group of like lengths (count, 1, length, 1): True where there is a token, False where a sequence has ended.
    is_token: list[torch.Tensor]


def needs_spare_row(layout: TokenLayout) -> bool:
    """Whether some place of a plan is no token's, so that it needs a row which is nobody's."""
    return bool((layout.lengths % _STEP).any())


def grouped_layout(layout: TokenLayout, num_rows: int) -> GroupedLayout:
    """Made once for a batch: sequences of like length together, one group's places behind the other's.

    By NumPy: each operation of torch's lets go of the interpreter's lock, and waits for it again while jobs are answered.
    """
    sources, targets, groups, num_places = [], np.zeros(num_rows, np.int64), [], 0
    steps = -(-layout.lengths // _STEP) * _STEP
    for length in np.unique(steps).tolist():
        own = np.flatnonzero(steps == length)
        those = np.pad(own, (0, _rounded(len(own)) - len(own)), "edge")
        starts, lengths = layout.starts[those][:, np.newaxis], layout.lengths[those][:, np.newaxis]
        places = np.arange(length)
        is_token = places < lengths  # (count, length)
        sources.append(np.where(is_token, starts + places, layout.num_tokens).ravel())
        is_own = is_token[: len(own)]
        targets[(starts + places)[: len(own)][is_own]] = num_places + np.flatnonzero(is_own)
        num_places += is_token.size
        groups.append(torch.from_numpy(is_token.reshape(-1, 1, length, 1)))
    targets[layout.num_tokens :] = targets[layout.num_tokens - 1]
    return GroupedLayout(
        layout.num_tokens, torch.from_numpy(np.concatenate(sources)), torch.from_numpy(targets), groups
    )


class ByLength(nn.Module):
    """A CPU's attention. TorchScript reads all of it (`core.models.encoders.packed`)."""

    def __init__(self, num_heads: int, max_scores: int = _MAX_SCORES) -> None:
        super().__init__()
        self._num_heads = num_heads
        self._max_scores = max_scores
        self._min_sum, self._max_sum = _MIN_SUM, _MAX_SUM

    def forward(self, states: torch.Tensor, plan: GroupedLayout) -> torch.Tensor:
        """(num_rows, 3 * dim), whose rows behind the last token become 0, -> (num_rows, dim); there the last token's."""
        states[plan.num_tokens :] = 0  # what is read where a sequence has ended: never another's, which may be NaN
        placed = torch.split(states.index_select(0, plan.rows), [group.numel() for group in plan.is_token])
        found = [self._attend(part, group) for part, group in zip(placed, plan.is_token)]  # noqa: B905  (TorchScript)
        return (torch.cat(found) if len(found) > 1 else found[0]).index_select(0, plan.places)

    def _attend(self, states: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """(count * length, 3 * dim) of one group -> (count * length, dim)."""
        count, length, heads = is_token.size(0), is_token.size(2), self._num_heads
        width = states.size(1) // 3 // heads
        apart = states.view(count, length, 3, heads, width).permute(2, 0, 3, 1, 4)
        queries_keys = apart[:2].reshape(2, count * heads, length, width)
        # Behind each value a 1, which counts exponentials as the product goes; where the sequence has ended, all 0: so
        # what is there counts nothing, without a mask over the scores.
        values = states.new_empty([count, heads, length, width + 1])
        values[..., :width] = apart[2]
        values[..., width:] = is_token
        values = values.view(count * heads, length, width + 1)
        is_token = is_token.expand(count, heads, length, 1).reshape(-1, length)
        found = self._weighted(queries_keys[0], queries_keys[1], values, is_token)
        return found.view(count, heads, length, width).transpose(1, 2).reshape(count * length, heads * width)

    def _weighted(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """Values weighted by the softmax of scores, in parts: (n, length, width), of values (n, length, width + 1)."""
        num, length = q.size(0), q.size(1)
        num_at_once = max(1, self._max_scores // (length * length))
        rows_at_once = min(length, max(1, self._max_scores // length))
        if num_at_once >= num:
            return self._softmax_product(q, k, v, is_token)
        found = v.new_empty([num, length, v.size(2) - 1])
        for first in range(0, num, num_at_once):
            last = first + num_at_once
            for row in range(0, length, rows_at_once):
                end = row + rows_at_once
                part = self._softmax_product(q[first:last, row:end], k[first:last], v[first:last], is_token[first:last])
                found[first:last, row:end] = part
        return found

    def _softmax_product(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_token: torch.Tensor
    ) -> torch.Tensor:
        """2^(q k) v over the sum of 2^(q k).

        Not less their largest, as is usual: that would be another pass over the scores. It only matters for
        sums that leave the range of numbers, and it is done for the sequences and heads that have such a sum: in some
        networks one head of a hundred.
        """
        found = torch.bmm(torch.bmm(q, k.transpose(1, 2)).exp2_(), v)
        sums = found[..., -1:]
        smallest, largest = torch.aminmax(sums)
        weighted = found[..., :-1] * sums.reciprocal()
        if not (float(smallest) > self._min_sum and float(largest) < self._max_sum):
            is_exact = ((sums > self._min_sum) & (sums < self._max_sum)).flatten(1).all(dim=1)  # False for NaN
            others = torch.nonzero(~is_exact).flatten()
            weighted[others] = _softmax_less_largest(q[others], k[others], v[others], is_token[others])
        return weighted


def _rounded(count: int) -> int:
    """`count`, up to a quarter more: 1 to 8, 10, 12, 14, 16, 20 and so on.

    Kernels are built for each number of matrices, at a millisecond and a megabyte.
    """
    step = max(1, 1 << (count.bit_length() - 3)) if count > 3 else 1
    return -(-count // step) * step


def _softmax_less_largest(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """The same for any scores, in float32."""
    scores = torch.bmm(q, k.transpose(1, 2)).float() * math.log(2)
    scores.masked_fill_(~is_token.unsqueeze(1), -math.inf)
    return torch.bmm(functional.softmax(scores, dim=-1).to(v.dtype), v[..., :-1])
