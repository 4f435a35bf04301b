"""Reranking with an encoder that reads query and passage together and gives one score."""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification

from core.checks import EmbedOptions, RerankOptions
from core.devices import choose_precision
from core.models import Launched
from core.models.transfer import launched_as
from core.models.wanted import refuse
from core.models.weights import load, pad, pad_types
from core.sequence import Sequence, Tokens, Wanted
from core.settings import Precision
from core.spec import ModelSpec
from core.tokenizer import Tokenizer


class CrossEncoder:
    """A sequence classifier with one label; its logit is the score."""

    outputs = frozenset({"score"})

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        self._module = load(AutoModelForSequenceClassification, spec, device, self.precision)
        self._tokenizer = Tokenizer(spec)
        # BERT tells query from passage by segment; XLM-R and RoBERTa have one segment and want none.
        self._has_types = int(getattr(self._module.config, "type_vocab_size", 0) or 0) > 1

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        assert isinstance(options, RerankOptions)
        refuse(self.spec, options, ("mode", "weights", "prompt", "cutoff_layers", "compress_layers", "compress_ratio"))
        return Wanted(self.outputs)

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """See `core.models.Reranker.encode_pairs`."""
        written = self.spec.write_pairs(pairs, options)
        return self._tokenizer.encode_pairs(written, options.max_length, options.query_max_length)

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        ids, mask = pad(batch, self.spec.pad_token_id, self.device)
        types = {"token_type_ids": pad_types(batch, self.device)} if self._has_types else {}
        logits = self._module(input_ids=ids, attention_mask=mask, **types).logits  # (num_sequences, 1)
        return launched_as("score", logits.float())
