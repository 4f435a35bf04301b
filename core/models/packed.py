"""An encoder of BERT's kind over tokens in one line: no padding, few operations, weights as the device likes them.

Takes apart what transformers loaded: its embeddings are used as they are, each layer's weights move into products
that do more at once. Which types these are, and that the numbers are the same, is for `core.models.network` to see.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from core.models import linear
from core.models.attention import ByLength, Plan, Varlen, plan
from core.models.layout import Layout

log = logging.getLogger(__name__)

#: What makes a product of its weight (out_features, in_features) and its bias.
Product = Callable[[torch.Tensor, torch.Tensor], linear.Linear]

#: Rows of a batch on a CPU are filled up to a multiple of this: kernels are built for each number of rows, at
#: milliseconds each, and torch keeps a thousand of them.
_ROWS_STEP = 16


class PackedEncoder(nn.Module):
    """The layers of a BERT, RoBERTa or XLM-R, made of transformers' module."""

    def __init__(self, module: Any, device: str, product: Product | None = None, is_wide: bool = False) -> None:
        """`product` makes each layer's products, in the order of `_Layer`; None for what suits the device.

        With `is_wide` what is added from layer to layer stays float32, and `product` must take and add that.
        """
        super().__init__()
        config = module.config
        self._num_heads = int(config.num_attention_heads)
        #: RoBERTa counts positions from behind the padding's id, and only tokens that are not padding.
        self._padding_id = getattr(module.embeddings, "padding_idx", None)
        self._is_cpu = device == "cpu"
        #: Rows are filled up to a multiple of this.
        self.rows_step = _ROWS_STEP if self._is_cpu else 1
        self._dtype: torch.dtype = module.dtype
        product = product or (linear.LaidOut if self._is_cpu else linear.Plain)
        # Scores are queries times keys over the root of a head's width. CUDA's kernel sees to that.
        scale = (int(config.hidden_size) // self._num_heads) ** -0.5 if self._is_cpu else 1.0
        self._embeddings = _Embeddings(module.embeddings)
        dtype = torch.float32 if is_wide else module.dtype
        layers = nn.ModuleList(_Layer(layer, scale, product, dtype) for layer in module.encoder.layer)
        self._layers: Callable[..., torch.Tensor]
        if self._is_cpu:
            self._layers = _OnCpu(self._embeddings, layers, self._num_heads, self._dtype, dtype)
        else:
            self._layers = _OnCuda(self._embeddings, layers)

    def forward(self, layout: Layout) -> torch.Tensor:
        """Last hidden states of all tokens: (num_tokens, dim)."""
        num_rows = -(-layout.num_tokens // self.rows_step) * self.rows_step
        positions = layout.places if self._padding_id is None else _positions(layout, self._padding_id)
        filled = [np.pad(each, (0, num_rows - len(each))) for each in (layout.ids, layout.types, positions)]
        rows = layout.on_device(*filled)
        attention = plan(layout, num_rows, self._dtype) if self._is_cpu else Varlen(layout, self._num_heads)
        return self._layers(*rows, attention)[: layout.num_tokens]

    def script(self) -> None:
        """From now on a CPU's pass is one call that holds no interpreter lock; where torch cannot do that, as before.

        A pass of MiniLM is 250 operations, and Python's other threads made it wait before many of them.
        """
        try:
            with warnings.catch_warnings():
                # torch would rather have a compiler on every machine; this torch is pinned, and the other way is there.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._layers = torch.jit.script(self._layers)
        except Exception as error:  # TorchScript has no class of its own for what it cannot read
            told = f"{type(error).__name__}: {str(error).strip():.200}"
            log.warning("passes hold the interpreter lock, which is slower: %s", told, extra={"action": "unscripted"})

    def take_weights(self, module: Any) -> None:
        """Let `module` forget its layers, which would take the memory a second time. It cannot run any more."""
        module.encoder.layer = nn.ModuleList()


class _OnCpu(nn.Module):
    """All of a pass that is torch's. TorchScript reads it, and what it is made of."""

    def __init__(
        self, embeddings: _Embeddings, layers: nn.ModuleList, num_heads: int, dtype: torch.dtype, between: torch.dtype
    ) -> None:
        """`dtype` is that of embeddings and of what comes out, `between` that of the rows between layers."""
        super().__init__()
        self._embeddings, self._layers, self._attention = embeddings, layers, ByLength(num_heads)
        self._dtype, self._between = dtype, between

    def forward(self, ids: torch.Tensor, types: torch.Tensor, positions: torch.Tensor, plan: Plan) -> torch.Tensor:
        """(num_rows,) each -> (num_rows, dim)."""
        rows = self._embeddings(ids, types, positions).to(self._between)
        for layer in self._layers:
            rows = layer(rows, self._attention(layer.states(rows), plan))  # type: ignore[operator]
        states: torch.Tensor = rows.to(self._dtype)
        return states


class _OnCuda(nn.Module):
    """The same with CUDA's attention, whose operations torch queues without waiting for any."""

    def __init__(self, embeddings: _Embeddings, layers: nn.ModuleList) -> None:
        super().__init__()
        self._embeddings, self._layers = embeddings, layers

    def forward(
        self, ids: torch.Tensor, types: torch.Tensor, positions: torch.Tensor, attention: Varlen
    ) -> torch.Tensor:
        """(num_rows,) each -> (num_rows, dim)."""
        rows: torch.Tensor = self._embeddings(ids, types, positions)
        for layer in self._layers:
            rows = layer(rows, attention(layer.states(rows)))  # type: ignore[operator]
        return rows


class _Embeddings(nn.Module):
    """The sum of what a token, its segment and its place bring, normalised. transformers' weights, shared."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.words, self.types = embeddings.word_embeddings, embeddings.token_type_embeddings
        self.positions, self.norm = embeddings.position_embeddings, embeddings.LayerNorm

    def forward(self, ids: torch.Tensor, types: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.norm(self.words(ids) + self.types(types) + self.positions(positions))
        return rows


class _Layer(nn.Module):
    """Two products with GELU between, behind attention; each is added to what came in, and normalised."""

    def __init__(self, layer: Any, scale: float, product: Product, dtype: torch.dtype) -> None:
        super().__init__()
        attention, self_attention = layer.attention, layer.attention.self
        parts = (self_attention.query, self_attention.key, self_attention.value)
        #: Queries, keys and values: (num_rows, dim) -> (num_rows, 3 * dim).
        self.states = product(*(_joined([getattr(part, name) for part in parts], scale) for name in ("weight", "bias")))
        self._attended = product(attention.output.dense.weight, attention.output.dense.bias)
        self._wide = product(layer.intermediate.dense.weight, layer.intermediate.dense.bias)
        self._narrow = product(layer.output.dense.weight, layer.output.dense.bias)
        self._first, self._second = (
            copy.deepcopy(norm).to(dtype) for norm in (attention.output.LayerNorm, layer.output.LayerNorm)
        )

    def forward(self, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """(num_rows, dim) each -> (num_rows, dim)."""
        rows = self._first(self._attended.plus(attended, rows))
        normed: torch.Tensor = self._second(self._narrow.plus(self._wide.gelu(rows), rows))
        return normed


def _joined(parts: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Query's, key's and value's weights as one, the query's times `scale`, in float32."""
    query, key, value = parts
    return torch.cat([(query.float() * scale).to(query.dtype), key, value])


def _positions(layout: Layout, padding_id: int) -> np.ndarray:
    """(num_tokens,) as RoBERTa counts: from behind the padding's id, and padding written in a text not at all."""
    is_counted = layout.ids != padding_id
    counted = np.cumsum(is_counted)
    before = np.repeat(counted[layout.starts] - is_counted[layout.starts], layout.lengths)
    return np.where(is_counted, counted - before, 0) + padding_id
