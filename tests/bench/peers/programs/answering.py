"""What every program of a peer does alike: one request per line comes in, one answer per line goes out.

A peer's own environment runs it; nothing here may be imported from this project. Requests and answers are JSON:

    {"action": "load", "model": ..., "task": "embed" | "rerank", ...}      -> {"about": {...}}
    {"action": "embed", "texts": [...], "save": file | null, ...}          -> {"seconds": ...}
    {"action": "rerank", "calls": [[query, [passages]], ...], "save": ...} -> {"seconds": ...}

Seconds are those of the peer's own call, from texts to a numpy array. `save` names a .npy file: vectors
(num_texts, dim), or raw scores (num_passages,) of all calls in a row. A failure is answered with {"error": ...}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol

import numpy as np


class Peer(Protocol):
    """One peer. `options` are the request's other entries."""

    def load(self, model: str, task: str, **options: Any) -> dict[str, Any]:
        """Make it ready; tells what it computes with."""

    def embed(self, texts: list[str], **options: Any) -> np.ndarray:
        """(num_texts, dim) in the order of the texts."""

    def rerank(self, calls: list[tuple[str, list[str]]], **options: Any) -> np.ndarray:
        """(num_passages,) raw scores of all calls, in their order."""


def pairs_of(calls: list[tuple[str, list[str]]]) -> list[list[str]]:
    """Every query with each of its passages."""
    return [[query, passage] for query, passages in calls for passage in passages]


def size_of(batch_size: int | None) -> dict[str, int]:
    """The word of a peer's call for a batch size; none where it is to take its own."""
    return {} if batch_size is None else {"batch_size": batch_size}


def serve(peer: Peer) -> None:
    """Answer until standard input ends."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(peer, request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    action, save = request.pop("action"), request.pop("save", None)
    if action == "load":
        return {"about": peer.load(**request)}
    started_s = time.perf_counter()
    rows = np.asarray(getattr(peer, action)(**request))
    seconds = time.perf_counter() - started_s
    if save:
        np.save(save, rows.astype(np.float32, copy=False))
    return {"seconds": seconds}
