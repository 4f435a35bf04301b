"""Copies inputs to a device and rows back to the host; on CUDA without blocking the host.

On CUDA both directions use pinned memory and run beside queued work, so that the host prepares the next batch
meanwhile. On other devices a copy blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from embedq.core.models import Launched


def to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Copy a host tensor to `device`; work queued there afterwards sees the copy."""
    if device.startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Start copying a result to the host; the returned function waits for it and returns it."""
    if tensor.device.type != "cuda":
        array = tensor.cpu().numpy()
        return lambda: array
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    # A blocking event: the host sleeps until it, instead of keeping a core and the interpreter busy.
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return copy.numpy()

    return wait


def launched_as(output: str, tensor: torch.Tensor) -> Launched:
    """Build the result of `launch` for a model with one output; `tensor` has one row per sequence."""
    rows = to_host(tensor)
    return lambda: {output: rows()}
