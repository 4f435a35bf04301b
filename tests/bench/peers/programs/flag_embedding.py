"""FlagEmbedding's own classes: FlagModel, BGEM3FlagModel, FlagReranker."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from answering import pairs_of, serve, size_of


class Flag:
    """Embedders in float32 and bfloat16; its reranker has no bfloat16, and float32 only on a CPU."""

    def load(
        self, model: str, task: str, precision: str, max_length: int, pooling: str, is_m3: bool, **_: Any
    ) -> dict[str, Any]:
        from FlagEmbedding import BGEM3FlagModel, FlagModel, FlagReranker

        self._max_length = max_length
        if task == "rerank":
            if precision != "float32":
                raise ValueError(f"FlagReranker computes in float32 on a CPU, not in {precision}")
            self._model: Any = FlagReranker(model, use_fp16=False, devices="cpu")
        else:
            words = {"use_fp16": False, "use_bf16": precision == "bfloat16", "devices": "cpu"}
            self._model = BGEM3FlagModel(model, **words) if is_m3 else FlagModel(model, pooling_method=pooling, **words)
        return {
            "version": version("FlagEmbedding"),
            "precision": precision,
            "threads": torch.get_num_threads(),
        }

    def embed(self, texts: list[str], batch_size: int | None, **_: Any) -> np.ndarray:
        found = self._model.encode(texts, max_length=self._max_length, **size_of(batch_size))
        return np.asarray(found["dense_vecs"] if isinstance(found, dict) else found)

    def rerank(self, calls: list[tuple[str, list[str]]], batch_size: int | None, **_: Any) -> np.ndarray:
        words = {"max_length": self._max_length, "normalize": False, **size_of(batch_size)}
        return np.asarray(self._model.compute_score(pairs_of(calls), **words))


if __name__ == "__main__":
    serve(Flag())
