"""Texts -> checked token ids. The slow part runs outside the interpreter lock, in any thread.

One Rust tokenizer is shared by all threads. It is never reconfigured after loading (no truncation
or padding state): that is what makes sharing safe, and why truncation is done here, per call.
Knows nothing of models or batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer

from core.checkpoint import read_json
from core.errors import CannotLoadModel, InvalidInput
from core.sequence import Tokens
from core.spec import ModelSpec

#: Of a pair's tokens the query may take this share; the rest is the passage's. FlagEmbedding's rule.
QUERY_SHARE = (3, 4)


#: Characters of a text read first for each token that may be kept. Real text has 3 to 5 per token,
#: so this nearly always suffices, and a book costs no more than its first pages.
_CHARACTERS_PER_TOKEN = 16


#: More tokens than any text has.
_ALL = 2**31

#: Tokenizer classes that put `add_eos_token` above what `tokenizer.json` says (transformers v4, with which
#: their models were trained); others ignore it.
_ENDING_CLASSES = ("Llama", "CodeLlama", "Gemma")


class Tokenizer:
    """Encodes texts and pairs for one model."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._rust = _load(spec)
        self._rust.no_truncation()
        self._rust.no_padding()
        self._end = self._read_end()
        self._num_special = self._rust.num_special_tokens_to_add(is_pair=False) + len(self._end)
        self._num_special_pair = self._rust.num_special_tokens_to_add(is_pair=True)

    def encode(self, texts: list[str], max_length: int | None = None) -> list[Tokens]:
        """Encode single texts, each cut to `max_length` tokens (None: the model's own limit)."""
        limit = self.checked_length(max_length, self._num_special)
        encoded = self._encode(texts, limit - self._num_special)
        rows = [_tokens(self._rust.post_process(one, None, True), self._end) for one in encoded]
        if self._num_special == 0 and not all(len(row.ids) for row in rows):
            raise InvalidInput(
                f"a text has no tokens, and model {self._spec.alias} adds none: it cannot read an empty text"
            )
        return rows

    def encode_pairs(
        self, pairs: list[tuple[str, str]], max_length: int | None = None, query_max_length: int | None = None
    ) -> list[Tokens]:
        """Encode (query, passage) pairs, joined as the checkpoint's pair template says.

        The passage gives way: the query keeps up to `query_max_length` (None: 3/4 of `max_length`)
        tokens, the passage what is left. As FlagEmbedding's FlagReranker, with the ids of
        transformers v4; so too when the passage is not longer than the excess: then nothing is cut.
        With `pair_truncation` "longest" the longer of the two is cut, as sentence-transformers does,
        and the query has no limit unless the call sets one.
        """
        limit = self.checked_length(max_length, self._num_special_pair)
        room = limit - self._num_special_pair
        queries = list(dict.fromkeys(query for query, _ in pairs))  # a rerank has one, many times
        is_longest = self._spec.pair_truncation == "longest"
        # Which of two texts is the longer is only known when both are encoded to their ends.
        query_limit = query_max_length or (_ALL if is_longest else limit * QUERY_SHARE[0] // QUERY_SHARE[1])
        encoded = dict(zip(queries, self._encode(queries, query_limit), strict=True))
        seconds = self._encode([passage for _, passage in pairs], _ALL if is_longest else limit)
        cut = _cut_longest if is_longest else _cut_passage
        joined = []
        for (query, _), second in zip(pairs, seconds, strict=True):
            first = Encoding.merge([encoded[query]], False)  # a copy: cutting happens in place
            cut(first, second, room)
            joined.append(_tokens(self._rust.post_process(first, second, True)))
        self._check_positions(joined)
        return joined

    def ids(self, texts: list[str], max_tokens: int) -> list[list[int]]:
        """The first `max_tokens` ids of each text, without special tokens."""
        return [encoding.ids for encoding in self._encode(texts, max_tokens)]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out only if they are marked as such."""
        text: str = self._rust.decode(ids, skip_special_tokens=False)
        return text

    def id_of(self, token: str | None) -> int | None:
        """The id of a token string; None where there is no such token."""
        found: int | None = self._rust.token_to_id(token) if token is not None else None
        return found

    def special_id(self, name: str) -> int | None:
        """The id of the token that the checkpoint calls `name` ("bos_token"); None where it has none.

        The tokenizer's files decide; `config.json` only where they do not mention it.
        """
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            stated = read_json(self._spec.path / file) or {}
            if name in stated:
                token = stated[name]
                return self.id_of(token["content"] if isinstance(token, dict) else token)
        stated_id = self._spec.config.get(f"{name}_id")
        return stated_id if isinstance(stated_id, int) else None

    def _read_end(self) -> list[int]:
        """The end token, where only a class would put it behind a text: one of Llama's kin, or a directory's own.

        The vector of a text is often that of its last token: without this one it would be another.
        """
        stated = read_json(self._spec.path / "tokenizer_config.json") or {}
        does_end = str(stated.get("tokenizer_class")).startswith(_ENDING_CLASSES) or "auto_map" in stated
        end = self.special_id("eos_token")
        if not (stated.get("add_eos_token") is True and does_end) or end is None:
            return []
        plain, full = (self._rust.encode("a", add_special_tokens=has_special).ids for has_special in (False, True))
        return [end] if full[-1] == plain[-1] else []  # else something follows the text already

    def _check_positions(self, joined: list[Tokens]) -> None:
        """A pair can exceed the limit only if a call gave the query nearly all of it."""
        longest = max((len(one.ids) for one in joined), default=0)
        if longest > self._spec.max_length:
            raise InvalidInput(
                f"a pair has {longest} tokens, and model {self._spec.alias} {self._spec.max_length}; lower query_max_length"
            )

    def checked_length(self, max_length: int | None, minimum: int) -> int:
        """The limit to use for a call. InvalidInput if it is above the model's or leaves no room."""
        limit = self._spec.max_length
        if max_length is None:
            return self._spec.default_length or limit
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


def _cut_passage(first: Encoding, second: Encoding, room: int) -> None:
    over = len(first) + len(second) - room
    if 0 < over < len(second):
        second.truncate(len(second) - over)


def _cut_longest(first: Encoding, second: Encoding, room: int) -> None:
    """The longer one gives way until both are alike; then they share the room."""
    if len(first) + len(second) <= room:
        return
    shorter = min(len(first), len(second))
    if 2 * shorter <= room:
        (first if len(first) > len(second) else second).truncate(room - shorter)
    else:
        half = room // 2
        first_room = half if len(first) <= len(second) else room - half
        first.truncate(first_room)
        second.truncate(room - first_room)


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


def _tokens(encoding: Encoding, end: Sequence[int] = ()) -> Tokens:
    type_ids = [*encoding.type_ids, *(0 for _ in end)]
    return Tokens(np.array([*encoding.ids, *end], np.int32), np.array(type_ids, np.int32))
