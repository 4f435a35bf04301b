"""Embeds with a bidirectional encoder: BERT, RoBERTa, XLM-R, MPNet, ModernBERT and similar models.

A pass computes the last hidden states; "dense" pools them, "colbert" returns them per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import around_products, choose_precision
from embedq.core.models import Launched
from embedq.core.models.encoders import bert
from embedq.core.models.encoders.network import Padded, build
from embedq.core.models.encoders.padding_probe import check_padding
from embedq.core.models.network_class import network_class
from embedq.core.models.pooling import Pooling
from embedq.core.models.requested_outputs import of_embedder
from embedq.core.models.token_layout import TokenLayout
from embedq.core.models.transfer import launched_as, to_host
from embedq.core.models.weights import load
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision
from embedq.core.text_inputs import TextInputs
from embedq.core.tokenizer import Tokenizer


class Encoder:
    """An encoder, its pooling, and the projections behind it."""

    outputs = frozenset({"dense", "colbert"})

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        self._tokenizer = Tokenizer(spec)
        # The pooler is BERT's next-sentence head; many embedding checkpoints lack it.
        dtype = around_products(device, self.precision)
        module = bert.load(spec, device, dtype) or load(network_class(spec), spec, device, dtype, unused=("pooler.",))
        self._network = build(module, spec, device, self.precision)
        check_padding(self._network, spec, device)
        self.is_padded = isinstance(self._network, Padded)
        self._pool = Pooling(spec, device)
        self._inputs = TextInputs(spec, self._tokenizer)

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        return of_embedder(self.spec, self.outputs, options)

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """See `core.models.Embedder.encode_texts`."""
        return self._inputs.encode(texts, options)

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        layout = TokenLayout(batch, self.device)
        if wanted.outputs == {"dense"}:
            return launched_as("dense", self._pool.alone(self._network, layout))
        states = self._network(layout)  # (num_tokens, dim)
        started = {output: self._start(output, states, layout) for output in sorted(wanted.outputs)}
        return lambda: {output: rows() for output, rows in started.items()}

    def _start(self, output: str, states: torch.Tensor, layout: TokenLayout) -> Callable[[], Any]:
        """Start computing `output` from `states` (num_tokens, dim); the returned function waits for its rows."""
        if output == "dense":
            return to_host(self._pool(states, layout))
        tokens = to_host(states.float())
        return lambda: layout.split(tokens(), num_left_out=1)  # without the first token, with the last, as BGE-M3
