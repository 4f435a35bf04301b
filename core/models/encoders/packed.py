"""A BERT-like encoder over tokens in one line: no padding, few operations, weights laid out for the device.

Built from transformers' loaded module: uses its embeddings as they are, and moves each layer's weights into fused
products. `core.models.encoders.network` decides which model types qualify and checks the results.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import torch
from torch import nn

from embedq.core.models.encoders import linear
from embedq.core.models.encoders.attention import (
    ByLength,
    GroupedLayout,
    Varlen,
    cpu_scale,
    grouped_layout,
    needs_spare_row,
    varlen_layout,
)
from embedq.core.models.silence import without_warnings
from embedq.core.models.token_layout import TokenLayout, mean_of_each

log = logging.getLogger(__name__)

#: Builds a layer from its weight (out_features, in_features) and its bias.
Product = Callable[[torch.Tensor, torch.Tensor], linear.Linear]

#: On a CPU the rows of a batch are filled up to a multiple of this: each number of rows needs its own kernel, which
#: takes milliseconds to build, and torch keeps a thousand of them.
_ROWS_STEP = 16


class PackedEncoder(nn.Module):
    """Runs the layers of a BERT, RoBERTa or XLM-R, built from transformers' module."""

    def __init__(self, module: Any, device: str, product: Product | None = None, is_wide: bool = False) -> None:
        """`product` builds each layer's products, in the order of `_Layer`; None chooses by device.

        With `is_wide` the states between layers stay float32, and `product` must accept and add those.
        """
        super().__init__()
        config = module.config
        num_heads = int(config.num_attention_heads)
        #: RoBERTa numbers positions from the padding's id + 1, and counts only tokens that are not padding.
        self._padding_id = getattr(module.embeddings, "padding_idx", None)
        self._is_cpu = device == "cpu"
        #: Rows are filled up to a multiple of this.
        self._rows_step = _ROWS_STEP if self._is_cpu else 1
        self._dtype: torch.dtype = module.dtype
        product = product or (linear.LaidOut if self._is_cpu else linear.Plain)
        scale = cpu_scale(int(config.hidden_size) // num_heads) if self._is_cpu else 1.0  # CUDA's kernel scales
        layers = nn.ModuleList(_Layer(layer, scale, product, self._is_cpu) for layer in module.encoder.layer)
        attention = ByLength(num_heads) if self._is_cpu else Varlen(num_heads)
        between = torch.float32 if is_wide else self._dtype
        self._pass: Callable[..., torch.Tensor] = _Forward(
            _Embeddings(module.embeddings), layers, attention, self._dtype, between
        )

    def forward(self, layout: TokenLayout) -> torch.Tensor:
        """Last hidden states of all tokens: (num_tokens, dim)."""
        return self._run(layout)[: layout.num_tokens]

    def first(self, layout: TokenLayout) -> torch.Tensor:
        """Last hidden state of each sequence's first token: (num_sequences, dim). The last layer computes no others."""
        return self._run(layout, kept=self._filled(layout.starts, len(layout.starts)))[: len(layout.starts)]

    def mean(self, layout: TokenLayout) -> torch.Tensor:
        """The mean of each sequence's states, in float32: (num_sequences, dim)."""
        return self._run(layout, offsets=layout.offsets)

    def _run(
        self, layout: TokenLayout, kept: np.ndarray | None = None, offsets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Prepare the inputs on the host and run `_Forward`."""
        positions = layout.places if self._padding_id is None else _positions(layout, self._padding_id)
        num_rows = layout.num_tokens + int(self._is_cpu and needs_spare_row(layout))
        filled = [self._filled(each, num_rows) for each in (layout.ids, layout.types, positions)]
        ids, types, places, *rest = layout.on_device(*filled, *([] if kept is None else [kept]))
        plan = grouped_layout(layout, len(ids)) if self._is_cpu else varlen_layout(layout)
        return self._pass(ids, types, places, plan, rest[0] if rest else None, offsets)

    def _filled(self, values: np.ndarray, count: int) -> np.ndarray:
        """Fill `values` up to at least `count` by repeating the last: repeated rows change no minimum or maximum."""
        return np.pad(values, (0, -(-count // self._rows_step) * self._rows_step - len(values)), "edge")

    def script(self) -> None:
        """Compile the pass into one call that does not hold the interpreter's lock; keeps it as it is if torch cannot.

        A pass of MiniLM has 250 operations, and other Python threads made it wait before many of them.
        """
        try:
            # torch deprecates TorchScript for its compiler, which needs a C++ compiler on every machine. torch is
            # pinned, and without TorchScript the pass still works.
            with without_warnings(DeprecationWarning):
                self._pass = torch.jit.script(self._pass)
        except Exception as error:  # TorchScript has no exception class of its own for unsupported code
            reason = f"{type(error).__name__}: {str(error).strip():.200}"
            log.warning("passes hold the interpreter lock, which is slower: %s", reason, extra={"action": "unscripted"})

    def take_weights(self, module: Any) -> None:
        """Remove the layers from `module`, which would keep a second copy in memory. It cannot run any more."""
        module.encoder.layer = nn.ModuleList()


class _Forward(nn.Module):
    """The part of a pass that runs in torch. TorchScript compiles it, and on a CPU all its parts."""

    def __init__(
        self,
        embeddings: _Embeddings,
        layers: nn.ModuleList,
        attention: ByLength | Varlen,
        dtype: torch.dtype,
        between: torch.dtype,
    ) -> None:
        """`dtype` is that of the embeddings and the result, `between` that of the rows between layers."""
        super().__init__()
        self._embeddings, self._layers, self._attention = embeddings, layers, attention
        self._dtype, self._between = dtype, between

    def forward(
        self,
        ids: torch.Tensor,
        types: torch.Tensor,
        places: torch.Tensor,
        plan: GroupedLayout,  # on CUDA a `VarlenLayout`, but TorchScript needs one type
        kept: Optional[torch.Tensor],  # noqa: UP045  (TorchScript)
        offsets: Optional[torch.Tensor],  # noqa: UP045
    ) -> torch.Tensor:
        """Compute states (num_rows, dim): of all rows, only of rows `kept`, or means of the sequences at `offsets`."""
        rows = self._embeddings(ids, types, places).to(self._between)
        for number, layer in enumerate(self._layers):
            attended = self._attention(layer.states(rows), plan)  # type: ignore[operator]
            if kept is not None and number == len(self._layers) - 1:
                rows, attended = rows.index_select(0, kept), attended.index_select(0, kept)
            rows = layer(rows, attended)
        if offsets is not None:
            return mean_of_each(rows[: plan.num_tokens], offsets.diff())
        states: torch.Tensor = rows.to(self._dtype)
        return states


class _Embeddings(nn.Module):
    """Sums the embeddings of token, segment and position, and normalises. Shares transformers' weights."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.words, self.types = embeddings.word_embeddings, embeddings.token_type_embeddings
        self.positions, self.norm = embeddings.position_embeddings, embeddings.LayerNorm

    def forward(self, ids: torch.Tensor, types: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.norm(self.words(ids) + self.types(types) + self.positions(places))
        return rows


class _Layer(nn.Module):
    """One layer of an encoder, attention itself excluded: its products, residuals and norms."""

    def __init__(self, layer: Any, scale: float, product: Product, is_cpu: bool) -> None:
        super().__init__()
        attention, self_attention = layer.attention, layer.attention.self
        parts = (self_attention.query, self_attention.key, self_attention.value)
        #: Queries, keys and values: (num_rows, dim) -> (num_rows, 3 * dim).
        self.states = product(*(_joined([getattr(part, name) for part in parts], scale) for name in ("weight", "bias")))
        self._attended = product(attention.output.dense.weight, attention.output.dense.bias)
        self._wide = product(layer.intermediate.dense.weight, layer.intermediate.dense.bias)
        self._narrow = product(layer.output.dense.weight, layer.output.dense.bias)
        # A CPU is faster at norms with float32 weights; CUDA does not support those for rows in half precision.
        norms = (copy.deepcopy(norm) for norm in (attention.output.LayerNorm, layer.output.LayerNorm))
        self._first, self._second = (norm.float() if is_cpu else norm for norm in norms)

    def forward(self, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """(num_rows, dim) each -> (num_rows, dim)."""
        rows = self._first(self._attended.plus(attended, rows))
        normed: torch.Tensor = self._second(self._narrow.plus(self._wide.gelu(rows), rows))
        return normed


def _joined(parts: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Concatenate the weights of query, key and value, the query's times `scale`, computed in float32."""
    query, key, value = parts
    return torch.cat([(query.float() * scale).to(query.dtype), key, value])


def _positions(layout: TokenLayout, padding_id: int) -> np.ndarray:
    """(num_tokens,) positions as RoBERTa numbers them: from the padding's id + 1, skipping padding tokens in texts."""
    is_counted = layout.ids != padding_id
    counted = np.cumsum(is_counted)
    before = np.repeat(counted[layout.starts] - is_counted[layout.starts], layout.lengths)
    return np.where(is_counted, counted - before, 0) + padding_id
