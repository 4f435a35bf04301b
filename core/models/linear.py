"""Products of a batch's rows with a layer's weights, and what follows them in the same pass over memory.

On a CPU in bfloat16 the weights are laid out once as oneDNN's kernels read them: torch's own operation
does that anew at every call, and builds a kernel for each number of rows it has not seen. The operations for it
are those that torch's compiler uses; they are not public, and this is the one place that names them.
`is_available` tells whether they are there, and `core.models.network` compares what they compute.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

#: Rows that the layout of weights is chosen for: a batch's usual number. Any other number is computed, too.
_ROWS = 1_024


class Linear(Protocol):
    """Rows (num_rows, in_features) -> (num_rows, out_features), bias included."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor: ...

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product, and `other` added to it."""
        ...

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        """GELU, by the error function, of the product."""
        ...


class Plain:
    """torch's own product, for devices whose libraries lay weights out themselves."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self._weight, self._bias)

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self(rows) + other

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self(rows))


class LaidOut:
    """A CPU's product in bfloat16, weights laid out for its kernels."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self._bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return product

    def plus(self, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, other, self._weight, self._bias, "add")
        return product

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "gelu", [], "none")
        return product


def is_available() -> bool:
    """Whether this torch and this CPU have the operations of `LaidOut`."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(hasattr(ops, name) for name in names)
        and bool(ops._is_mkldnn_bf16_supported())
    )
