"""Reranks with a causal language model that answers Yes or No; the score is the logit of Yes.

FlagEmbedding's FlagLLMReranker, as bge-reranker-v2-gemma was trained. `core.models.decoders.prompted_pairs` writes the
pairs.
"""

from __future__ import annotations

import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import choose_precision
from embedq.core.models import Launched
from embedq.core.models.decoders.next_token import NextToken
from embedq.core.models.decoders.prompted_pairs import YES_NO_PROMPT, PromptedPairs
from embedq.core.models.requested_outputs import of_reranker
from embedq.core.models.transfer import launched_as
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision
from embedq.core.tokenizer import Tokenizer


class LlmReranker:
    """A causal language model whose score is the logit of `Yes` as the token after the prompt."""

    outputs = frozenset({"score"})
    is_padded = True

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        tokenizer = Tokenizer(spec)
        bos = tokenizer.special_id("bos_token")
        if bos == tokenizer.special_id("pad_token"):
            bos = None  # in FlagEmbedding such a model was trained without one
        self._pairs = PromptedPairs(spec, tokenizer, YES_NO_PROMPT, bos)
        # Some tokenizers make two tokens of it; models are trained to answer with the first.
        yes = tokenizer.ids(["Yes"], 1)[0]
        self._next_token = NextToken(spec, device, self.precision, yes)

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        return of_reranker(
            self.spec, options, ("mode", "weights", "cutoff_layers", "compress_layers", "compress_ratio")
        )

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """See `core.models.Reranker.encode_pairs`."""
        return self._pairs.encode(pairs, options)

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        return launched_as("score", self._next_token.logits(batch))
