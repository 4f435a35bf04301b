"""Texts -> checked token ids. The slow part runs outside the interpreter lock, in any thread.

One Rust tokenizer is shared by all threads. It is never reconfigured after loading (no truncation
or padding state): that is what makes sharing safe, and why truncation is done here, per call.
Knows nothing of models or batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer

from core.checkpoint import ModelSpec
from core.errors import CannotLoadModel, InvalidInput

#: Of a pair's tokens the query may take this share; the rest is the passage's. FlagEmbedding's rule.
_QUERY_SHARE = (3, 4)


#: Characters of a text read first for each token that may be kept. Real text has 3 to 5 per token,
#: so this nearly always suffices, and a book costs no more than its first pages.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Tokens:
    """One checked sequence: at most `max_length` tokens, special tokens included."""

    #: (num_tokens,) int32
    ids: np.ndarray
    #: (num_tokens,) int32, 0 for the first text and 1 for the second of a pair.
    type_ids: np.ndarray


class Tokenizer:
    """Encodes texts and pairs for one model."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._rust = _load(spec)
        self._rust.no_truncation()
        self._rust.no_padding()
        self._num_special = self._rust.num_special_tokens_to_add(is_pair=False)
        self._num_special_pair = self._rust.num_special_tokens_to_add(is_pair=True)

    def encode(self, texts: list[str], max_length: int | None = None) -> list[Tokens]:
        """Encode single texts, each cut to `max_length` tokens (None: the model's own limit)."""
        limit = self.checked_length(max_length, self._num_special)
        encoded = self._encode(texts, limit - self._num_special)
        return [_tokens(self._rust.post_process(one, None, True)) for one in encoded]

    def encode_pairs(self, query: str, passages: list[str], max_length: int | None = None) -> list[Tokens]:
        """Encode `query` with each passage, joined as the checkpoint's pair template says.

        The passage gives way: the query keeps up to 3/4 of `max_length`, the passage what is left
        (FlagEmbedding's FlagReranker; ids equal those of transformers v4).
        """
        limit = self.checked_length(max_length, self._num_special_pair + 2)
        room = limit - self._num_special_pair
        (first,) = self._encode([query], min(limit * _QUERY_SHARE[0] // _QUERY_SHARE[1], room))
        seconds = self._encode(passages, room - len(first))
        return [_tokens(self._rust.post_process(first, second, True)) for second in seconds]

    def checked_length(self, max_length: int | None, minimum: int) -> int:
        """The limit to use for a call. InvalidInput if it is above the model's or leaves no room."""
        limit = self._spec.max_length
        if max_length is None:
            return limit
        if not minimum < max_length <= limit:
            raise InvalidInput(
                f"max_length must be {minimum + 1} to {limit} tokens for model {self._spec.alias}; given {max_length}"
            )
        return max_length

    def _encode(self, texts: list[str], max_tokens: int) -> list[Encoding]:
        """The first `max_tokens` of each text, without special tokens."""
        if self._spec.strip:
            texts = [text.strip() for text in texts]
        if self._spec.lower:
            texts = [text.lower() for text in texts]
        heads = [_head(text, max_tokens * _CHARACTERS_PER_TOKEN) for text in texts]
        encoded: list[Encoding] = self._rust.encode_batch(heads, add_special_tokens=False)
        for index, (text, head) in enumerate(zip(texts, heads, strict=True)):
            while len(encoded[index]) < max_tokens and len(head) < len(text):
                head = _head(text, 2 * len(head))
                encoded[index] = self._rust.encode(head, add_special_tokens=False)
            encoded[index].truncate(max_tokens)
        return encoded


def _head(text: str, max_characters: int) -> str:
    """The start of `text`, about `max_characters` long, ending where a word ends.

    Tokenizers split before white space that follows a word, so what comes after such a place does
    not change the tokens before it. Without one (Chinese, a single endless word) nothing is cut.
    """
    if len(text) <= max_characters:
        return text
    for end in range(max_characters, 0, -1):
        if text[end].isspace() and not text[end - 1].isspace():
            return text[:end]
    return text


def _load(spec: ModelSpec) -> RustTokenizer:
    """Read `tokenizer.json` itself: transformers versions differ in what they make of it."""
    file = spec.path / "tokenizer.json"
    if not file.is_file():
        raise CannotLoadModel(f"{spec.path} has no tokenizer.json; save the model's fast tokenizer beside the weights")
    try:
        return RustTokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
        raise CannotLoadModel(f"{file} cannot be read as a tokenizer: {error}") from None


def _tokens(encoding: Encoding) -> Tokens:
    return Tokens(np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32))
