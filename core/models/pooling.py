"""Pools a text's hidden states into its vector, and applies the modules around the pooling. Shared by the families.

Computes in float32 whatever the network's precision: a sum of hundreds of half-precision values loses its last digits,
and a row per text costs next to nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from embedq.core.checkpoint.module_chain import width_behind
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.models.pooled_part import Part
from embedq.core.models.saved_modules import load_modules
from embedq.core.models.token_layout import TokenLayout


class Pooling:
    """Applies `spec.token_modules`, `spec.pooling`, then `spec.modules`."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        self._how = str(spec.pooling)
        ways = self._how.split("+")
        self._tokens = load_modules(spec.token_modules, spec.hidden_size, device) if spec.token_modules else None
        width = width_behind(spec.token_modules, spec.hidden_size) * len(ways)
        self._vectors = load_modules(spec.modules, width, device) if spec.modules else None
        self._include_prompt = spec.include_prompt
        self._dimensions = spec.dimensions

    def __call__(self, states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Pool hidden states of all tokens (num_tokens, hidden_dim) into float32 (num_sequences, dim)."""
        if self._tokens is not None:
            states = self._tokens(states.float())
        part = Part(layout, self._include_prompt)
        pooled = [_pooled(one, states, part) for one in self._how.split("+")]
        return self._project(pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1))

    def alone(self, network: Any, layout: TokenLayout) -> torch.Tensor:
        """Like `__call__`, for batches that need only the pooled vector; the network may skip states nobody reads."""
        if self._tokens is None and self._include_prompt:
            if self._how == "cls":
                return self._project(network.first(layout))
            if self._how == "mean":
                return self._project(network.mean(layout))
        return self(network(layout), layout)

    def _project(self, pooled: torch.Tensor) -> torch.Tensor:
        """(num_sequences, hidden_dim) -> float32 (num_sequences, dim)."""
        pooled = pooled.float()
        return (pooled if self._vectors is None else self._vectors(pooled))[:, : self._dimensions]


def _pooled(how: str, states: torch.Tensor, part: Part) -> torch.Tensor:
    """One way of pooling `states` (num_tokens, dim): (num_sequences, dim)."""
    if how == "cls":
        return part.first(states)
    if how == "last_token":
        return part.last(states)
    if how == "mean":
        return part.mean(states)
    if how == "max":
        return part.largest(states)
    if how == "mean_sqrt_len":
        return part.mean(states) * part.counts.sqrt()
    return part.weighted_mean(states)
