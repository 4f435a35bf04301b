"""Computes a causal language model's logits of a few tokens as the next one. Shared by rerankers that read them.

A vocabulary has a hundred thousand tokens and a reranker reads one or two of them, so the head keeps only their rows,
in float32, and reads only each sequence's last state.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.models.token_layout import pad
from embedq.core.models.weights import load
from embedq.core.sequence import Sequence


class NextToken:
    """A causal language model on a device, with a head for `token_ids` only."""

    def __init__(self, spec: ModelSpec, device: str, precision: str, token_ids: list[int]) -> None:
        self._spec = spec
        self._device = device
        self._module = cast(Any, load("AutoModelForCausalLM", spec, device, precision))
        self._num_tokens = len(token_ids)
        # The network still scales or caps the logits as it did.
        self._module.set_output_embeddings(_Rows(self._module.get_output_embeddings(), token_ids))

    def logits(self, batch: list[Sequence]) -> Tensor:
        """(num_sequences, num_tokens) float32, in the order of the batch and of `token_ids`.

        Padding is on the right and there is no mask: under causal attention no real token sees what follows it.
        """
        ids, _ = pad(batch, self._spec.pad_token_id, self._device)
        ends = sorted({sequence.length - 1 for sequence in batch})
        kept = torch.tensor(ends, device=self._device)
        logits = self._module(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
        assert logits.shape == (len(batch), len(ends), self._num_tokens), logits.shape
        place = {end: index for index, end in enumerate(ends)}
        columns = torch.tensor([place[sequence.length - 1] for sequence in batch], device=self._device)
        last: Tensor = logits[torch.arange(len(batch), device=self._device), columns]
        return last


class _Rows(nn.Module):
    """A head reduced to the rows of a few tokens."""

    def __init__(self, head: Any, token_ids: list[int]) -> None:
        super().__init__()
        self.weight = head.weight[token_ids].detach().float()  # (num_tokens, hidden), a copy: the head can go
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else bias[token_ids].detach().float()

    def forward(self, states: Tensor) -> Tensor:
        """(..., hidden) -> (..., num_tokens) float32"""
        return functional.linear(states.float(), self.weight, self.bias)
