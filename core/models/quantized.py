"""An encoder's products in int8: what bytes stand for, chosen once from a sample of texts.

Weights become 8-bit integers with a scale for each output channel. What comes into a product becomes bytes by
steps that are fixed when the model is loaded: from the smallest to the largest value that a sample of texts
(`core.models.sample`) brought there. So a vector does not depend on what shares its batch, and a GELU's result
leaves its product as bytes already. Attention, norms and embeddings stay in half precision; what is added from
layer to layer is float32.

A few channels of an encoder are ten and more times as large as the others, always the same ones. They are
divided, and their weights multiplied, by a factor between: else the others would have but a few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch

from core.models import linear
from core.models.layout import Layout
from core.models.packed import PackedEncoder

#: How much of a channel's size is taken over by its weights: half, by the geometric mean. 0.3 and 0.7 were worse.
_SHARE = 0.5

#: Products of a layer, in the order in which they are made; see `core.models.packed._Layer`.
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

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        lowest, highest = torch.aminmax(rows.float(), dim=0)
        torch.minimum(self.lowest, lowest, out=self.lowest)
        torch.maximum(self.highest, highest, out=self.highest)
        return super().__call__(rows)

    def steps(self, is_divided: bool) -> linear.Steps:
        """The steps for such rows; with `is_divided` channels are divided by factors of their own."""
        factors = self._factors() if is_divided else torch.ones_like(self.highest)
        lowest, highest = float((self.lowest / factors).min()), float((self.highest / factors).max())
        scale = max(highest - lowest, _LEAST) / _MAX_BYTE
        return linear.Steps(scale, round(-lowest / scale), factors)

    def _factors(self) -> torch.Tensor:
        sizes = torch.maximum(-self.lowest, self.highest).clamp_(min=_LEAST)
        weights = self._weight.float().abs().amax(0).clamp_(min=_LEAST)
        factors = sizes**_SHARE / weights ** (1 - _SHARE)
        return factors / factors.log().mean().exp()


def watched(module: Any, sample: Layout) -> list[Watched]:
    """The products of all layers after a pass over `sample`, in the order in which an encoder makes them."""
    found: list[Watched] = []

    def product(weight: torch.Tensor, bias: torch.Tensor) -> Watched:
        found.append(Watched(weight, bias))
        return found[-1]

    network = PackedEncoder(module, "cpu", product)
    network.rows_step = 1  # what a batch is filled up with would be measured, too
    network(sample)
    return found


def quantize(module: Any, sample: Layout) -> PackedEncoder:
    """The encoder `module` with products in int8, their steps chosen from a pass over `sample`."""
    steps = [one.steps(index % _PER_LAYER != _NARROW) for index, one in enumerate(watched(module, sample))]
    return PackedEncoder(module, "cpu", _products(steps, module.dtype), is_wide=True)


def _products(
    steps: list[linear.Steps], dtype: torch.dtype
) -> Callable[[torch.Tensor, torch.Tensor], linear.Quantized]:
    """Makes products for the `steps` in turn."""
    indices = count()

    def product(weight: torch.Tensor, bias: torch.Tensor) -> linear.Quantized:
        index = next(indices)
        following = steps[index + 1] if index % _PER_LAYER == _WIDE else None
        return linear.Quantized(weight, bias, steps[index], dtype, following)

    return product
