"""Texts and pairs of a call -> token ids, with what a checkpoint writes around them: prompts, or a chat template.

Shared by the families that read a checkpoint as sentence-transformers saved it. Used by any number of threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from embedq.core.chat_template import ChatTemplate
from embedq.core.checkpoint.prompts import PLAIN, write
from embedq.core.checkpoint.spec import ModelSpec
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Tokens
from embedq.core.tokenizer import Tokenizer

#: Texts by which the end of a template is found: what they have in common there is the template's.
_FILLERS = ("0", "1 2 3 4")


class TextInputs:
    """Encodes for one model."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._template = None if spec.chat is None else ChatTemplate(spec.chat)
        if self._template is not None:
            self._template.check(1 if spec.is_embedder else 2)
        self._end_of_template = lru_cache(maxsize=256)(self._find_end)
        self._prompt_length = lru_cache(maxsize=256)(self._count_prompt)

    def encode(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """Texts in order, each with its prompt or instruction, or as a message of the chat template."""
        limit = options.max_length or self._spec.lengths.get(options.input_type or "")
        if self._template is None:
            rows = self._tokenizer.encode(self._spec.write(texts, options), limit)
            return rows if self._spec.include_prompt else self._with_prompts(rows, options)
        instruction, form = self._spec.instruction(options)
        if form != PLAIN:
            texts, instruction = write(texts, instruction, form), None
        return self._by_template([(text,) for text in texts], instruction, options.input_type, limit)

    def encode_pairs(self, pairs: list[tuple[str, str]], options: RerankOptions) -> list[Tokens]:
        """(query, passage) pairs in order, joined as the pair template says, or as messages of the chat template."""
        if self._template is None:
            written = self._spec.write_pairs(pairs, options)
            return self._tokenizer.encode_pairs(written, options.max_length, options.query_max_length)
        instruction, form = self._spec.pair_instruction(options)
        if form != PLAIN:  # it goes around the query, and not before the conversation
            return self._by_template(self._spec.write_pairs(pairs, options), None, None, options.max_length)
        without = replace(options, query_instruction="", query_instruction_format=PLAIN)
        return self._by_template(self._spec.write_pairs(pairs, without), instruction, None, options.max_length)

    def _by_template(
        self, rows: Sequence[tuple[str, ...]], prompt: str | None, task: str | None, limit: int | None
    ) -> list[Tokens]:
        """Rows written by the template and cut; a row that was cut gets the template's end back, over its last tokens."""
        assert self._template is not None
        limit = self._tokenizer.checked_length(limit, 2)
        written = [self._template.write(row, prompt, task) for row in rows]
        end = self._end_of_template(len(rows[0]), prompt, task) if rows else ()
        return self._tokenizer.encode_written(written, limit, end)

    def _find_end(self, num_texts: int, prompt: str | None, task: str | None) -> tuple[int, ...]:
        """The tokens that the template puts behind all it is given; none if its end cannot be told apart."""
        assert self._template is not None
        written = [self._template.write([filler] * num_texts, prompt, task) for filler in _FILLERS]
        one, other = self._tokenizer.ids(written, 2**31)
        count = 0
        while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
            count += 1
        return tuple(one[len(one) - count :]) if 0 < count < min(len(one), len(other)) else ()

    def _with_prompts(self, rows: list[Tokens], options: EmbedOptions) -> list[Tokens]:
        """Rows that say how many tokens at their start are the prompt's, for a pooling that leaves them out."""
        instruction, form = self._spec.instruction(options)
        if not instruction:
            return rows
        length = self._prompt_length(write([""], instruction, form)[0])
        return [replace(row, num_prompt_tokens=length) for row in rows]

    def _count_prompt(self, prompt: str) -> int:
        """As the library counts: the prompt alone with its special tokens, less one that ends it."""
        (tokens,) = self._tokenizer.encode([prompt])
        return len(tokens.ids) - int(self._tokenizer.is_special(int(tokens.ids[-1])))
