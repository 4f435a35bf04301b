"""What the machine multiplies at most: the best of several products of square matrices on all cores, in GFLOP/s.

Answers as the peers do, to {"action": "measure"}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

#: Sizes of the products, 2 and 7 GFLOP: large enough for all cores, small enough to be measured before every turn.
_SIZES = (1_024, 1_536)

#: The best of so many counts: what else runs on the machine only takes away.
_NUM_TIMES = 4


def measure() -> dict[str, float]:
    """GFLOP/s by precision (for int8 operations in place of FLOPs); what torch has no product for is left out."""
    found = {}
    for name in ("bfloat16", "float32", "int8"):
        try:
            found[name] = max(_gflops(name, size) for size in _SIZES)
        except (RuntimeError, NotImplementedError):
            continue
    return found


def _gflops(name: str, size: int) -> float:
    """The better of the ways that there are."""
    return 2 * size**3 / min(_seconds(multiply) for multiply in _products(name, size)) / 1e9


def _seconds(multiply: Callable[[], object]) -> float:
    multiply()
    seconds = []
    for _ in range(_NUM_TIMES):
        started_s = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


def _products(name: str, size: int) -> list[Callable[[], object]]:
    if name == "int8":
        whole = torch.randint(-128, 127, (size, size), dtype=torch.int8)
        return [lambda: torch._int_mm(whole, whole)]
    left, right = (torch.randn(size, size).to(getattr(torch, name)) for _ in range(2))
    plain: list[Callable[[], object]] = [lambda: torch.mm(left, right)]
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return plain
    # As a model's weights can be: laid out once for products with `size` rows.
    packed = torch.ops.mkldnn._reorder_linear_weight(right, size)
    return [*plain, lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")]


if __name__ == "__main__":
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)
