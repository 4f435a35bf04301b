"""Chooses how to run an encoder's network: padded by transformers, or packed by us. Shared by the families.

Both compute the last hidden states of a batch's tokens from the same weights. `Padded` is transformers' own module, for
every type and device. `core.models.encoders.packed` pads nothing and is faster; it is used for the types and devices
listed here, if its results on a few sequences equal the padded ones. int8, which is never chosen by default, exists
packed only: a model without it, or with different results, is refused.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from embedq.core.checkpoint.spec import RERANKERS, ModelSpec
from embedq.core.errors import CannotLoadModel, InvalidSettings
from embedq.core.models.encoders import calibration_texts, linear
from embedq.core.models.encoders.packed import PackedEncoder
from embedq.core.models.encoders.padding_probe import random_sequences
from embedq.core.models.encoders.quantized import quantize
from embedq.core.models.token_layout import TokenLayout, padded_inputs
from embedq.core.sequence import Sequence
from embedq.core.tokenizer import Tokenizer

log = logging.getLogger(__name__)

#: Model types with BERT's layers under BERT's names.
PACKED_TYPES = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})

#: Lengths of the sequences that both networks are compared on: single and equal ones, short and long.
_PROBE_LENGTHS = (1, 5, 5, 17, 40, 48)

#: Least cosine between both networks' states of a token. Half precisions reach 0.999; a wrong kernel is far below.
_MIN_COSINE = 0.98

#: The same for int8, as a mean over all tokens of texts that were not measured; see docs/measurements.md, "int8".
_MIN_INT8_COSINE = 0.97


class Padded(nn.Module):
    """transformers' module on padded batches; drops its states of padding."""

    def __init__(self, module: nn.Module, pad_token_id: int, has_types: bool = False) -> None:
        """`has_types` is for pairs, if the module distinguishes query and passage by segment."""
        super().__init__()
        self._module = module
        self._pad_token_id = pad_token_id
        self._has_types = has_types

    def forward(self, layout: TokenLayout) -> torch.Tensor:
        """Last hidden states of all tokens: (num_tokens, dim)."""
        hidden: torch.Tensor = self._module(
            **padded_inputs(layout, self._pad_token_id, self._has_types)
        ).last_hidden_state
        return layout.without_padding(hidden)

    def first(self, layout: TokenLayout) -> torch.Tensor:
        """Last hidden state of each sequence's first token: (num_sequences, dim)."""
        return layout.first(self(layout))

    def mean(self, layout: TokenLayout) -> torch.Tensor:
        """The mean of each sequence's states, in float32: (num_sequences, dim)."""
        return layout.mean(self(layout))


def has_types(module: Any) -> bool:
    """Returns True if the network distinguishes query and passage by segment, as BERT; XLM-R and RoBERTa have one."""
    return int(getattr(module.config, "type_vocab_size", 0) or 0) > 1


def build(module: Any, spec: ModelSpec, device: str, precision: str) -> PackedEncoder | Padded:
    """Return the fastest network that runs `module`, an encoder without a head."""
    return packed(module, spec, device, precision) or Padded(module, spec.pad_token_id)


@torch.inference_mode()
def packed(module: Any, spec: ModelSpec, device: str, precision: str) -> PackedEncoder | None:
    """Return a packed network with the layers of `module`; None, with `module` unchanged, if it cannot be packed."""
    if precision == "int8":
        return _in_int8(module, spec, device)
    if not _may_be_packed(module.config, device, precision):
        return None
    layout = TokenLayout(random_sequences(spec, _PROBE_LENGTHS), device)
    try:
        network = PackedEncoder(module, device)
        if device == "cpu":
            network.script()
        cosine = float(_cosines(network, Padded(module, spec.pad_token_id), layout).min())
    except Exception as error:  # a library without a kernel for this device raises many classes; `Padded` still works
        reason = f"{type(error).__name__}: {error!s:.200}"
    else:
        if cosine >= _MIN_COSINE:
            network.take_weights(module)
            return network
        reason = f"a token's states have a cosine of {cosine:.3f} to those of transformers"
    log.warning("batches are padded, which is slower: %s", reason, extra={"action": "padded", "model": spec.alias})
    return None


def _in_int8(module: Any, spec: ModelSpec, device: str) -> PackedEncoder:
    """Return `module` with products in int8. InvalidSettings or CannotLoadModel if it lacks them or loses too much."""
    if not _has_layers(module.config):
        raise InvalidSettings(
            f"precision int8 is for BERT's layers with GELU ({', '.join(sorted(PACKED_TYPES))}); {spec.path} is of type "
            f"{module.config.model_type} with {getattr(module.config, 'hidden_act', 'another activation')}; use auto"
        )
    if not linear.is_int8_available():
        raise InvalidSettings(f"precision int8: torch {torch.__version__} lacks the operations for it; use auto")
    if not all(bool(torch.isfinite(weight).all()) for weight in module.parameters()):
        raise CannotLoadModel(f"{spec.path} has weights that are NaN or infinite, which int8 would hide")
    tokenizer = Tokenizer(spec)
    network = quantize(module, _sampled(calibration_texts.MEASURED, tokenizer, spec, device))
    network.script()
    exact = PackedEncoder(module, device, linear.Plain)
    probe = TokenLayout(random_sequences(spec, _PROBE_LENGTHS), device)
    same = float(_cosines(exact, Padded(module, spec.pad_token_id), probe).min())
    if not same >= _MIN_COSINE:
        raise CannotLoadModel(f"{spec.path} without padding has a cosine of {same:.3f} to transformers; use float32")
    cosine = float(_cosines(network, exact, _sampled(calibration_texts.CHECKED, tokenizer, spec, device)).mean())
    if not cosine >= _MIN_INT8_COSINE:  # not "below": it may be NaN
        raise CannotLoadModel(
            f"{spec.path} loses too much in int8: its tokens' states have a mean cosine of {cosine:.3f} to those in "
            f"{str(module.dtype).removeprefix('torch.')}, below the limit of {_MIN_INT8_COSINE}; use auto"
        )
    log.info(
        "the model's products run in int8", extra={"action": "int8", "model": spec.alias, "cosine": round(cosine, 4)}
    )
    network.take_weights(module)
    return network


def _cosines(one: nn.Module, other: nn.Module, layout: TokenLayout) -> torch.Tensor:
    """(num_tokens,) cosine between both networks' states of each token."""
    return functional.cosine_similarity(one(layout).float(), other(layout).float())


def _sampled(texts: list[str], tokenizer: Tokenizer, spec: ModelSpec, device: str) -> TokenLayout:
    """A batch of `texts`; for a reranker, of each text paired with the next."""
    is_pairs = spec.family in RERANKERS
    tokens = tokenizer.encode_pairs(list(pairwise(texts))) if is_pairs else tokenizer.encode(texts)
    return TokenLayout([Sequence(one) for one in tokens], device)


def _has_layers(config: Any) -> bool:
    """Returns True if the model has BERT's layers, under BERT's names and with GELU."""
    return (
        config.model_type in PACKED_TYPES and config.hidden_act == "gelu" and not getattr(config, "is_decoder", False)
    )


def _may_be_packed(config: Any, device: str, precision: str) -> bool:
    if not _has_layers(config):
        return False
    if device == "cpu":  # in float32 the weights stay in their mapped file
        return precision == "bfloat16" and linear.is_available()
    return device.startswith("cuda") and precision in ("bfloat16", "float16")
