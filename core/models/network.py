"""The network of an encoder: a batch's tokens in one line -> their last hidden states. Shared by the families.

Two ways of running the same weights. `Padded` is transformers' own module, for every type and device. What is
faster where it can be, without padding, is `core.models.packed`: taken for the types and devices listed here, and
only if on a few sequences it gives what the padded way gives.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from core.models import linear
from core.models.layout import Layout
from core.models.packed import PackedEncoder
from core.models.weights import pad
from core.sequence import Sequence, Tokens
from core.spec import ModelSpec

log = logging.getLogger(__name__)

#: Types with BERT's layers, under BERT's names.
PACKED_TYPES = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})

#: Lengths of the sequences that both ways are compared on: alone and alike, short and long.
_PROBE_LENGTHS = (1, 5, 5, 17, 40, 48)

#: The least cosine between both ways' states of a token. Half precisions reach 0.999; a wrong kernel nothing near it.
_MIN_COSINE = 0.98


class Padded(nn.Module):
    """transformers' module; what it computes for padding is dropped."""

    def __init__(self, module: nn.Module, pad_token_id: int) -> None:
        super().__init__()
        self._module = module
        self._pad_token_id = pad_token_id

    def forward(self, layout: Layout) -> torch.Tensor:
        """Last hidden states of all tokens: (num_tokens, dim)."""
        ids, mask = pad(layout.batch, self._pad_token_id, layout.device)
        hidden: torch.Tensor = self._module(input_ids=ids, attention_mask=mask).last_hidden_state
        return layout.without_padding(hidden)


def build(module: Any, spec: ModelSpec, device: str, precision: str) -> nn.Module:
    """The faster way to run `module`, an encoder without a head."""
    return packed(module, spec, device, precision) or Padded(module, spec.pad_token_id)


@torch.inference_mode()
def packed(module: Any, spec: ModelSpec, device: str, precision: str) -> PackedEncoder | None:
    """`module` without padding, its layers' weights taken; None, and `module` as it was, where that cannot be."""
    if not _may_be_packed(module.config, device, precision):
        return None
    layout = Layout(_probe(spec), device)
    try:
        network = PackedEncoder(module, device)
        found, expected = network(layout).float(), Padded(module, spec.pad_token_id)(layout).float()
        cosine = float(functional.cosine_similarity(found, expected).min())
    except Exception as error:  # a library without a kernel for this device says so in many ways; there is another way
        reason = f"{type(error).__name__}: {error!s:.200}"
    else:
        if cosine >= _MIN_COSINE:
            network.take_weights(module)
            return network
        reason = f"a token's states have a cosine of {cosine:.3f} to those of transformers"
    log.warning("batches are padded, which is slower: %s", reason, extra={"action": "padded", "model": spec.alias})
    return None


def _may_be_packed(config: Any, device: str, precision: str) -> bool:
    if config.model_type not in PACKED_TYPES or config.hidden_act != "gelu" or getattr(config, "is_decoder", False):
        return False
    if device == "cpu":  # in float32 the weights stay in their mapped file
        return precision == "bfloat16" and linear.is_available()
    return device.startswith("cuda") and precision in ("bfloat16", "float16")


def _probe(spec: ModelSpec) -> list[Sequence]:
    """Sequences of `_PROBE_LENGTHS`, of any tokens but the padding's."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, int(spec.config["vocab_size"]), min(length, spec.max_length)) for length in _PROBE_LENGTHS]
    other = int(spec.pad_token_id == 0)
    return [Sequence(Tokens(np.where(one == spec.pad_token_id, other, one).astype(np.int32))) for one in ids]
