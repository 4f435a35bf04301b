"""Between host and device without waiting, where the device can: inputs to it, rows back from it.

On CUDA both ways go through pinned memory, beside the work that is queued: the host prepares the
next batch meanwhile. Elsewhere a copy is a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from embedq.core.models import Launched


def to_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A host tensor on `device`; what is queued there next will find it."""
    if device.startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Begin to copy a result to the host; the function returned waits for it and gives it."""
    if tensor.device.type != "cuda":
        array = tensor.cpu().numpy()
        return lambda: array
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    # Blocking: the host sleeps until the event, instead of keeping a core and the interpreter busy.
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return copy.numpy()

    return wait


def launched_as(output: str, tensor: torch.Tensor) -> Launched:
    """What a model with this one output launched: `tensor` holds a row per sequence."""
    rows = to_host(tensor)
    return lambda: {output: rows()}
