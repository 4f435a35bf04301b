"""Reranking with a language model as sentence-transformers' LogitScore does: the logit of one token, or of one less another's.

Query and passage are messages of the checkpoint's chat template, or a pair of the tokenizer's pair template. The logits
are those behind the last token.
"""

from __future__ import annotations

import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import choose_precision
from embedq.core.models import Launched
from embedq.core.models.decoders.next_token import NextToken
from embedq.core.models.requested_outputs import of_reranker
from embedq.core.models.transfer import launched_as
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision
from embedq.core.text_inputs import TextInputs
from embedq.core.tokenizer import Tokenizer


class LogitScore:
    """A language model that answers with one of `spec.answers`."""

    outputs = frozenset({"score"})
    is_padded = True

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        self._inputs = TextInputs(spec, Tokenizer(spec))
        self._next_token = NextToken(spec, device, self.precision, list(spec.answers))

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        return of_reranker(self.spec, options)

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """See `core.models.Reranker.encode_pairs`."""
        return self._inputs.encode_pairs(pairs, options)

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        logits = self._next_token.logits(batch)  # (num_sequences, 1 or 2)
        return launched_as("score", logits[:, :1] - logits[:, 1:] if len(self.spec.answers) == 2 else logits)
