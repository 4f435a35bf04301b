"""Building blocks of our own decoders: norm, rotary positions, attention, gated MLP.

Modules have the names that published checkpoints give their weights. Inside a decoder padding is always on the right,
whichever side the caller pads: under causal attention no real token sees later ones, so no padding mask is needed, and
a sequence's results do not depend on its neighbours. Knows no model's formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from embedq.core.checkpoint.files import read_json
from embedq.core.errors import CannotLoadModel
from embedq.core.models.safetensors_files import load_weights

Network = TypeVar("Network", bound=nn.Module)

#: cos and sin, each (longest, head_dim / 2) float32.
Rotation = tuple[Tensor, Tensor]

#: A product of states (num_sequences, longest, in) float32 with a weight (out, in): (num_sequences, longest, out).
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder, from its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    #: Heads of keys and values; each serves num_heads / num_key_heads heads of queries.
    num_key_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float


class RmsNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * (weight + offset), in float32 whatever the input's dtype.

    The states between blocks are float32 too; only the inputs of matrix products are rounded to the decoder's dtype.
    Rounding the sums as well, layer after layer, doubled the error of bfloat16 scores.
    """

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.eps = eps
        self.offset = offset

    def forward(self, states: Tensor) -> Tensor:
        """(..., size) -> (..., size) float32"""
        weight = self.weight + self.offset
        return functional.rms_norm(states.float(), weight.shape, weight, self.eps)


class Attention(nn.Module):
    """Causal attention with rotary positions; groups of query heads share a key-value head."""

    def __init__(self, shape: Shape, scale: float, dtype: torch.dtype, product: Product | None = None) -> None:
        super().__init__()
        #: Computes queries and keys from unrounded states; None: from rounded ones, like values.
        self.product = product
        keys = shape.num_key_heads * shape.head_dim
        self.q_proj = _linear(shape.hidden_size, shape.num_heads * shape.head_dim, dtype)
        self.k_proj = _linear(shape.hidden_size, keys, dtype)
        self.v_proj = _linear(shape.hidden_size, keys, dtype)
        self.o_proj = _linear(shape.num_heads * shape.head_dim, shape.hidden_size, dtype)
        self.shape = shape
        self.scale = scale

    def forward(self, states: Tensor, rotation: Rotation, mask: Tensor | None = None) -> Tensor:
        """Attend over states (num_sequences, longest, hidden); `mask` (longest, longest): where queries look.

        Without a mask every position looks at itself and all before it.
        """
        rounded = states.to(self.q_proj.weight.dtype)
        projected = [
            self.product(states, one.weight) if self.product else one(rounded) for one in (self.q_proj, self.k_proj)
        ]
        # (num_sequences, num_heads or num_key_heads, longest, head_dim)
        queries, keys = (_rotate(self._heads(one), rotation).to(rounded.dtype) for one in projected)
        values = self._heads(self.v_proj(rounded))
        group = self.shape.num_heads // self.shape.num_key_heads
        if mask is not None and group > 1:
            # Kernels with a mask do not support groups; torch would fall back to one that stores all scores,
            # (num_sequences, num_heads, longest, longest).
            keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        attended = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=keys.shape[1] != queries.shape[1],
        )
        joined: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))  # (num_sequences, longest, hidden)
        return joined

    def _heads(self, projected: Tensor) -> Tensor:
        """(num_sequences, longest, heads * head_dim) -> (num_sequences, heads, longest, head_dim)"""
        return projected.view(*projected.shape[:2], -1, self.shape.head_dim).transpose(1, 2)


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x))"""

    def __init__(self, shape: Shape, activation: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = _linear(shape.hidden_size, shape.intermediate_size, dtype)
        self.up_proj = _linear(shape.hidden_size, shape.intermediate_size, dtype)
        self.down_proj = _linear(shape.intermediate_size, shape.hidden_size, dtype)
        self.activation = activation

    def forward(self, states: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)"""
        states = states.to(self.gate_proj.weight.dtype)
        mixed: Tensor = self.down_proj(self.activation(self.gate_proj(states)) * self.up_proj(states))
        return mixed


