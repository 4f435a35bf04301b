"""What a forward pass gave or raised -> rows that can be right, or an error its jobs can be told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from embedq.core.batching.device_memory import is_out_of_memory
from embedq.core.errors import DeviceFailure, DeviceOutOfMemory, EmbedqError
from embedq.core.models import Model, Outputs
from embedq.core.sequence import Sequence, num_computed_tokens


def check_rows(model: Model, rows: Outputs, outputs: frozenset[str], num_sequences: int) -> None:
    """DeviceFailure unless each of `outputs` has one row per sequence, all of finite numbers."""
    alias = model.spec.alias
    for name in outputs:
        if name not in rows:
            raise DeviceFailure(f"model {alias} gave no {name} rows; this is a bug")
        if len(rows[name]) != num_sequences:
            raise DeviceFailure(
                f"model {alias} gave {len(rows[name])} {name} rows for {num_sequences} sequences; this is a bug"
            )
        # Rows of one length are one array; ColBERT's are arrays of their own, sparse ones pairs of arrays.
        given = rows[name]
        parts = [given] if isinstance(given, np.ndarray) else [part for row in given for part in _arrays(row)]
        if not all(np.isfinite(part).all() for part in parts):
            raise DeviceFailure(f"model {alias} gave NaN or infinite {name} values in {model.precision}")


def as_failure(model: Model, piece: list[Sequence], error: Exception) -> EmbedqError:
    """`error` as one of ours, without the frames of the pass.

    Of the error itself nothing may be kept: through its traceback it would hold the pass's tensors
    while the device needs the room for the next pass.
    """
    if isinstance(error, EmbedqError):
        return error.with_traceback(None)
    if is_out_of_memory(error):
        return DeviceOutOfMemory(
            f"{num_computed_tokens(piece, model.is_padded)} tokens of one text or pair do not fit the memory of {model.device} beside model "
            f"{model.spec.alias}; lower max_length, or use a device with more memory"
        )
    return DeviceFailure(
        f"the forward pass of model {model.spec.alias} failed on a single sequence: {type(error).__name__}: {error}"
    )


def _arrays(row: Any) -> Iterable[np.ndarray]:
    return row if isinstance(row, tuple) else (row,)
