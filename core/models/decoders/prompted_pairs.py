"""Encodes (query, passage) pairs with a question behind them, as FlagEmbedding does for language models.

    [bos] query | newline passage | newline prompt

If the pair is too long, the passage is cut; the prompt follows and is never cut. Shared by the families that rerank
with a language model. The spec writes instructions around the texts.
"""

from __future__ import annotations

import numpy as np

from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.errors import CannotLoadModel, InvalidInput
from embedq.core.options import RerankOptions
from embedq.core.sequence import Tokens
from embedq.core.tokenizer import ALL_TOKENS, QUERY_SHARE, Tokenizer

#: The question to write behind each pair, unless a call has its own.
YES_NO_PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing "
    "a prediction of either 'Yes' or 'No'."
)


class PromptedPairs:
    """Encodes pairs for one model. Any number of threads may call at once."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer, default_prompt: str, bos: int | None) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._default_prompt = default_prompt
        self._bos = [] if bos is None else [bos]
        #: One id, or two if the tokenizer adds a blank before every text.
        self._newline = tokenizer.ids(["\n"], ALL_TOKENS)[0]

    @classmethod
    def with_bos(cls, spec: ModelSpec, default_prompt: str) -> PromptedPairs:
        """Build for a model that needs a bos token before every query. CannotLoadModel if its files name none."""
        tokenizer = Tokenizer(spec)
        bos = tokenizer.special_id("bos_token")
        if bos is None:
            raise CannotLoadModel(f"{spec.path} names no bos_token, which this reranker needs before every query")
        return cls(spec, tokenizer, default_prompt, bos)

    def encode(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """Encode `pairs` in order, cutting each passage so that the pair fits `max_length`.

        `max_length` counts bos, query and passage, not the newlines and the prompt. As in FlagEmbedding, a passage that
        is not longer than the excess is not cut at all. InvalidInput if the whole exceeds the model's positions.
        """
        max_length = self._tokenizer.checked_length(options.max_length, 2)
        query_limit = options.query_max_length or max_length * QUERY_SHARE[0] // QUERY_SHARE[1]
        written = self._spec.write_pairs(pairs, options)
        queries = list(dict.fromkeys(query for query, _ in written))  # a rerank has one, many times
        query_ids = dict(zip(queries, self._tokenizer.ids(queries, query_limit), strict=True))
        passages = self._tokenizer.ids([passage for _, passage in written], max_length)
        prompt = self._default_prompt if options.prompt is None else options.prompt
        prompt_ids = self._tokenizer.ids([prompt], ALL_TOKENS)[0]
        room = max_length + len(self._newline) + len(prompt_ids)
        tail = self._newline + prompt_ids
        joined = [
            self._join(query_ids[query], passage, room, tail)
            for (query, _), passage in zip(written, passages, strict=True)
        ]
        self._check_positions(joined)
        return joined

    def _join(self, query: list[int], passage: list[int], room: int, tail: list[int]) -> Tokens:
        first, second = self._bos + query, self._newline + passage
        over = len(first) + len(second) - room
        if 0 < over < len(second):
            second = second[: len(second) - over]
        ids = first + second + tail
        # The newline belongs to the query, unless there was no room for it.
        num_query = min(len(first) + len(self._newline), len(first) + len(second))
        return Tokens(np.array(ids, np.int32), num_query_tokens=num_query, num_prompt_tokens=len(tail))

    def _check_positions(self, joined: list[Tokens]) -> None:
        longest = max((len(tokens.ids) for tokens in joined), default=0)
        limit = self._spec.num_positions or self._spec.max_length
        if longest > limit:
            prompt = joined[0].num_prompt_tokens
            raise InvalidInput(
                f"a pair has {longest} tokens, {prompt} of them its prompt, and model {self._spec.alias} takes {limit}; "
                "lower max_length, or shorten the prompt"
            )
