"""Bidirectional attention over sequences that lie in one line: each token sees all tokens of its own sequence.

Input: queries, keys and values of all tokens, (num_rows, 3 * dim), on a CPU with queries times `cpu_scale`. Output:
(num_rows, dim). On CUDA torch's kernel for sequences of different lengths computes it. On a CPU sequences of like
length are computed together by three matrix products, which is 1.5 to 3 times as fast as torch's fused kernel up to 512
tokens (docs/measurements.md, "a pass without padding").
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from embedq.core.models.token_layout import TokenLayout

#: On a CPU sequences are grouped by length, rounded up to a multiple of this. Kernels are fastest at such widths, and
#: rounding bounds the number of shapes to build them for.
_STEP = 16

#: Most scores in memory at a time: 16 MiB of bfloat16. Larger groups are computed in parts.
_MAX_SCORES = 8_000_000

#: Sums of powers within these limits are used as they are; others are recomputed in a slower, safe way. bfloat16 and
#: float32 reach from 1e-38 to 3e38, and values of some 100,000, weighted by powers, must fit below that too.
_MIN_SUM, _MAX_SUM = 1e-33, 1e33


def cpu_scale(width: int) -> float:
    """The factor of queries for `ByLength`: softmax's scale, for powers of 2, which are a sixth faster than of e."""
    return math.log2(math.e) / math.sqrt(width)


class VarlenLayout(NamedTuple):
    """The places of a batch's sequences, as CUDA's attention needs them."""

    num_tokens: int
    #: (num_sequences + 1,) int32 on the device; see `TokenLayout.offsets`.
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
        # Views of the joined rows, not copies: the kernel only needs each head's values side by side. We pass no scale:
        # torch 2.10 takes none, and its own is right.
        attended = varlen_attn(queries, keys, values, plan.starts, plan.starts, plan.longest, plan.longest)
        assert isinstance(attended, torch.Tensor)
        return attended.flatten(1)


class GroupedLayout(NamedTuple):
    """A batch's rows grouped by length, as a CPU's attention needs them."""

    #: Rows from here on belong to no sequence; there is at least one if `needs_spare_row`.
    num_tokens: int
    #: (num_places,) the row of each place, `num_tokens` behind a sequence's end; (num_rows,) the place of each row,
    #: from `num_tokens` on that of the last token.
    rows: torch.Tensor
    places: torch.Tensor
    #: For each group of like lengths (count, 1, length, 1): True at tokens, False behind a sequence's end.
    is_token: list[torch.Tensor]


def needs_spare_row(layout: TokenLayout) -> bool:
    """Returns True if grouping leaves places behind a sequence's end, which need a row that belongs to no token."""
    return bool((layout.lengths % _STEP).any())


def grouped_layout(layout: TokenLayout, num_rows: int) -> GroupedLayout:
    """Group the sequences of a batch by length, one group's places behind the other's. Built once per batch.

    Uses NumPy: each torch operation releases the interpreter's lock, and waits for it again while other threads run.
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
        """Attend: (num_rows, 3 * dim) -> (num_rows, dim).

        Sets rows behind the last token to 0; returns the last token's there.
        """
        states[plan.num_tokens :] = 0  # read behind a sequence's end: never another sequence's row, which may be NaN
        placed = torch.split(states.index_select(0, plan.rows), [group.numel() for group in plan.is_token])
        found = [self._attend(part, group) for part, group in zip(placed, plan.is_token)]  # noqa: B905  (TorchScript)
        return (torch.cat(found) if len(found) > 1 else found[0]).index_select(0, plan.places)

    def _attend(self, states: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """(count * length, 3 * dim) of one group -> (count * length, dim)."""
        count, length, heads = is_token.size(0), is_token.size(2), self._num_heads
        width = states.size(1) // 3 // heads
        apart = states.view(count, length, 3, heads, width).permute(2, 0, 3, 1, 4)
        queries_keys = apart[:2].reshape(2, count * heads, length, width)
        # A 1 behind each value makes the product sum the exponentials, too. Behind a sequence's end all are 0, so those
        # places count nothing, without a mask over the scores.
        values = states.new_empty([count, heads, length, width + 1])
        values[..., :width] = apart[2]
        values[..., width:] = is_token
        values = values.view(count * heads, length, width + 1)
        is_token = is_token.expand(count, heads, length, 1).reshape(-1, length)
        found = self._weighted(queries_keys[0], queries_keys[1], values, is_token)
        return found.view(count, heads, length, width).transpose(1, 2).reshape(count * length, heads * width)

    def _weighted(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """Weigh values `v` (n, length, width + 1) by the softmax of scores, in parts: (n, length, width)."""
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
        """2^(q k) v divided by the sum of 2^(q k).

        Does not subtract the largest score, as is usual: that would be another pass over the scores. It only matters if
        sums leave the range of numbers; those sequences and heads are recomputed with it, in some networks one head of
        a hundred.
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
    """Round `count` up by a quarter at most: 1 to 8, 10, 12, 14, 16, 20 and so on.

    Each number of matrices needs its own kernel, which costs a millisecond and a megabyte.
    """
    step = max(1, 1 << (count.bit_length() - 3)) if count > 3 else 1
    return -(-count // step) * step


def _softmax_less_largest(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Like `_softmax_product` for any scores, in float32."""
    scores = torch.bmm(q, k.transpose(1, 2)).float() * math.log(2)
    scores.masked_fill_(~is_token.unsqueeze(1), -math.inf)
    return torch.bmm(functional.softmax(scores, dim=-1).to(v.dtype), v[..., :-1])
