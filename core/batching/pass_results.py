"""Validates a pass's output and converts its exceptions into errors that are safe to send to producers."""

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
            raise DeviceFailure(f"model {alias} returned no {name} rows; this is a bug")
        if len(rows[name]) != num_sequences:
            raise DeviceFailure(
                f"model {alias} returned {len(rows[name])} {name} rows for {num_sequences} sequences; this is a bug"
            )
        # Dense rows and scores are one array; ColBERT's are an array each, sparse ones a pair of arrays each.
        given = rows[name]
        parts = [given] if isinstance(given, np.ndarray) else [part for row in given for part in _arrays(row)]
        if not all(np.isfinite(part).all() for part in parts):
            raise DeviceFailure(f"model {alias} returned NaN or infinite {name} values in {model.precision}")


def as_failure(model: Model, piece: list[Sequence], error: Exception) -> EmbedqError:
    """Convert `error` into an embedq error without the frames of the pass.

    Keeps no reference to `error`: its traceback holds the pass's tensors while the device needs the memory for the
    next pass.
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
