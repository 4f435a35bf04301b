"""Sparse embedding with a masked language model (SPLADE): a weight for each word of the vocabulary that a text is about.

The logits of each token are cut at 0, their logarithm taken, and of each word the largest or the sum over the text's
tokens kept; as sentence-transformers' SpladePooling (https://arxiv.org/abs/2109.10086).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import around_products, choose_precision
from embedq.core.models import Launched
from embedq.core.models.requested_outputs import of_embedder
from embedq.core.models.token_layout import TokenLayout, pad
from embedq.core.models.transfer import to_host
from embedq.core.models.weights import load
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.results import Sparse
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision
from embedq.core.text_inputs import TextInputs
from embedq.core.tokenizer import Tokenizer


class Splade:
    """A masked language model, and how its logits become weights."""

    outputs = frozenset({"sparse"})
    is_padded = True

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        self._module: Any = load("AutoModelForMaskedLM", spec, device, around_products(device, self.precision))
        self._inputs = TextInputs(spec, Tokenizer(spec))
        pooling = spec.modules[0].config if spec.modules else {}
        self._is_sum = pooling.get("pooling_strategy") == "sum"
        self._is_twice = pooling.get("activation_function") == "log1p_relu"
        self._num_words: int | None = pooling.get("max_active_dims")

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        return of_embedder(self.spec, self.outputs, options, {"dense": "it gives weights of words"})

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """See `core.models.Embedder.encode_texts`."""
        return self._inputs.encode(texts, options)

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        ids, mask = pad(batch, self.spec.pad_token_id, self.device)
        layout = TokenLayout(batch, self.device)
        logits = self._module(input_ids=ids, attention_mask=mask).logits  # (num_sequences, longest, num_words)
        weights = to_host(self._pooled(layout.without_padding(logits), layout))

        def finish() -> dict[str, list[Sparse]]:
            return {"sparse": [_words(row, self._num_words) for row in weights()]}

        return finish

    def _pooled(self, logits: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """(num_tokens, num_words) -> (num_sequences, num_words) float32."""
        rows = []
        for one in torch.split(logits, layout.lengths.tolist()):  # a sequence at a time: a copy of all would be large
            weights = torch.log1p(torch.relu(one.float()))
            weights = torch.log1p(weights) if self._is_twice else weights
            rows.append(weights.sum(dim=0) if self._is_sum else weights.amax(dim=0))
        return torch.stack(rows)


def _words(weights: np.ndarray, num_words: int | None) -> Sparse:
    """The words of (num_words,) `weights` above 0, or the `num_words` heaviest of them."""
    ids = np.flatnonzero(~(weights <= 0))  # not "above 0": that would drop NaN, and hide a broken model
    if num_words is not None and len(ids) > num_words:
        ids = np.sort(ids[np.argsort(-weights[ids], kind="stable")[:num_words]])
    return Sparse(ids.astype(np.int32), weights[ids])
