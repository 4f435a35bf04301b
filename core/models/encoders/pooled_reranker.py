"""Reranking with an encoder, a pooling and modules behind it, as sentence-transformers saves such a CrossEncoder.

Query and passage are read together; the last Dense module's one value is the score.
"""

from __future__ import annotations

from typing import Any

import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import around_products, choose_precision
from embedq.core.models import Launched
from embedq.core.models.encoders.padding_probe import check_padding
from embedq.core.models.network_class import network_class
from embedq.core.models.pooling import Pooling
from embedq.core.models.requested_outputs import refuse
from embedq.core.models.token_layout import TokenLayout, pad, pad_types
from embedq.core.models.transfer import launched_as
from embedq.core.models.weights import load
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision
from embedq.core.text_inputs import TextInputs
from embedq.core.tokenizer import Tokenizer


class PooledReranker:
    """A network whose pooled states become a score."""

    outputs = frozenset({"score"})
    is_padded = True

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        dtype = around_products(device, self.precision)
        self._module: Any = load(network_class(spec), spec, device, dtype, unused=("pooler.",))
        self._has_types = int(getattr(self._module.config, "type_vocab_size", 0) or 0) > 1
        self._pool = Pooling(spec, device)
        self._inputs = TextInputs(spec, Tokenizer(spec))
        check_padding(self._states, spec, device)

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        assert isinstance(options, RerankOptions)
        refuse(self.spec, options, ("mode", "weights", "prompt", "cutoff_layers", "compress_layers", "compress_ratio"))
        return Wanted(self.outputs)

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """See `core.models.Reranker.encode_pairs`."""
        return self._inputs.encode_pairs(pairs, options)

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        layout = TokenLayout(batch, self.device)
        return launched_as("score", self._pool(self._states(layout), layout))

    def _states(self, layout: TokenLayout) -> torch.Tensor:
        """Last hidden states of all tokens: (num_tokens, dim)."""
        ids, mask = pad(layout.batch, self.spec.pad_token_id, self.device)
        types = {"token_type_ids": pad_types(layout.batch, self.device)} if self._has_types else {}
        hidden: torch.Tensor = self._module(input_ids=ids, attention_mask=mask, **types).last_hidden_state
        return layout.without_padding(hidden)
