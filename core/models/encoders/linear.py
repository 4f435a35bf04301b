"""Products of a batch's rows with a layer's weights, fused with the operation that follows.

On a CPU in bfloat16 the weights are laid out once as oneDNN's kernels read them; torch's own operation does that at
every call, and builds a kernel for each new number of rows. The operations for it, and for products in int8, are those
of torch's compiler. They are not public, and only this file names them. `is_available` and `is_int8_available` check
that they exist, and `core.models.encoders.network` compares their results with transformers'.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

#: Number of rows to choose the layout of weights for: that of a usual batch. Other numbers work, too.
_ROWS = 1_024

#: Largest 8-bit weight; -128 is not used, so that the range is symmetric.
_MAX_WEIGHT = 127


class Linear(nn.Module):
    """A linear layer: rows (num_rows, in_features) -> (num_rows, out_features), bias included.

    TorchScript compiles the classes for CPUs (`core.models.encoders.packed`), so they use only the Python it supports.
    """

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The product."""
        raise NotImplementedError

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product, and `other` added to it."""
        raise NotImplementedError

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        """GELU, by the error function, of the product."""
        raise NotImplementedError


class Plain(Linear):
    """torch's own product, for devices whose libraries lay weights out themselves."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self._weight, self._bias = weight.detach(), bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self._weight, self._bias)

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.forward(rows) + other

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self(rows))


class LaidOut(Linear):
    """A CPU's product in bfloat16, weights laid out for its kernels."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self._bias = bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return product

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        given = (rows, other, self._weight, self._bias, "add")
        # TorchScript cannot name overloads; Python would try them in turn, which takes a millisecond.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(*given)
            return product
        added: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(*given)
        return added

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "gelu", [], "none")
        return product


class Steps(nn.Module):
    """Quantizes a product's input rows to bytes: value / (scale * factors) + zero, clamped.

    `factors` are (in_features,), 1 where channels cannot have their own.
    """

    def __init__(self, scale: float, zero: int, factors: torch.Tensor) -> None:
        super().__init__()
        self.scale, self.zero, self.factors = scale, zero, factors
        self._per_value = 1 / (scale * factors)
        # Conversion truncates; adding a half makes it round.
        self._offset = torch.tensor(zero + 0.5)

    def write(self, rows: torch.Tensor) -> torch.Tensor:
        """(num_rows, in_features) float32 or half -> the same in uint8, rounded to the nearest step."""
        steps = torch.addcmul(self._offset, rows.float(), self._per_value)
        # By way of int16: converting floats to bytes directly is four times slower. No value is near 32,768 steps. NaN
        # becomes some byte; the residual added to the product keeps it.
        return steps.to(torch.int16).clamp_(0, 255).to(torch.uint8)


class Quantized(Linear):
    """A CPU's product in int8, of rows quantized to bytes and weights with a scale per output channel.

    Takes rows of any dtype, or bytes already quantized by `steps`; `plus` adds float32 to float32. `gelu` returns bytes
    for the next product, quantized by `following`.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, steps: Steps, dtype: torch.dtype, following: Steps | None
    ) -> None:
        super().__init__()
        self._steps, self._following, self._dtype = steps, following, dtype
        weight = weight.float() * steps.factors
        self._scales = (weight.abs().amax(1) / _MAX_WEIGHT).clamp_(min=torch.finfo(torch.float32).tiny)
        rounded = (weight / self._scales.unsqueeze(1)).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, [_ROWS, weight.shape[1]])
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._bias = bias.float()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._product(rows, 1.0, 0, self._dtype, "none", "")

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        read = (self._bytes(rows), self._steps.scale, self._steps.zero, self._weight, self._scales, self._zeros)
        given = (*read, other, self._bias, 1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none")
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(*given, [], "")
            return product
        added: torch.Tensor = torch.ops.onednn.qlinear_pointwise.binary(*given, [], "")
        return added

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        assert self._following is not None
        return self._product(rows, self._following.scale, self._following.zero, torch.uint8, "gelu", "none")

    def _product(
        self, rows: torch.Tensor, scale: float, zero: int, dtype: torch.dtype, then: str, how: str
    ) -> torch.Tensor:
        read = (self._bytes(rows), self._steps.scale, self._steps.zero, self._weight, self._scales, self._zeros)
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(*read, self._bias, scale, zero, dtype, then, [], how)
        return product

    def _bytes(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if rows.dtype == torch.uint8 else self._steps.write(rows)


def is_int8_available() -> bool:
    """Returns True if this torch has the operations of `Quantized`; `core.devices` decides whether the CPU is fast at them."""
    names = ("qlinear_prepack", "qlinear_pointwise")
    return torch.backends.mkldnn.is_available() and all(  # type: ignore[no-untyped-call]
        hasattr(torch.ops.onednn, name) for name in names
    )


def is_available() -> bool:
    """Returns True if this torch and this CPU have the operations of `LaidOut`."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(ops, name) for name in names)
        and bool(ops._is_mkldnn_bf16_supported())
    )
