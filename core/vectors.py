"""Turns pooled rows into the vectors a job asked for (cut, normalised, quantised), and into scores of pairs.

Pure NumPy on whole arrays; runs on the completion thread, never on the device thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from embedq.core.results import Dtype, Sparse

#: Norm below which a vector counts as zero; keeps the zero vector zero. As torch's `normalize`.
_EPSILON = 1e-12


def finish(
    rows: np.ndarray, dimensions: int | None, normalize: bool, dtype: Dtype
) -> tuple[np.ndarray, np.ndarray | None]:
    """Turn pooled float32 `rows` (num_texts, dim) into (vectors, int8 ranges or None).

    Keeps the first `dimensions` components before normalising, as Matryoshka models require.
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
    """Spread each dimension's range over the 256 values, as sentence-transformers does without calibration.

    The ranges are those of the job itself, so they are returned with the vectors: without them int8 vectors of two
    jobs cannot be compared.
    """
    if len(rows) == 0:
        return rows.astype(np.int8), np.zeros((2, rows.shape[1]), np.float32)
    ranges = np.stack([rows.min(axis=0), rows.max(axis=0)]).astype(np.float32)
    steps = (ranges[1] - ranges[0]) / 255
    steps[steps == 0] = 1  # a single text, or a constant dimension: every value is the range's start
    # Floor to 0..255 before the shift: rounding towards zero after it would make one value stand for twice as wide a
    # range as the others.
    buckets = np.clip(np.floor((rows - ranges[0]) / steps), 0, 255)
    return (buckets - 128).astype(np.int8), ranges


def score(
    queries: Mapping[str, Sequence[Any]],
    passages: Mapping[str, Sequence[Any]],
    mode: str,
    weights: tuple[float, float, float] | None = None,
    similarity: str = "cosine",
) -> np.ndarray:
    """(num_pairs,) float32 scores of pair after pair, from the rows that `mode` needs, as BGE-M3 defines them.

    Dense rows are compared by `similarity`: their "cosine", "dot" product, or less their "euclidean" or "manhattan"
    distance. "weighted" is (w0 dense + w1 sparse + w2 colbert) / (w0 + w1 + w2), by default the mean of the three.
    """
    if mode == "weighted":
        parts = [score(queries, passages, part, similarity=similarity) for part in ("dense", "sparse", "colbert")]
        return np.average(parts, axis=0, weights=weights).astype(np.float32)
    one = _SIMILARITIES[similarity] if mode == "dense" else _SCORES[mode]
    pairs = zip(queries[mode], passages[mode], strict=True)
    return np.array([one(query, passage) for query, passage in pairs], np.float32)


def max_sim(query: np.ndarray, passage: np.ndarray, is_padded: bool = False) -> float:
    """ColBERT's score of (num_query_tokens, dim) against (num_passage_tokens, dim), rows of length 1.

    The mean over the query's tokens of the best match among the passage's. `is_padded` lets a row of
    zeros take part in the maximum, as FlagEmbedding's does for a passage that was padded.
    """
    if not len(query) or not len(passage):
        return 0.0
    best = (query @ passage.T).max(axis=1)
    return float((np.maximum(best, 0) if is_padded else best).mean())


def match_weights(query: Sparse, passage: Sparse) -> float:
    """Sum of products of the weights of the tokens that both texts have."""
    _, in_query, in_passage = np.intersect1d(query.ids, passage.ids, assume_unique=True, return_indices=True)
    return float(query.weights[in_query] @ passage.weights[in_passage])


def _cosine(query: np.ndarray, passage: np.ndarray) -> float:
    scaled = normalized(np.stack([query, passage]))
    return float(scaled[0] @ scaled[1])


_SCORES: dict[str, Callable[[Any, Any], float]] = {"sparse": match_weights, "colbert": max_sim}

_SIMILARITIES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "cosine": _cosine,
    "dot": lambda query, passage: float(query @ passage),
    "euclidean": lambda query, passage: -float(np.linalg.norm(query - passage)),
    "manhattan": lambda query, passage: -float(np.abs(query - passage).sum()),
}
