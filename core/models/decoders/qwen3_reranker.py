"""Reranks with Qwen3-Reranker: a chat in which the model judges a document, yes or no.

    system: what to judge · user: <Instruct>, <Query>, <Document> · assistant: an empty thought, then yes or no

The score is logit(yes) - logit(no), so its sigmoid is the probability that the model's authors publish.
"""

from __future__ import annotations

import numpy as np
import torch

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.devices import choose_precision
from embedq.core.errors import CannotLoadModel
from embedq.core.models import Launched
from embedq.core.models.decoders.next_token import NextToken
from embedq.core.models.requested_outputs import REFUSED, of_reranker
from embedq.core.models.transfer import launched_as
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import Precision
from embedq.core.tokenizer import ALL_TOKENS, Tokenizer

_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class Qwen3Reranker:
    """A Qwen3 language model whose score is logit(yes) - logit(no)."""

    outputs = frozenset({"score"})
    is_padded = True

    def __init__(self, spec: ModelSpec, device: str, precision: Precision) -> None:
        self.spec = spec
        self.device = device
        self.precision, self.reason = choose_precision(device, precision)
        self._tokenizer = Tokenizer(spec)
        answers = [self._tokenizer.id_of(answer) for answer in ("yes", "no")]
        if None in answers:
            raise CannotLoadModel(f"{spec.path} has no tokens yes and no, so it is no Qwen3-Reranker")
        self._before, self._behind = self._tokenizer.ids([_BEFORE, _BEHIND], ALL_TOKENS)
        self._next_token = NextToken(spec, device, self.precision, [answer for answer in answers if answer is not None])

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        return of_reranker(self.spec, options, (*REFUSED, "query_max_length"))

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """See `core.models.Reranker.encode_pairs`.

        The tokenizer encodes instruction, query and document as one text and cuts its end. `max_length` counts
        everything.
        """
        frame = len(self._before) + len(self._behind)
        room = self._tokenizer.checked_length(options.max_length, frame) - frame
        texts = [query + passage for query, passage in self.spec.write_pairs(pairs, options)]
        ids = self._tokenizer.ids(texts, room)
        return [Tokens(np.array(self._before + middle + self._behind, np.int32)) for middle in ids]

    @torch.inference_mode()
    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        yes, no = self._next_token.logits(batch).unbind(dim=1)  # (num_sequences,) each
        return launched_as("score", (yes - no)[:, None])
