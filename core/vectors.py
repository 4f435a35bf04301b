"""Rows as a model pools them -> the vectors a job asked for: cut, normalise, quantise.

Pure NumPy on whole arrays; runs in the thread of the job, never on the device thread.
"""

from __future__ import annotations

import numpy as np

from core.results import Dtype

#: Norm below which a vector counts as zero; keeps the zero vector zero. As torch's `normalize`.
_EPSILON = 1e-12


def finish(
    rows: np.ndarray, dimensions: int | None, normalize: bool, dtype: Dtype
) -> tuple[np.ndarray, np.ndarray | None]:
    """Turn pooled float32 `rows` (num_texts, dim) into (vectors, int8 ranges or None).

    Matryoshka models want the first `dimensions` components cut off before normalising.
    """
    rows = rows[:, :dimensions]
    if normalize:
        rows = normalized(rows)
    if dtype == "int8":
        return _to_int8(rows)
    if dtype == "ubinary":
        return np.packbits(rows > 0, axis=1), None
    return np.ascontiguousarray(rows, dtype=dtype), None


def normalized(rows: np.ndarray) -> np.ndarray:
    """Scale each row of (num_rows, dim) to length 1, in float32."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: np.ndarray = rows / np.maximum(norms, _EPSILON)
    return scaled


def _to_int8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread each dimension's range over the 256 values, as sentence-transformers does uncalibrated.

    The ranges are those of the job itself, so they are returned with the vectors: without them
    int8 vectors of two jobs cannot be compared.
    """
    if len(rows) == 0:
        return rows.astype(np.int8), np.zeros((2, rows.shape[1]), np.float32)
    ranges = np.stack([rows.min(axis=0), rows.max(axis=0)]).astype(np.float32)
    steps = (ranges[1] - ranges[0]) / 255
    steps[steps == 0] = 1  # a single text, or a constant dimension: every value is the range's start
    # Floored from 0 to 255 before the shift: rounding towards zero after it would make one value
    # stand for twice as wide a range as the others.
    buckets = np.clip(np.floor((rows - ranges[0]) / steps), 0, 255)
    return (buckets - 128).astype(np.int8), ranges
