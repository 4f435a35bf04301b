"""Rows of queries and passages -> scores, as BGE-M3 defines them for embedding models. Pure NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from core import vectors
from core.results import Sparse


def score(
    queries: Mapping[str, Sequence[Any]],
    passages: Mapping[str, Sequence[Any]],
    mode: str,
    weights: tuple[float, float, float] | None = None,
) -> np.ndarray:
    """(num_pairs,) float32 scores of pair after pair, from the rows that `mode` needs.

    "weighted" is (w0 dense + w1 sparse + w2 colbert) / (w0 + w1 + w2), by default the mean of the three.
    """
    if mode == "weighted":
        parts = [score(queries, passages, part) for part in ("dense", "sparse", "colbert")]
        return np.average(parts, axis=0, weights=weights).astype(np.float32)
    one = _SCORES[mode]
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


def _dense(query: np.ndarray, passage: np.ndarray) -> float:
    scaled = vectors.normalized(np.stack([query, passage]))
    return float(scaled[0] @ scaled[1])


_SCORES: dict[str, Callable[[Any, Any], float]] = {"dense": _dense, "sparse": match_weights, "colbert": max_sim}
