"""What a model computes for given texts, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def of_sequences(config: dict[str, Any], lengths: Iterable[int], is_scored: bool = False) -> float:
    """FLOPs of encoding sequences of these lengths, a multiplication and an addition counted as two; no padding.

    With width h, inner width f and L layers, a sequence of n tokens takes

        L * (n * 2 * (4 * h * h + 2 * h * f) + 4 * n * n * h)

    the first for queries, keys, values, output (h x h each) and the two products of the MLP, the second for
    scores and their sum over the values (2 * n * n * h each, all heads together). `is_scored` adds what a
    classifier computes for each sequence: h x h and h. Left out, as everywhere: embeddings, normalisation,
    activation, softmax, pooling.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    each_token = 2 * (4 * width * width + 2 * width * inner)
    head = 2 * (width * width + width) if is_scored else 0
    layers = config["num_hidden_layers"]
    return float(sum(layers * (n * each_token + 4 * n * n * width) + head for n in map(int, lengths)))
