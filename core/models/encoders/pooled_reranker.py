"""Reranking with an encoder, a pooling and modules behind it, as sentence-transformers saves such a CrossEncoder.

Query and passage are read together; the last Dense module's one value is the score.
"""

from __future__ import annotations

import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import around_products, choose_precision
from embedq.core.models import Launched
from embedq.core.models.encoders.network import Padded, has_types
from embedq.core.models.encoders.padding_probe import check_padding
from embedq.core.models.network_class import network_class
from embedq.core.models.pooling import Pooling
from embedq.core.models.requested_outputs import of_reranker
from embedq.core.models.token_layout import TokenLayout
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
        module = load(network_class(spec), spec, device, dtype, unused=("pooler.",))
        self._network = Padded(module, spec.pad_token_id, has_types(module))
        self._pool = Pooling(spec, device)
        self._inputs = TextInputs(spec, Tokenizer(spec))
        check_padding(self._network, spec, device)

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        return of_reranker(self.spec, options)

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """See `core.models.Reranker.encode_pairs`."""
        return self._inputs.encode_pairs(pairs, options)

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        layout = TokenLayout(batch, self.device)
        return launched_as("score", self._pool(self._network(layout), layout))
