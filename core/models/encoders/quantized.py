"""Builds an encoder with products in int8, with quantization steps chosen at load from a sample of texts.

Weights become 8-bit integers with a scale per output channel. Inputs of a product become bytes by steps that are fixed
at load: from the smallest to the largest value that a sample of texts (`core.models.encoders.calibration_texts`)
produces there. So a vector does not depend on the other texts of its batch, and a product with GELU returns bytes
directly. Attention, norms and embeddings stay in half precision; the states between layers are float32.

A few channels of an encoder, always the same ones, are ten and more times as large as the others. They are divided by a
factor and their weights multiplied by it; otherwise the other channels would have only a few steps. The units of a GELU
cannot be divided like that; the largest are split into several, each of which covers the range behind the one before
it. In MiniLM one unit in 1,536 reaches 24 where the others stay below 6: splitting it reduced the loss of cosine from
0.004 to 0.001.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from embedq.core.models.encoders import linear
from embedq.core.models.encoders.packed import PackedEncoder
from embedq.core.models.token_layout import TokenLayout

#: Exponent of a channel's size in its factor: how much its weights absorb. 0.4 and 0.8 were worse (mean cosine of
#: MiniLM's vectors).
_SHARE = 0.6

#: Units to add to a GELU: one per so many units it has, rounded up to a multiple at which kernels are fast.
_UNITS_PER_ADDED, _UNITS_STEP = 96, 16

#: Factor by which the search lowers the end of a unit's range at each try.
_LOWERED = 0.95

#: Products of a layer, in the order in which they are made; see `core.models.encoders.packed._Layer`.
_PER_LAYER = 4

#: The product before the GELU, and the one after it, which reads bytes of one scale: a GELU cannot be divided by
#: channel.
_WIDE, _NARROW = 2, 3

#: The most steps a byte has room for.
_MAX_BYTE = 255

#: Least size of a channel or range; smaller ones are 0 in the whole sample.
_LEAST = 1e-6


class Watched(linear.Plain):
    """A product that records the smallest and largest input of each channel."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__(weight, bias)
        self.lowest = torch.zeros(weight.shape[1])
        self.highest = torch.zeros(weight.shape[1])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        lowest, highest = torch.aminmax(rows.float(), dim=0)
        torch.minimum(self.lowest, lowest, out=self.lowest)
        torch.maximum(self.highest, highest, out=self.highest)
        return super().forward(rows)

    def steps(self, spread: Spread | None = None) -> linear.Steps:
        """Steps for the recorded inputs: with a factor per channel, or for a GELU's units by `spread`."""
        factors = self._factors() if spread is None else torch.ones(len(spread.units))
        highest = float((self.highest / factors).max()) if spread is None else spread.end
        lowest = float((self.lowest / factors).min()) if spread is None else float(self.lowest.min())
        scale = max(highest - lowest, _LEAST) / _MAX_BYTE
        return linear.Steps(scale, round(-lowest / scale), factors)

    def _factors(self) -> torch.Tensor:
        sizes = torch.maximum(-self.lowest, self.highest).clamp_(min=_LEAST)
        weights = self._weight.float().abs().amax(0).clamp_(min=_LEAST)
        factors = sizes**_SHARE / weights ** (1 - _SHARE)
        return factors / factors.log().mean().exp()


def watched(module: Any, sample: TokenLayout) -> list[Watched]:
    """Run `module` over `sample`; returns the recording products in the order in which an encoder builds them."""
    found: list[Watched] = []

    def product(weight: torch.Tensor, bias: torch.Tensor) -> Watched:
        found.append(Watched(weight, bias))
        return found[-1]

    network = PackedEncoder(module, "cpu", product)
    network(sample)
    return found


@dataclass(frozen=True)
class Spread:
    """A GELU's units, the largest split into several: gelu(x) as gelu(x) + gelu(x - end) + ..., each clamped at `end`.

    The error is at most 0.17, near multiples of `end`; without splitting, one step of the bytes would be nearly as
    wide.
    """

    #: (num_units,) the original unit of each, and what to subtract before its GELU.
    units: torch.Tensor
    shifts: torch.Tensor
    end: float


def spread(highest: torch.Tensor) -> Spread:
    """Split units that reach `highest` (num_units,), with the lowest `end` for which the added units suffice."""
    num_added = -(-len(highest) // (_UNITS_PER_ADDED * _UNITS_STEP)) * _UNITS_STEP
    end = float(highest.max())
    while end > _LEAST and int(_parts(highest, end * _LOWERED).sum()) <= len(highest) + num_added:
        end *= _LOWERED
    parts = _parts(highest, end)
    # The largest unit gets the remaining ones: other texts may exceed the sample's range.
    parts[highest.argmax()] += len(highest) + num_added - int(parts.sum())
    units = torch.repeat_interleave(torch.arange(len(highest)), parts)
    return Spread(units, end * (torch.arange(len(units)) - (parts.cumsum(0) - parts)[units]), end)


def _parts(highest: torch.Tensor, end: float) -> torch.Tensor:
    return torch.ceil(highest / max(end, _LEAST) - _LEAST).clamp_(min=1).long()


def quantize(module: Any, sample: TokenLayout) -> PackedEncoder:
    """Build the encoder `module` with products in int8, choosing their steps from a pass over `sample`."""
    return PackedEncoder(module, "cpu", _products(watched(module, sample), module.dtype), is_wide=True)


def _products(seen: list[Watched], dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], linear.Quantized]:
    """Return a function that builds int8 products in the order of the recorded ones."""
    indices = count()
    spreads = {index: spread(one.highest) for index, one in enumerate(seen) if index % _PER_LAYER == _NARROW}

    def product(weight: torch.Tensor, bias: torch.Tensor) -> linear.Quantized:
        index = next(indices)
        if index % _PER_LAYER == _WIDE:
            after = spreads[index + 1]
            weight, bias = weight[after.units], bias.float()[after.units] - after.shifts
            return linear.Quantized(weight, bias, seen[index].steps(), dtype, seen[index + 1].steps(after))
        if index % _PER_LAYER == _NARROW:
            before = spreads[index]
            return linear.Quantized(weight[:, before.units], bias, seen[index].steps(before), dtype, None)
        return linear.Quantized(weight, bias, seen[index].steps(), dtype, None)

    return product
