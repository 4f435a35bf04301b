"""Embeds with in-context examples (bge-en-icl): a decoder that reads solved examples before each query.

    <instruct>…\n<query>…\n<response>…      as many examples as given

    <instruct>…\n<query>the query\n<response>

Only queries have examples; documents are embedded as they are. Token ids equal those of FlagEmbedding, which cuts a
query by tokens, decodes it back into text, and tokenizes the whole.
"""

from __future__ import annotations

from embedq.core.checkpoint.prompts import write_example
from embedq.core.errors import InvalidInput
from embedq.core.models.decoders.decoder import Decoder
from embedq.core.options import EmbedOptions
from embedq.core.sequence import Tokens
from embedq.core.tokenizer import ALL_TOKENS

#: FlagEmbedding counts these as the special tokens around a query, whatever the tokenizer's own are.
_BEFORE, _BEHIND = "<s>", "</s>"

#: FlagEmbedding allows the whole to be this much longer than its parts, rounded up to a multiple of 8.
_SLACK_TOKENS, _MULTIPLE = 8, 8


class InContext(Decoder):
    """A decoder that reads examples before each query."""

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """See `core.models.Embedder.encode_texts`. `max_length` is a query's, examples not counted."""
        if options.input_type != "query":
            return super().encode_texts(texts, options)
        prefix = self._write_examples(options)
        room, total = self._lengths(prefix, options.max_length)
        heads = self._tokenizer.ids(self.spec.write(texts, options), room)
        written = [prefix + self._tokenizer.decode(head) + self.spec.suffix for head in heads]
        return self._tokenizer.encode(written, total)

    def _write_examples(self, options: EmbedOptions) -> str:
        """The examples of a call, or the model's own, each followed by a blank line."""
        examples = self.spec.examples if options.examples is None else options.examples
        instruction = self.spec.query_instruction if options.instruction is None else options.instruction
        parts = ({"instruct": instruction or "", "query": "", "response": ""} | example for example in examples)
        form = self.spec.examples_format
        return "".join(
            write_example(form, part["instruct"], part["query"], part["response"]) + "\n\n" for part in parts
        )

    def _lengths(self, prefix: str, max_length: int | None) -> tuple[int, int]:
        """(most tokens of a query, most tokens of the whole) for a call. InvalidInput if a query has no room."""
        examples, suffix, before, behind = (
            len(ids)
            for ids in self._tokenizer.ids([prefix, self.spec.suffix, _BEFORE, self.spec.suffix + _BEHIND], ALL_TOKENS)
        )
        # The whole must fit the model. Only the query is cut, never its examples and suffix.
        fitting = self.spec.max_length - examples - suffix - _SLACK_TOKENS - _MULTIPLE
        length = min(self._tokenizer.checked_length(max_length, 0), fitting)
        room = length - before - behind
        if room < 1:
            raise InvalidInput(
                f"a query needs more than {before + behind} tokens for suffix and special tokens beside {examples} of "
                f"examples; model {self.spec.alias} takes {self.spec.max_length} in all, and max_length is {max_length}"
            )
        whole = (examples + suffix + length + _SLACK_TOKENS) // _MULTIPLE * _MULTIPLE + _MULTIPLE
        return room, whole
