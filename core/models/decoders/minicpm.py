"""MiniCPM with one scoring head per layer, the network of bge-reranker-v2-minicpm-layerwise: scores token ids.

Our own implementation: the published checkpoint contains its code, and that code fails on current transformers.

    x = embedding * scale_emb
    each block:  x += r * attention(norm(x));  x += r * mlp(norm(x)),  r = scale_depth / sqrt(num_layers)
    score of layer L = head[L - start_layer] . final_norm(x after L blocks), at the last token

Knows nothing of texts, prompts or batches of jobs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

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

#: The only kind of heads that score; the others compute logits over the vocabulary.
_REQUIRED = {"head_type": "simple", "head_multi": True}

#: Other values would change the formulas above.
_ASSUMED = {"hidden_act": "silu", "attention_bias": False}


class MiniCpmBlock(nn.Module):
    """One layer; scales what it adds to the state down by the depth of the network."""

    def __init__(self, shape: Shape, branch_scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.norm_eps, offset=0.0)
        self.self_attn = Attention(shape, shape.head_dim**-0.5, dtype)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.norm_eps, offset=0.0)
        self.mlp = GatedMlp(shape, functional.silu, dtype)
        self.branch_scale = branch_scale

    def forward(self, states: Tensor, rotation: Rotation) -> Tensor:
        """(num_sequences, longest, hidden) -> the same"""
        states = states + self.branch_scale * self.self_attn(self.input_layernorm(states), rotation)
        mixed: Tensor = states + self.branch_scale * self.mlp(self.post_attention_layernorm(states))
        return mixed


class MiniCpm(nn.Module):
    """The network; `load` fills it."""

    def __init__(self, config: dict[str, Any], shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        branch_scale = float(config["scale_depth"]) / math.sqrt(shape.num_layers)
        blocks: list[nn.Module] = [MiniCpmBlock(shape, branch_scale, dtype) for _ in range(shape.num_layers)]
        self.model = Backbone(shape, blocks, RmsNorm(shape.hidden_size, shape.norm_eps, offset=0.0), dtype)
        #: Layers with a head, which calls can request.
        self.layers = tuple(range(int(config["start_layer"]), shape.num_layers + 1))
        self.lm_head = nn.ModuleList(ScoreHead(shape.hidden_size) for _ in self.layers)
        self.scale_emb = float(config["scale_emb"])
        self.shape = shape

    def forward(
        self, ids: Tensor, mask: Tensor | None, layers: tuple[int, ...], *, head_layers: tuple[int, ...] | None = None
    ) -> Tensor:
        """Score padded ids (num_sequences, longest); returns (num_layers_asked, num_sequences) float32.

        `layers` ascend and are among `self.layers`; blocks after the last of them are not run. `mask` is 1 at
        real tokens, padding is on either side; None when nothing is padded. `head_layers` names for each of
        `layers` the layer whose head reads its state; None: its own. (FlagEmbedding, asked for unsorted layers,
        takes the states in ascending order and the heads in the order of the request.)
        """
        assert layers == tuple(layer for layer in self.layers if layer in layers), layers
        ids, lengths = right_padded(ids, mask)
        states = self.model.embed_tokens(ids).float() * self.scale_emb  # (num_sequences, longest, hidden)
        turns = rotary_angles(ids.shape[1], self.shape, ids.device)
        collected = []
        for depth in range(layers[-1] + 1):
            if depth in layers:
                collected.append(self.model.norm(last_states(states, lengths)))  # (num_sequences, hidden)
            if depth < layers[-1]:
                states = self.model.layers[depth](states, turns)
        heads = [self.lm_head[layer - self.layers[0]] for layer in head_layers or layers]
        return torch.stack([head(state) for head, state in zip(heads, collected, strict=True)])


def load(path: Path, device: str, precision: str) -> MiniCpm:
    """Load the network from the directory `path` onto `device`; norms and heads stay float32.

    `precision` is torch's name of a dtype. CannotLoadModel names a setting that is not supported, or a weight that is
    missing.
    """
    return build(MiniCpm, path, device, precision, _REQUIRED, _ASSUMED)
