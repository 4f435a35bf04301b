"""Embedding without a network: the mean of a vector per token, as StaticEmbedding and model2vec save them.

A text without tokens gets the vector of zeros. No special tokens are added, and no text is too long.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import CannotLoadModel
from embedq.core.models import Launched
from embedq.core.models.requested_outputs import of_embedder
from embedq.core.models.saved_modules import load_modules
from embedq.core.models.small_weights import read_state
from embedq.core.models.token_layout import TokenLayout
from embedq.core.models.transfer import launched_as
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision
from embedq.core.tokenizer import Tokenizer


class Static:
    """A table of vectors, and the modules behind their mean."""

    outputs = frozenset({"dense"})
    is_padded = False

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = "float32", "a sum of vectors has nothing to gain from less"
        self._tokenizer = Tokenizer(spec)
        table = read_table(spec)
        #: A row of zeros behind all others, for a text without tokens.
        self._empty = len(table)
        self._table = torch.cat([table, torch.zeros(1, table.shape[1])]).to(device)
        self._modules = load_modules(spec.modules, table.shape[1], device)

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        return of_embedder(self.spec, self.outputs, options)

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """See `core.models.Embedder.encode_texts`."""
        limit = self._tokenizer.checked_length(options.max_length, 1)
        rows = self._tokenizer.ids(self.spec.write(texts, options), limit)
        return [Tokens(np.array(ids or [self._empty], np.int32)) for ids in rows]

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        layout = TokenLayout(batch, self.device)
        ids, starts = layout.on_device(layout.ids, layout.starts)
        means = functional.embedding_bag(ids, self._table, starts, mode="mean")
        return launched_as("dense", self._modules(means)[:, : self.spec.dimensions])


def read_table(spec: ModelSpec) -> torch.Tensor:
    """(num_tokens, dim) float32: model2vec's table is folded with its mapping and its weights of tokens."""
    file = spec.path / "model.safetensors"
    state = read_state(file)
    if state.keys() == {"embedding.weight"}:
        return state["embedding.weight"].float()
    if "embeddings" not in state or state.keys() - {"embeddings", "mapping", "weights"}:
        raise CannotLoadModel(
            f"{file} must hold embedding.weight, or embeddings with mapping and weights; it has {sorted(state)!s:.200}"
        )
    table = state["embeddings"]
    if "mapping" in state:
        table = table[state["mapping"].long()]
    return table.float() * state["weights"].float()[:, None] if "weights" in state else table.float()
