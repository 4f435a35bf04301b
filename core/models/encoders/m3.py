"""BGE-M3: computes dense, sparse and ColBERT rows in one pass of an XLM-R encoder.

Two small layers read the last hidden states: `sparse_linear.pt` weighs each token as a word of the text,
`colbert_linear.pt` computes a vector per token. A directory without one of them still serves the other outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import around_products
from embedq.core.errors import CannotLoadModel
from embedq.core.models.encoders.encoder import Encoder
from embedq.core.models.requested_outputs import of_embedder
from embedq.core.models.small_weights import read_linear, read_state
from embedq.core.models.token_layout import TokenLayout
from embedq.core.models.transfer import to_host
from embedq.core.models.weights import round_weights
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.results import Sparse
from embedq.core.sequence import Wanted
from embedq.core.settings import Precision

#: The file of the layer behind each output.
FILES = {"sparse": "sparse_linear.pt", "colbert": "colbert_linear.pt"}

#: Special tokens, which have no lexical weight, with XLM-R's strings for checkpoints that do not name them. The mask
#: token is not among them: FlagEmbedding counts it.
_SILENT_TOKENS = {"cls_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


class M3(Encoder):
    """An encoder with a sparse and a ColBERT layer behind it."""

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        super().__init__(spec, device, precision)
        self._heads = {name: self._load_head(file) for name, file in FILES.items() if (spec.path / file).is_file()}
        self.outputs = frozenset({"dense", *self._heads})
        self._silent_ids = self._read_silent_ids()

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        missing = {name: f"its directory has no {file}" for name, file in FILES.items()}
        return of_embedder(self.spec, self.outputs, options, missing)

    def _start(self, output: str, states: torch.Tensor, layout: TokenLayout) -> Callable[[], Any]:
        if output == "sparse":
            weights = to_host(torch.relu(self._heads["sparse"](states)).squeeze(-1).float())  # (num_tokens,)
            return lambda: _by_token(layout, weights(), self._silent_ids)
        return super()._start(output, self._heads["colbert"](states) if output == "colbert" else states, layout)

    def _load_head(self, name: str) -> torch.nn.Linear:
        file = self.spec.path / name
        layer = read_linear(read_state(file), file, int(self.spec.config["hidden_size"]))
        if name == FILES["sparse"] and layer.out_features != 1:
            raise CannotLoadModel(f"{file} has {layer.out_features} outputs per token; a token has 1 weight")
        layer.to(getattr(torch, around_products(self.device, self.precision)))
        round_weights(layer, self.spec)
        return layer.to(self.device).eval()

    def _read_silent_ids(self) -> np.ndarray:
        ids = []
        for kind, usual in _SILENT_TOKENS.items():
            stated = self._tokenizer.special_id(kind)
            ids.append(self._tokenizer.id_of(usual) if stated is None else stated)
        return np.array([one for one in ids if one is not None], np.int32)


def _by_token(layout: TokenLayout, values: np.ndarray, silent_ids: np.ndarray) -> list[Sparse]:
    """The largest weight of each token id per sequence, if above 0, from weights (num_tokens,)."""
    rows = np.repeat(np.arange(len(layout.lengths), dtype=np.int64), layout.lengths)
    ids = layout.ids
    # Not "above 0": that would drop NaN, and a broken model would look like a text without words.
    is_kept = ~(values <= 0) & ~np.isin(ids, silent_ids)
    # One number per sequence and token id: sorting by it groups equal tokens of a sequence.
    keys = (rows << 32 | ids)[is_kept]
    order = np.argsort(keys, kind="stable")
    keys, starts = np.unique(keys[order], return_index=True)
    largest = np.maximum.reduceat(values[is_kept][order], starts) if len(keys) else np.empty(0, np.float32)
    kept_ids = (keys & 0xFFFFFFFF).astype(np.int32)
    ends = np.searchsorted(keys, np.arange(1, len(layout.lengths) + 1, dtype=np.int64) << 32)
    return [Sparse(kept_ids[start:end], largest[start:end]) for start, end in pairwise([0, *ends])]
