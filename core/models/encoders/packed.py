"""An encoder of BERT's kind over tokens in one line: no padding, few operations, weights as the device likes them.

Takes apart what transformers loaded: its embeddings are used as they are, each layer's weights move into products
that do more at once. Which types these are, and that the numbers are the same, is for `core.models.encoders.network` to see.
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
        num_heads = int(config.num_attention_heads)
        #: RoBERTa counts positions from behind the padding's id, and only tokens that are not padding.
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
        """Those of each sequence's first token: (num_sequences, dim). The last layer computes no others."""
        return self._run(layout, kept=self._filled(layout.starts, len(layout.starts)))[: len(layout.starts)]

    def mean(self, layout: TokenLayout) -> torch.Tensor:
        """The mean of each sequence's states, in float32: (num_sequences, dim)."""
        return self._run(layout, offsets=layout.offsets)

    def _run(
        self, layout: TokenLayout, kept: np.ndarray | None = None, offsets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `_Forward.forward`."""
        positions = layout.places if self._padding_id is None else _positions(layout, self._padding_id)
        num_rows = layout.num_tokens + int(self._is_cpu and needs_spare_row(layout))
        filled = [self._filled(each, num_rows) for each in (layout.ids, layout.types, positions)]
        ids, types, places, *rest = layout.on_device(*filled, *([] if kept is None else [kept]))
        plan = grouped_layout(layout, len(ids)) if self._is_cpu else varlen_layout(layout)
        return self._pass(ids, types, places, plan, rest[0] if rest else None, offsets)

    def _filled(self, values: np.ndarray, count: int) -> np.ndarray:
        """`values`, at least `count`, the last of them repeated: what is added changes no largest and no smallest state."""
        return np.pad(values, (0, -(-count // self._rows_step) * self._rows_step - len(values)), "edge")

    def script(self) -> None:
        """From now on a CPU's pass is one call that holds no interpreter lock; where torch cannot do that, as before.

        A pass of MiniLM is 250 operations, and Python's other threads made it wait before many of them.
        """
        try:
            # torch would rather have a compiler on every machine; this torch is pinned, and the other way is there.
            with without_warnings(DeprecationWarning):
                self._pass = torch.jit.script(self._pass)
        except Exception as error:  # TorchScript has no class of its own for what it cannot read
            told = f"{type(error).__name__}: {str(error).strip():.200}"
            log.warning("passes hold the interpreter lock, which is slower: %s", told, extra={"action": "unscripted"})

    def take_weights(self, module: Any) -> None:
        """Let `module` forget its layers, which would take the memory a second time. It cannot run any more."""
        module.encoder.layer = nn.ModuleList()


class _Forward(nn.Module):
    """All of a pass that is torch's. TorchScript reads it, and what a CPU's is made of."""

    def __init__(
        self,
        embeddings: _Embeddings,
        layers: nn.ModuleList,
        attention: ByLength | Varlen,
        dtype: torch.dtype,
        between: torch.dtype,
    ) -> None:
        """`dtype` is that of embeddings and of what comes out, `between` that of the rows between layers."""
        super().__init__()
        self._embeddings, self._layers, self._attention = embeddings, layers, attention
        self._dtype, self._between = dtype, between

    def forward(
        self,
        ids: torch.Tensor,
        types: torch.Tensor,
        places: torch.Tensor,
        plan: GroupedLayout,  # on CUDA `VarlenLayout`, but TorchScript must be told of one
        kept: Optional[torch.Tensor],  # noqa: UP045  (TorchScript)
        offsets: Optional[torch.Tensor],  # noqa: UP045
    ) -> torch.Tensor:
        """(num_rows,) each -> states (num_rows, dim), those of rows `kept` alone, or means of sequences with `offsets`."""
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
    """The sum of what a token, its segment and its place bring, normalised. transformers' weights, shared."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.words, self.types = embeddings.word_embeddings, embeddings.token_type_embeddings
        self.positions, self.norm = embeddings.position_embeddings, embeddings.LayerNorm

    def forward(self, ids: torch.Tensor, types: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.norm(self.words(ids) + self.types(types) + self.positions(places))
        return rows


class _Layer(nn.Module):
    """Two products with GELU between, behind attention; each is added to what came in, and normalised."""

    def __init__(self, layer: Any, scale: float, product: Product, is_cpu: bool) -> None:
        super().__init__()
        attention, self_attention = layer.attention, layer.attention.self
        parts = (self_attention.query, self_attention.key, self_attention.value)
        #: Queries, keys and values: (num_rows, dim) -> (num_rows, 3 * dim).
        self.states = product(*(_joined([getattr(part, name) for part in parts], scale) for name in ("weight", "bias")))
        self._attended = product(attention.output.dense.weight, attention.output.dense.bias)
        self._wide = product(layer.intermediate.dense.weight, layer.intermediate.dense.bias)
        self._narrow = product(layer.output.dense.weight, layer.output.dense.bias)
        # A CPU is quicker at norms whose own weights are float32, and CUDA has none such for rows in half precision.
        norms = (copy.deepcopy(norm) for norm in (attention.output.LayerNorm, layer.output.LayerNorm))
        self._first, self._second = (norm.float() if is_cpu else norm for norm in norms)

    def forward(self, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """(num_rows, dim) each -> (num_rows, dim)."""
        rows = self._first(self._attended.plus(attended, rows))
        normed: torch.Tensor = self._second(self._narrow.plus(self._wide.gelu(rows), rows))
        return normed


def _joined(parts: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Query's, key's and value's weights as one, the query's times `scale`, in float32."""
    query, key, value = parts
    return torch.cat([(query.float() * scale).to(query.dtype), key, value])


def _positions(layout: TokenLayout, padding_id: int) -> np.ndarray:
    """(num_tokens,) as RoBERTa counts: from behind the padding's id, and padding written in a text not at all."""
    is_counted = layout.ids != padding_id
    counted = np.cumsum(is_counted)
    before = np.repeat(counted[layout.starts] - is_counted[layout.starts], layout.lengths)
    return np.where(is_counted, counted - before, 0) + padding_id
