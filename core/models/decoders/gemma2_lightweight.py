"""Gemma-2 with token compression, the network of bge-reranker-v2.5-gemma2-lightweight: scores token ids.

Our own implementation: the published checkpoint contains its code, and that code fails on current transformers.

    x = embedding * sqrt(hidden_size)
    each block:  x += norm(attention(norm(x)));  x += norm(mlp(norm(x))),  norms multiply by 1 + weight
    score of layer L = cap(head . final_norm(x after L blocks)) at the last token,  cap(z) = tanh(z / c) * c

Before a block that compresses, the passage's states are averaged in groups; query and prompt stay, and positions are
renumbered. Every second block looks back over a window only. The attention soft-cap that `config.json` states is
not applied: FlagEmbedding's default attention never applied it, and published scores are without it.

Knows nothing of texts or of batches of jobs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedq.core.models.decoders.blocks import (
    Attention,
    Backbone,
    GatedMlp,
    RmsNorm,
    Rotation,
    ScoreHead,
    Shape,
    build,
    last_states,
    right_padded,
    rotary_angles,
)

#: Without this setting the checkpoint is a language model without scoring heads.
_REQUIRED = {"layer_wise": True}

#: Other values would change the formulas above.
_ASSUMED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


class Gemma2Block(nn.Module):
    """One layer, with norms before and after both of its parts."""

    def __init__(self, shape: Shape, attention_scale: float, window: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = _norm(shape)
        self.self_attn = Attention(shape, attention_scale, dtype, unrounded_product)
        self.post_attention_layernorm = _norm(shape)
        self.pre_feedforward_layernorm = _norm(shape)
        self.mlp = GatedMlp(shape, partial(functional.gelu, approximate="tanh"), dtype)
        self.post_feedforward_layernorm = _norm(shape)
        #: Number of positions a token attends to, itself included; None: all.
        self.window = window

    def forward(self, states: Tensor, rotation: Rotation) -> Tensor:
        """(num_sequences, longest, hidden) -> the same"""
        mask = _window_mask(states.shape[1], self.window, states.device)
        attended = self.self_attn(self.input_layernorm(states), rotation, mask)
        states = states + self.post_attention_layernorm(attended)
        mixed: Tensor = states + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(states)))
        return mixed


class LightweightGemma2(nn.Module):
    """The network; `load` fills it."""

    def __init__(self, config: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        scale = float(config["query_pre_attn_scalar"]) ** -0.5
        window = config["sliding_window"]
        blocks: list[nn.Module] = [
            Gemma2Block(shape, scale, window if depth % 2 == 0 else None, dtype) for depth in range(shape.num_layers)
        ]
        self.model = Backbone(shape, blocks, _norm(shape), dtype)
        #: Layers with a head, which calls can request.
        self.layers = tuple(range(int(config["start_layer"]), shape.num_layers + 1, int(config["layer_sep"])))
        self.lm_head = nn.ModuleList(ScoreHead(shape.hidden_size) for _ in self.layers)
        # Rounded to the dtype of the states, as in training.
        self.scale_emb = torch.tensor(shape.hidden_size**0.5, dtype=dtype, device="cpu").item()
        #: Upper bound of scores in absolute value; None: no cap.
        self.score_cap: float | None = config["final_logit_softcapping"]
        self.shape = shape

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        layers: tuple[int, ...],
        *,
        query_lengths: Tensor,
        prompt_lengths: Tensor,
        compress_layers: tuple[int, ...] = (),
        compress_ratio: int = 1,
        heads: Literal["in_order", "own"] = "in_order",
    ) -> Tensor:
        """Score padded ids (num_sequences, longest); returns (num_layers_asked, num_sequences) float32.

        `layers` ascend and are among `self.layers`; blocks after the last of them are not run. `mask` is 1 at
        real tokens, padding is on either side; None when nothing is padded. `query_lengths` and `prompt_lengths`
        (num_sequences,) count the tokens at a sequence's start and end that are never compressed; what lies
        between them is averaged in groups of `compress_ratio` before each block of `compress_layers`, counted
        from 0. Gemma2Block 0 is never compressed, and a layer's score is that of the state before its compression.

        `heads` "in_order" applies the j-th head to the j-th requested layer, whatever layer it was trained for, as
        FlagEmbedding does: published scores and thresholds rest on that. "own" applies each layer's own head.
        """
        assert layers == tuple(layer for layer in self.layers if layer in layers), layers
        ids, lengths = right_padded(ids, mask)
        states = self.model.embed_tokens(ids).float() * self.scale_emb  # (num_sequences, longest, hidden)
        cos, sin = rotary_angles(ids.shape[1], self.shape, ids.device)
        scores: list[Tensor] = []
        for depth in range(layers[-1] + 1):
            if depth in layers:
                rank = len(scores) if heads == "in_order" else self.layers.index(depth)
                scores.append(self._score(last_states(states, lengths), rank))  # (num_sequences,)
            if depth == layers[-1]:
                break
            if depth in compress_layers and depth > 0 and compress_ratio > 1:
                states, lengths = compress(states, lengths, query_lengths, prompt_lengths, compress_ratio)
            longest = states.shape[1]
            states = self.model.layers[depth](states, (cos[:longest], sin[:longest]))
        return torch.stack(scores)

    def _score(self, states: Tensor, rank: int) -> Tensor:
        """(num_sequences, hidden) -> (num_sequences,)"""
        score: Tensor = self.lm_head[rank](self.model.norm(states))
        return score if self.score_cap is None else torch.tanh(score / self.score_cap) * self.score_cap


def compress(
    states: Tensor, lengths: Tensor, query_lengths: Tensor, prompt_lengths: Tensor, ratio: int
) -> tuple[Tensor, Tensor]:
    """Average each passage's states (num_sequences, longest, hidden) in groups of `ratio`; returns (states, lengths).

    A sequence is query, passage, prompt, padding; the last group of a passage is the mean of what is left.
    """
    query_ends = query_lengths[:, None]  # (num_sequences, 1), as are all below
    passages = (lengths - query_lengths - prompt_lengths)[:, None]
    groups = (passages + ratio - 1) // ratio
    shortened = lengths - (passages - groups)[:, 0]
    # The only place where the host waits for the device: the host must know the tensor's width.
    longest, max_groups = torch.stack((shortened.max(), groups.max())).tolist()
    means = _group_means(states, query_ends, passages, max_groups, ratio)  # (num_sequences, max_groups, hidden)

    # Where each new state comes from in [states | means].
    new = torch.arange(longest, device=states.device)
    source = torch.where(new < query_ends, new, states.shape[1] + new - query_ends)
    source = torch.where(new < query_ends + groups, source, new + passages - groups)
    source = source.clamp(max=states.shape[1] + max_groups - 1)  # padding may point anywhere
    rows = torch.arange(len(states), device=states.device)[:, None]
    return torch.cat((states, means), dim=1)[rows, source], shortened  # (num_sequences, longest, hidden)


def _group_means(states: Tensor, starts: Tensor, passages: Tensor, max_groups: int, ratio: int) -> Tensor:
    """Means of consecutive groups of the passages' states, (num_sequences, max_groups, hidden).

    The sum is float32: eight bfloat16 states added in bfloat16 lose their last digits.
    """
    num_sequences, width, hidden = states.shape
    offsets = torch.arange(max_groups * ratio, device=states.device)
    is_passage = offsets < passages  # (num_sequences, max_groups * ratio)
    rows = torch.arange(num_sequences, device=states.device)[:, None]
    members = states[rows, (starts + offsets).clamp(max=width - 1)].masked_fill(~is_passage[..., None], 0)
    sums = members.view(num_sequences, max_groups, ratio, hidden).sum(dim=2, dtype=torch.float32)
    counts = is_passage.view(num_sequences, max_groups, ratio).sum(dim=2).clamp(min=1)
    return (sums / counts[..., None]).to(states.dtype)


def unrounded_product(states: Tensor, weight: Tensor) -> Tensor:
    """Multiply float32 states (num_sequences, longest, in) with a weight (out, in) without rounding the states.

    For queries and keys, which are then rounded once, after rotation. So the worst golden call's scores in bfloat16
    have cosine 0.9993; 0.9976 if states and products are rounded, 0.998 if either is.
    """
    if weight.is_cpu or weight.dtype == torch.float32:
        return functional.linear(states, weight.float())
    return product_in_parts(states, weight)


def product_in_parts(states: Tensor, weight: Tensor) -> Tensor:
    """Like `unrounded_product` with about 16 bits of precision, from three products in the weight's dtype.

    For accelerators, which multiply float32 ten and more times slower than bfloat16; a CPU two to three times.
    """
    high = states.to(weight.dtype)
    low = (states - high).to(weight.dtype)
    rounded = functional.linear(high, weight)
    # The rounding error of `rounded`: addmm subtracts it from the float32 sum before rounding the difference.
    lost = torch.addmm(rounded.flatten(0, 1), high.flatten(0, 1), weight.T, beta=-1).view_as(rounded)
    return rounded.float() + (lost.float() + functional.linear(low, weight).float())


def load(path: Path, device: str, precision: str) -> LightweightGemma2:
    """Load the network from the directory `path` onto `device`; norms and heads stay float32.

    `precision` is torch's name of a dtype. CannotLoadModel names a setting that is not supported, or a weight that is
    missing.
    """
    return build(LightweightGemma2, path, device, precision, _REQUIRED, _ASSUMED)


def _window_mask(longest: int, window: int | None, device: torch.device) -> Tensor | None:
    """(longest, longest) bool, True where a query may look; None if the window covers all positions."""
    if window is None or longest <= window:
        return None
    positions = torch.arange(longest, device=device)
    distance = positions[:, None] - positions  # (longest, longest), how far back the key lies
    return (distance >= 0) & (distance < window)


def _norm(shape: Shape) -> RmsNorm:
    return RmsNorm(shape.hidden_size, shape.norm_eps, offset=1.0)
