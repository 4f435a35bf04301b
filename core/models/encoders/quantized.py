"""An encoder's products in int8: what bytes stand for, chosen once from a sample of texts.

Weights become 8-bit integers with a scale for each output channel. What comes into a product becomes bytes by
steps that are fixed when the model is loaded: from the smallest to the largest value that a sample of texts
(`core.models.encoders.calibration_texts`) brought there. So a vector does not depend on what shares its batch, and a GELU's result
leaves its product as bytes already. Attention, norms and embeddings stay in half precision; what is added from
layer to layer is float32.

A few channels of an encoder are ten and more times as large as the others, always the same ones. They are
divided, and their weights multiplied, by a factor between: else the others would have but a few steps. A GELU's
units cannot be divided so; there the largest are written as several, each of which begins where the one before it
is at its end. In MiniLM one unit in 1,536 reaches 24 where the others stay below 6: this alone took the loss of cosine
from 0.004 to 0.001.
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

#: How much of a channel's size is taken over by its weights. 0.4 and 0.8 were worse (mean cosine of MiniLM's vectors).
_SHARE = 0.6

#: Units added to a GELU, of those it has: one in so many, filled up to a multiple that kernels are quick at.
_UNITS_PER_ADDED, _UNITS_STEP = 96, 16

#: What the end of a unit's range is tried at, each time.
_LOWERED = 0.95

#: Products of a layer, in the order in which they are made; see `core.models.encoders.packed._Layer`.
_PER_LAYER = 4

#: Which of them gives a GELU, and which reads it: as bytes of one scale, since a GELU cannot be divided by channel.
_WIDE, _NARROW = 2, 3

#: The most steps a byte has room for.
_MAX_BYTE = 255

#: Below this a channel or a range counts as this large: it is 0 in all of the sample.
_LEAST = 1e-6


class Watched(linear.Plain):
    """A product that remembers what came in: of each channel the smallest and the largest value."""

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
        """The steps for such rows, channels divided by factors of their own; for a GELU's units, as `spread`, not."""
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
    """The products of all layers after a pass over `sample`, in the order in which an encoder makes them."""
    found: list[Watched] = []

    def product(weight: torch.Tensor, bias: torch.Tensor) -> Watched:
        found.append(Watched(weight, bias))
        return found[-1]

    network = PackedEncoder(module, "cpu", product)
    network(sample)
    return found


@dataclass(frozen=True)
class Spread:
    """A GELU's units, the largest of them written as several: gelu(x) as gelu(x) + gelu(x - end) + ..., each cut at `end`.

    That is off by 0.17 at most, near a multiple of `end`, where a step of bytes up to the largest was nearly as wide.
    """

    #: (num_units,) which unit each is a part of, and what is taken off before its GELU.
    units: torch.Tensor
    shifts: torch.Tensor
    end: float


def spread(highest: torch.Tensor) -> Spread:
    """For units that reach `highest` (num_units,): the lowest end for which the units that are added suffice."""
    num_added = -(-len(highest) // (_UNITS_PER_ADDED * _UNITS_STEP)) * _UNITS_STEP
    end = float(highest.max())
    while end > _LEAST and int(_parts(highest, end * _LOWERED).sum()) <= len(highest) + num_added:
        end *= _LOWERED
    parts = _parts(highest, end)
    # What is left over goes to the largest: another text may take it further than the sample did.
    parts[highest.argmax()] += len(highest) + num_added - int(parts.sum())
    units = torch.repeat_interleave(torch.arange(len(highest)), parts)
    return Spread(units, end * (torch.arange(len(units)) - (parts.cumsum(0) - parts)[units]), end)


def _parts(highest: torch.Tensor, end: float) -> torch.Tensor:
    return torch.ceil(highest / max(end, _LEAST) - _LEAST).clamp_(min=1).long()


def quantize(module: Any, sample: TokenLayout) -> PackedEncoder:
    """The encoder `module` with products in int8, their steps chosen from a pass over `sample`."""
    return PackedEncoder(module, "cpu", _products(watched(module, sample), module.dtype), is_wide=True)


def _products(seen: list[Watched], dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], linear.Quantized]:
    """Makes products in int8 in the order of those `seen`."""
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
