"""Texts -> checked token ids. The slow part runs outside the interpreter lock, in any thread.

One Rust tokenizer is shared by all threads. It is never reconfigured after loading (no truncation
or padding state): that is what makes sharing safe, and why truncation is done here, per call.
Knows nothing of models or batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Rules

from core.checkpoint import ModelSpec
from core.errors import CannotLoadModel, InvalidInput

#: Of a pair's tokens the query may take this share; the rest is the passage's. FlagEmbedding's rule.
_QUERY_SHARE = (3, 4)

#: Characters of a text read first for each token that may be kept. Real text has 3 to 5 per token,
#: so this nearly always suffices, and a book costs no more than its first pages.
_CHARACTERS_PER_TOKEN = 16

#: White space at which every tokenizer ends a word. Of the rest some drop one or the other: to BERT
#: a form feed is a control character, and the words beside it are one.
_SPACES = " \n\t\r"

#: A word that stands in for a text where only the special tokens around it are wanted.
_WORD = "a"


@dataclass(frozen=True, slots=True)
class Tokens:
    """One checked sequence: at most `max_length` tokens, special tokens included."""

    #: (num_tokens,) int32
    ids: np.ndarray
    #: (num_tokens,) int32, 0 for the first text and 1 for the second of a pair.
    type_ids: np.ndarray


@dataclass(frozen=True, slots=True)
class _Frame:
    """The special tokens around one text or a pair, as runs: before, between, after.

    Joining is done here because the Rust side, given a cut text, also joins everything that was cut
    off: with two long texts each piece of the one with each piece of the other.
    """

    ids: list[np.ndarray]
    type_ids: list[np.ndarray]
    #: Segment of each text's tokens.
    text_types: list[int]

    def around(self, *texts: np.ndarray) -> Tokens:
        ids, type_ids = [self.ids[0]], [self.type_ids[0]]
        for number, text in enumerate(texts):
            ids += [text, self.ids[number + 1]]
            type_ids += [np.full(len(text), self.text_types[number], np.int32), self.type_ids[number + 1]]
        return Tokens(np.concatenate(ids), np.concatenate(type_ids))

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))


class Tokenizer:
    """Encodes texts and pairs for one model."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._rust = _load(spec)
        self._rust.no_truncation()
        self._rust.no_padding()
        if spec.lower:  # as a rule of the tokenizer, so that special tokens in a text stay what they are
            rules = [Lowercase()] + ([self._rust.normalizer] if self._rust.normalizer else [])
            self._rust.normalizer = Rules(rules)
        self._frame = _read_frame(self._rust, num_texts=1)
        self._pair_frame = _read_frame(self._rust, num_texts=2)
        least = self._frame.num_tokens if spec.is_embedder else self._pair_frame.num_tokens + 2
        if spec.max_length <= least:
            raise CannotLoadModel(
                f"max_length of model {spec.alias} is {spec.max_length}; with its special tokens it needs {least + 1}"
            )

    def encode(self, texts: list[str], max_length: int | None = None) -> list[Tokens]:
        """Encode single texts, each cut to `max_length` tokens (None: the model's own limit)."""
        limit = self.checked_length(max_length, self._frame.num_tokens)
        return [self._frame.around(ids) for ids in self._encode(texts, limit - self._frame.num_tokens)]

    def encode_pairs(self, query: str, passages: list[str], max_length: int | None = None) -> list[Tokens]:
        """Encode `query` with each passage, joined as the checkpoint's pair template says.

        The passage gives way: the query keeps up to 3/4 of `max_length`, the passage what is left
        (FlagEmbedding's FlagReranker; ids equal those of transformers v4).
        """
        limit = self.checked_length(max_length, self._pair_frame.num_tokens + 2)
        room = limit - self._pair_frame.num_tokens
        (first,) = self._encode([query], min(limit * _QUERY_SHARE[0] // _QUERY_SHARE[1], room))
        return [self._pair_frame.around(first, second) for second in self._encode(passages, room - len(first))]

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

    def _encode(self, texts: list[str], max_tokens: int) -> list[np.ndarray]:
        """The first `max_tokens` ids of each text, without special tokens."""
        num_characters = max_tokens * _CHARACTERS_PER_TOKEN
        heads = [_head(text, num_characters) for text in texts]
        encoded = self._rust.encode_batch(heads, add_special_tokens=False)
        for index, text in enumerate(texts):
            # Grown by what was asked for and not by what was found: that may stay the same.
            size = num_characters
            while len(encoded[index]) < max_tokens and len(heads[index]) < len(text):
                size *= 4
                heads[index] = _head(text, size)
                encoded[index] = self._rust.encode(heads[index], add_special_tokens=False)
        return [np.array(one.ids[:max_tokens], np.int32) for one in encoded]


def _head(text: str, max_characters: int) -> str:
    """The start of `text`, at most `max_characters` long, ending where a word ends.

    What follows white space does not change the tokens before it. Where there is none (Chinese, a
    single endless word) nothing is cut.
    """
    if len(text) <= max_characters:
        return text
    end = max(text.rfind(space, 0, max_characters + 1) for space in _SPACES)
    return text[: max(end, 0)].rstrip() or text


def _read_frame(rust: RustTokenizer, num_texts: int) -> _Frame:
    """Find out what the checkpoint puts around texts, by letting it do so to a word."""
    word = rust.encode(_WORD, add_special_tokens=False)
    framed = rust.post_process(word, word if num_texts == 2 else None, True)
    ids, types = np.array(framed.ids, np.int32), np.array(framed.type_ids, np.int32)
    plain = [index for index, is_special in enumerate(framed.special_tokens_mask) if not is_special]
    if not word.ids or len(plain) != num_texts * len(word.ids):
        raise CannotLoadModel(
            f"the tokenizer gives no tokens for {_WORD!r}, so its special tokens cannot be told apart"
        )
    starts = plain[:: len(word.ids)]
    ends = [start + len(word.ids) for start in starts]
    runs = [slice(start, end) for start, end in zip([0, *ends], [*starts, len(ids)], strict=True)]
    return _Frame([ids[run] for run in runs], [types[run] for run in runs], [int(types[start]) for start in starts])


def _load(spec: ModelSpec) -> RustTokenizer:
    """Read `tokenizer.json` itself: transformers versions differ in what they make of it."""
    file = spec.path / "tokenizer.json"
    if not file.is_file():
        raise CannotLoadModel(f"{spec.path} has no tokenizer.json; save the model's fast tokenizer beside the weights")
    try:
        return RustTokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
        raise CannotLoadModel(f"{file} cannot be read as a tokenizer: {error}") from None
