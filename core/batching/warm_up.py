"""Runs each model on a full batch at start, and lowers its token budget to what the device's free memory allows.

On devices that do not report their memory, CPUs among them, the budget only falls if the warm-up batch itself does not
fit. Knows nothing of the loop that uses the budgets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from embedq.core.batching.device_memory import (
    USABLE_PART,
    DeviceMemory,
    fitting_budget,
    free_cache,
    is_out_of_memory,
    measurable,
)
from embedq.core.batching.device_memory import reduced_budget as reduced
from embedq.core.errors import DeviceOutOfMemory
from embedq.core.models import Model
from embedq.core.sequence import Sequence, Tokens, Wanted

log = logging.getLogger(__name__)

#: Tokens of a warm-up sequence, if the model allows as many: a common length of texts, and cheap.
_LENGTH = 512


def warm_up(models: Mapping[str, Model], budgets: Mapping[str, int], max_sequences: int) -> dict[str, int]:
    """Run every model on a batch as large as its budget in tokens, so that the first job need not wait for first use.

    `models` and `budgets` are by alias. Returns the budgets, lowered to what free memory allows. DeviceOutOfMemory if
    a single sequence does not fit.
    """
    fitting: dict[str, int] = {}
    needs: list[tuple[DeviceMemory, str, float]] = []
    for alias, model in models.items():
        batch, fitting[alias] = _fitting_batch(model, budgets[alias], max_sequences)
        memory = measurable(model.device)
        if memory is not None:
            needs.append((memory, alias, _bytes_per_token(model, memory, batch)))
    # Measured after all passes: memory that libraries keep after first use is no longer free.
    for memory, alias, bytes_per_token in needs:
        free_bytes = memory.free_bytes()
        fitting[alias] = fitting_budget(fitting[alias], free_bytes, bytes_per_token)
        log.info(
            "device memory measured: a batch may take %.0f %% of what is free",
            100 * USABLE_PART,
            extra={
                "action": "memory_measured",
                "model": alias,
                "free_mib": free_bytes >> 20,
                "bytes_per_token": round(bytes_per_token),
                "max_batch_tokens": fitting[alias],
            },
        )
    return fitting


def _fitting_batch(model: Model, max_tokens: int, max_sequences: int) -> tuple[list[Sequence], int]:
    """Run `model` on a full batch, halving it until it fits; returns (that batch, the budget)."""
    length = min(model.spec.max_length, _LENGTH)
    count = max(1, min(max_tokens // length, max_sequences))
    # Any token except padding, which some models do not count as a position.
    tokens = Tokens(np.full(length, int(model.spec.pad_token_id == 0), np.int32))
    batch = [Sequence(tokens) for _ in range(count)]
    while not _fits(model, batch):
        free_cache(model.device)
        if len(batch) == 1:
            raise DeviceOutOfMemory(
                f"model {model.spec.alias} leaves no room for a sequence of {length} tokens on {model.device}; "
                f"serve fewer models on it, or use a device with more memory"
            )
        max_tokens = reduced(max_tokens, length * len(batch))
        batch = batch[: len(batch) // 2]
    return batch, max_tokens


def _fits(model: Model, batch: list[Sequence]) -> bool:
    """Run one pass; False if it ran out of memory. Its tensors are released on return."""
    try:
        model.launch(batch, Wanted(model.outputs))()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _bytes_per_token(model: Model, memory: DeviceMemory, batch: list[Sequence]) -> float:
    """Peak bytes per token of a second pass: the first also allocates what libraries need only once."""
    memory.start()
    model.launch(batch, Wanted(model.outputs))()
    return memory.taken_bytes() / (len(batch) * batch[0].length)