class Backbone(nn.Module):
    """A decoder without its heads: embedding, blocks and final norm. Checkpoints store it under `model.`."""

    def __init__(self, shape: Shape, layers: list[nn.Module], norm: RmsNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class ScoreHead(nn.Module):
    """Scores a state, in float32 whatever the decoder's dtype: bfloat16 would keep 3 digits of the score."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_head = _linear(hidden_size, 1, torch.float32)

    def forward(self, states: Tensor) -> Tensor:
        """(num_sequences, hidden) float32 -> (num_sequences,) float32"""
        scores: Tensor = self.linear_head(states)  # (num_sequences, 1)
        return scores[:, 0]


def right_padded(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move the padding of ids (num_sequences, longest) to the right; returns (ids, lengths (num_sequences,)).

    Padding may be on either side; without a mask nothing is padded.
    """
    num_sequences, longest = ids.shape
    if mask is None:
        return ids, torch.full((num_sequences,), longest, device=ids.device)
    first = mask.argmax(dim=1, keepdim=True)  # (num_sequences, 1), 0 unless the padding is on the left
    index = (torch.arange(longest, device=ids.device) + first) % longest
    return ids.gather(1, index), mask.sum(dim=1)


def last_states(states: Tensor, lengths: Tensor) -> Tensor:
    """(num_sequences, longest, hidden) -> each sequence's last real state, (num_sequences, hidden) float32."""
    rows = torch.arange(len(lengths), device=states.device)
    return states[rows, lengths - 1].float()


def rotary_angles(longest: int, shape: Shape, device: torch.device) -> Rotation:
    """Cosines and sines of positions 0 to `longest` - 1, in float32: bfloat16 cannot count past 256."""
    exponents = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    positions = torch.arange(longest, device=device, dtype=torch.float32)
    angles = torch.outer(positions, shape.rope_theta**-exponents)  # (longest, head_dim / 2)
    return angles.cos(), angles.sin()


def build(
    network: Callable[[dict[str, Any], Shape, torch.dtype], Network],
    path: Path,
    device: str,
    precision: str,
    required: Mapping[str, Any],
    assumed: Mapping[str, Any],
) -> Network:
    """Build the `network` that `path`/config.json describes and load its weights onto `device`.

    `precision` is torch's name of a dtype. `required` and `assumed` hold the only supported values; a key of `assumed`
    may be absent. CannotLoadModel names a setting that is absent or not supported, or a weight that is missing.
    """
    file = path / "config.json"
    stated = read_json(file)
    if stated is None:
        raise CannotLoadModel(f"{file} does not exist")
    config = {**assumed, **stated}
    for name, value in {**required, **assumed}.items():
        if config.get(name) != value:
            raise CannotLoadModel(f"{file} has {name} = {config.get(name)!r:.80}; supported is {value!r} only")
    try:
        with torch.device("meta"):
            module = network(config, _read_shape(file, config), getattr(torch, precision))
    except KeyError as error:
        raise CannotLoadModel(f"{file} does not state {error}") from None
    load_weights(module, path, device)
    return module


def _read_shape(file: Path, config: Mapping[str, Any]) -> Shape:
    num_heads = int(config["num_attention_heads"])
    return Shape(
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=num_heads,
        num_key_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // num_heads),
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=_read_rope_theta(file, config),
    )


def _read_rope_theta(file: Path, config: Mapping[str, Any]) -> float:
    """The base of the rotary angles; transformers 5 nests it one level deeper."""
    stated = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta") or 10000.0}
    for declared in (stated, config.get("rope_scaling") or {}):
        kind = declared.get("rope_type") or declared.get("type") or "default"
        if kind != "default":
            raise CannotLoadModel(f"{file} asks for rotary positions of type {kind!r:.40}; supported is 'default' only")
    return float(stated["rope_theta"])


def _rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of (..., longest, head_dim) by their position's angles."""
    cos, sin = rotation
    first, second = states.float().chunk(2, dim=-1)  # (..., longest, head_dim / 2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(states.dtype)


def _linear(num_inputs: int, num_outputs: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(num_inputs, num_outputs, bias=False, dtype=dtype)
