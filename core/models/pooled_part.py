"""The tokens of each sequence that a pooling counts: all, or those behind the prompt.

Where a prompt leaves a sequence no token, sums are 0, the largest is `_LEAST`, and the first token is the sequence's
own: as in sentence-transformers, because no pass may fail for one such text.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from embedq.core.models.token_layout import TokenLayout, reduces_segments

#: The largest component of no token.
_LEAST = -1e9


class Part:
    """The counted tokens of one batch."""

    def __init__(self, layout: TokenLayout, include_prompt: bool) -> None:
        self._layout = layout
        self._skipped = np.zeros(len(layout.lengths), np.int64)
        if not include_prompt:
            skipped = [sequence.tokens.num_prompt_tokens for sequence in layout.batch]
            self._skipped = np.minimum(np.array(skipped, np.int64), layout.lengths)
        self._is_whole = not self._skipped.any()

    @cached_property
    def counts(self) -> torch.Tensor:
        """(num_sequences, 1) float32 tokens that count."""
        (counts,) = self._layout.on_device((self._layout.lengths - self._skipped).astype(np.float32))
        return counts.unsqueeze(1)

    def first(self, states: torch.Tensor) -> torch.Tensor:
        """Of `states` (num_tokens, dim) each sequence's first that counts: (num_sequences, dim)."""
        if self._is_whole:
            return self._layout.first(states)
        is_empty = self._skipped == self._layout.lengths
        (places,) = self._layout.on_device(self._layout.starts + np.where(is_empty, 0, self._skipped))
        return states.index_select(0, places)

    def last(self, states: torch.Tensor) -> torch.Tensor:
        """Each sequence's last: (num_sequences, dim)."""
        last = self._layout.last(states)
        return last if self._is_whole else torch.where(self.counts > 0, last, 0)

    def mean(self, states: torch.Tensor) -> torch.Tensor:
        """(num_sequences, dim) float32."""
        if self._is_whole:
            return self._layout.mean(states)
        return self._reduce(self._counted(states), "sum") / self.counts.clamp(min=1)

    def largest(self, states: torch.Tensor) -> torch.Tensor:
        """Each component's largest: (num_sequences, dim) float32."""
        return self._reduce(self._counted(states), "max").clamp(min=_LEAST)

    def weighted_mean(self, states: torch.Tensor) -> torch.Tensor:
        """The mean weighted by a token's place in its sequence, from 1: (num_sequences, dim) float32."""
        (weights,) = self._layout.on_device((self._layout.places + 1).astype(np.float32)[self._is_counted])
        rows = self._counted(states) * weights.unsqueeze(1)
        sums = self._reduce(weights.unsqueeze(1), "sum")
        return self._reduce(rows, "sum") / sums.clamp(min=1e-9)

    @cached_property
    def _is_counted(self) -> np.ndarray:
        """(num_tokens,) bool."""
        is_counted: np.ndarray = self._layout.places >= np.repeat(self._skipped, self._layout.lengths)
        return is_counted

    def _counted(self, states: torch.Tensor) -> torch.Tensor:
        """Those states that count, in float32."""
        if self._is_whole:
            return states.float()
        return states.index_select(0, *self._layout.on_device(np.flatnonzero(self._is_counted))).float()

    def _reduce(self, rows: torch.Tensor, how: str) -> torch.Tensor:
        """Of `rows` (num_counted, n) the sum or the largest of each sequence: (num_sequences, n)."""
        if reduces_segments(self._layout.device):
            return torch.segment_reduce(rows, how, lengths=self.counts.squeeze(1).long(), axis=0, unsafe=True)
        counts = (self._layout.lengths - self._skipped).tolist()
        parts = torch.split(rows, counts)
        least = rows.new_full((1, rows.shape[1]), _LEAST)  # the largest of no rows would be an error
        return torch.stack([part.sum(0) if how == "sum" else torch.cat([part, least]).amax(0) for part in parts])
