"""An encoder of BERT's kind over tokens in one line: no padding, few operations, weights as the device likes them.

Takes apart what transformers loaded: its embeddings are used as they are, each layer's weights move into products
that do more at once. Which types these are, and that the numbers are the same, is for `core.models.network` to see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from core.models import linear
from core.models.attention import ByLength, Varlen
from core.models.layout import Layout

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
        self._embeddings = module.embeddings
        self._num_heads = int(config.num_attention_heads)
        #: RoBERTa counts positions from behind the padding's id, and only tokens that are not padding.
        self._padding_id = getattr(module.embeddings, "padding_idx", None)
        self._is_cpu = device == "cpu"
        #: Rows are filled up to a multiple of this.
        self.rows_step = _ROWS_STEP if self._is_cpu else 1
        self._dtype = torch.float32 if is_wide else module.dtype
        product = product or (linear.LaidOut if self._is_cpu else linear.Plain)
        # Scores are queries times keys over the root of a head's width. CUDA's kernel sees to that.
        scale = (int(config.hidden_size) // self._num_heads) ** -0.5 if self._is_cpu else 1.0
        self._layers = [_Layer(layer, scale, product, self._dtype) for layer in module.encoder.layer]

    def forward(self, layout: Layout) -> torch.Tensor:
        """Last hidden states of all tokens: (num_tokens, dim)."""
        num_rows = -(-layout.num_tokens // self.rows_step) * self.rows_step
        embedded = self._embed(layout, num_rows)
        attention: Callable[[torch.Tensor], torch.Tensor] = (
            ByLength(layout, num_rows, self._num_heads, embedded.dtype)
            if self._is_cpu
            else Varlen(layout, self._num_heads)
        )
        rows = embedded.to(self._dtype)
        for layer in self._layers:
            rows = layer(rows, attention)
        return rows[: layout.num_tokens].to(embedded.dtype)

    def take_weights(self, module: Any) -> None:
        """Let `module` forget its layers, which would take the memory a second time. It cannot run any more."""
        module.encoder.layer = nn.ModuleList()

    def _embed(self, layout: Layout, num_rows: int) -> torch.Tensor:
        positions = layout.places if self._padding_id is None else _positions(layout, self._padding_id)
        filled = [np.pad(each, (0, num_rows - len(each))) for each in (layout.ids, layout.types, positions)]
        ids, types, positions_there = (each.unsqueeze(0) for each in layout.on_device(*filled))
        embedded: torch.Tensor = self._embeddings(input_ids=ids, token_type_ids=types, position_ids=positions_there)
        return embedded.squeeze(0)


class _Norm:
    """A LayerNorm in the dtype of the rows."""

    def __init__(self, norm: Any, dtype: torch.dtype) -> None:
        self._shape, self._eps = norm.normalized_shape, norm.eps
        self._weight, self._bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(rows, self._shape, self._weight, self._bias, self._eps)


class _Layer:
    """Attention, then two products with GELU between; each is added to what came in, and normalised."""

    def __init__(self, layer: Any, scale: float, product: Product, dtype: torch.dtype) -> None:
        attention, self_attention = layer.attention, layer.attention.self
        parts = (self_attention.query, self_attention.key, self_attention.value)
        self._states = product(
            *(_joined([getattr(part, name) for part in parts], scale) for name in ("weight", "bias"))
        )
        self._attended = product(attention.output.dense.weight, attention.output.dense.bias)
        self._wide = product(layer.intermediate.dense.weight, layer.intermediate.dense.bias)
        self._narrow = product(layer.output.dense.weight, layer.output.dense.bias)
        self._norms = [_Norm(norm, dtype) for norm in (attention.output.LayerNorm, layer.output.LayerNorm)]

    def __call__(self, rows: torch.Tensor, attention: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """(num_rows, dim) -> (num_rows, dim)."""
        first, second = self._norms
        rows = first(self._attended.plus(attention(self._states(rows)), rows))
        normed: torch.Tensor = second(self._narrow.plus(self._wide.gelu(rows), rows))
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
