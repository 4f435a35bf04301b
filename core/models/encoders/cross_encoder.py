"""Reranks with an encoder that reads query and passage together and computes one score."""

from __future__ import annotations

from typing import Any

import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import around_products, choose_precision
from embedq.core.models import Launched
from embedq.core.models.encoders import bert
from embedq.core.models.encoders.network import has_types, packed
from embedq.core.models.requested_outputs import of_reranker
from embedq.core.models.token_layout import TokenLayout, padded_inputs
from embedq.core.models.transfer import launched_as
from embedq.core.models.weights import load
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision
from embedq.core.text_inputs import TextInputs
from embedq.core.tokenizer import Tokenizer


class CrossEncoder:
    """A sequence classifier with one label; its logit is the score."""

    outputs = frozenset({"score"})

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        dtype = around_products(device, self.precision)
        self._module: Any = bert.load(spec, device, dtype, is_classifier=True) or load(
            "AutoModelForSequenceClassification", spec, device, dtype
        )
        self._network = packed(self._module.base_model, spec, device, self.precision)
        self.is_padded = self._network is None
        self._inputs = TextInputs(spec, Tokenizer(spec))
        self._has_types = has_types(self._module)

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
        logits = self._from_states(layout) if self._network else self._padded(layout)  # (num_sequences, 1)
        return launched_as("score", logits.float())

    def _from_states(self, layout: TokenLayout) -> torch.Tensor:
        """Run the classifier on the state of each sequence's first token, the only one it reads."""
        assert self._network is not None
        first = self._network.first(layout).unsqueeze(1)  # (num_sequences, 1, dim)
        pooler: Any = getattr(self._module.base_model, "pooler", None)  # BERT's; others have it in their classifier
        classifier: Any = self._module.classifier
        logits: torch.Tensor = classifier(pooler(first) if pooler else first)
        return logits

    def _padded(self, layout: TokenLayout) -> torch.Tensor:
        logits: torch.Tensor = self._module(**padded_inputs(layout, self.spec.pad_token_id, self._has_types)).logits
        return logits
