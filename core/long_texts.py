"""The first tokens of a long text, at a cost bounded by how many are wanted and not by the text. Any thread may call.

A text is cut and its start encoded. White space is where every tokenizer ends a word. Where there is none (Chinese,
base64, one endless word) a cut may fall into a token, and then tokens before it may differ, too. So the start is cut at
each place of a window as wide as the longest token. Whatever follows, one token of the whole text begins in that window,
and the tokens before it are those of the text cut there: merges (BPE), best paths (Unigram) and longest matches
(WordPiece) on the left of a border owe nothing to what is on its right. The ids that all cuts begin with therefore
begin the whole text as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

#: White space at which every tokenizer ends a word. Some tokenizers drop other white space: to BERT a form feed is a
#: control character, and the words beside it become one.
_SPACES = " \n\t\r"

#: Cuts to encode in one call; bounds the ids that are in memory at a time.
_CUTS_TOGETHER = 32

#: Characters of the first start that is cut, per token that may be kept: Chinese has one to two.
_CHARACTERS_PER_TOKEN = 2

#: Steps of a tokenizer whose result at a place depends on its neighbourhood only.
_LOCAL_STEPS = frozenset(
    {"BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend"}
    | {"Replace", "Strip", "StripAccents", "BertPreTokenizer", "CharDelimiterSplit", "Digits", "Metaspace"}
    | {"Punctuation", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"}
)

#: Models for which the argument above holds.
_MODELS = frozenset({"BPE", "Unigram", "WordLevel", "WordPiece"})

#: Patterns that look further: groups that look ahead or behind, anchors, borders of words.
_FAR = re.compile(r"\(\?(=|!|<=|<!|>)|(?<!\\)\$|\\[bBzZAG]")

#: The exception, which most byte-level tokenizers have: it looks one character ahead.
_NEAR = r"\s+(?!\S)"

#: Punctuation behind which BERT's tokenizer ends a word; none of it occurs in special tokens as a rule.
_ENDS = "+/.,;:!?=&%，。、！？；："

#: Characters that BERT's tokenizer puts into one word: ASCII letters and digits, and Thai, which has no blanks.
_ENDLESS = re.compile(r"[0-9A-Za-z\u0e01-\u0e3a\u0e40-\u0e4e]+")


class LongTexts:
    """Finds the first tokens of long texts with a tokenizer, which it never reconfigures."""

    def __init__(self, rust: RustTokenizer) -> None:
        self._rust = rust

    def head(self, text: str, max_characters: int) -> str:
        """The start of `text`, at most `max_characters` long, whose tokens the rest does not change.

        Ends behind a word; empty if no word is known to end there.
        """
        if len(text) <= max_characters:
            return text
        end = max(text.rfind(space, 0, max_characters + 1) for space in _SPACES)
        if end <= 0 and self._ends:
            end = max((found.end() for found in self._ends.finditer(text, 0, max_characters)), default=0)
            return text[:end]
        return text[: max(end, 0)].rstrip()

    def first_ids(self, text: str, max_tokens: int, num_characters: int) -> list[int]:
        """The first `max_tokens` ids of `text`, fewer if it has fewer. Begins with heads of `num_characters`."""
        text = self._shortened(text)
        factor = 1
        while num_characters * factor < len(text):
            head = self.head(text, num_characters * factor)
            ids = self._encode(head)
            if len(ids) >= max_tokens:
                return ids[:max_tokens]
            size = len(head) + _CHARACTERS_PER_TOKEN * max_tokens * factor + 2 * self._longest
            if num_characters * factor > len(head) + self._longest and (found := self._by_cuts(text, max_tokens, size)):
                return found
            factor *= 4
        return self._encode(text)[:max_tokens]

    def _by_cuts(self, text: str, max_tokens: int, size: int) -> list[int] | None:
        """The first `max_tokens` ids, if all cuts of the first `size` characters begin with the same ones.

        None where they do not, or where the whole text costs less than all the cuts.
        """
        width = self._width(text, size)
        if width == 0 or size * width >= len(text):
            return None
        common: list[int] | None = None
        for first in range(size - width + 1, size + 1, _CUTS_TOGETHER):
            cuts = [text[:end] for end in range(first, min(first + _CUTS_TOGETHER, size + 1))]
            for one in self._rust.encode_batch_fast(cuts, add_special_tokens=False):
                common = one.ids if common is None else _common(common, one.ids)
            if common is None or len(common) < max_tokens:
                return None
        return common and common[:max_tokens]

    def _width(self, text: str, size: int) -> int:
        """A number of characters before `size` that is surely more than any token has; 0 if none is known.

        Accents and invisible characters do not count: rules may drop them or join them to the character before.
        """
        if not self._longest:
            return 0
        for width in (self._longest + 2, 2 * self._longest + 2):
            window = text[max(0, size - width) : size]
            visible = "".join(one for one in window if one.isprintable() and not one.isspace())
            normalizer = self._rust.normalizer
            if len(normalizer.normalize_str(visible) if normalizer else visible) > self._longest:
                return width
        return 0

    def _shortened(self, text: str) -> str:
        """`text` with endless words cut where their rest changes nothing: WordPiece knows no word of more characters."""
        if not self._ends:
            return text
        enough = 2 * self._max_word
        return _ENDLESS.sub(lambda word: word[0] if len(word[0]) <= enough else word[0][:enough], text)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._rust.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token or known word, after normalizing; 0 if a rule may look further.

        Read at the first long text, since a vocabulary may have a quarter of a million tokens.
        """
        model = self._rust.model
        if type(model).__name__ not in _MODELS or getattr(model, "end_of_word_suffix", None):
            return 0
        if getattr(model, "dropout", None) or not all(map(_is_local, self._steps)):
            return 0
        return max(self._max_word, *map(len, self._rust.get_vocab(with_added_tokens=True)), 1)

    @property
    def _max_word(self) -> int:
        return int(getattr(self._rust.model, "max_input_chars_per_word", 0))

    @cached_property
    def _ends(self) -> re.Pattern[str] | None:
        """Matches where BERT's tokenizer surely ends a word without white space; None for other tokenizers."""
        kinds = {step["type"]: step for step in self._steps}
        if type(self._rust.model).__name__ != "WordPiece" or kinds.keys() != {"BertNormalizer", "BertPreTokenizer"}:
            return None
        special = "".join(one.content for one in self._rust.get_added_tokens_decoder().values())
        ends = "".join(re.escape(one) for one in _ENDS if one not in special)
        ideographs = "一-鿿" if kinds["BertNormalizer"]["handle_chinese_chars"] else ""
        return re.compile(rf"[{ends}{ideographs}](?=[0-9A-Za-z{ideographs}])")

    @cached_property
    def _steps(self) -> list[dict[str, Any]]:
        """The steps of normalizer and pre-tokenizer, as `tokenizer.json` has them."""
        parts = self._rust.normalizer, self._rust.pre_tokenizer
        return [step for part in parts if part for step in _flat(json.loads(part.__getstate__()))]


def _flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A step, or those of a sequence of steps."""
    inner = step.get("normalizers") or step.get("pretokenizers") if step["type"] == "Sequence" else [step]
    for one in inner or []:
        yield from [one] if one is step else _flat(one)


def _is_local(step: dict[str, Any]) -> bool:
    pattern = step.get("pattern")
    regex = pattern.get("Regex", "") if isinstance(pattern, dict) else ""
    return step["type"] in _LOCAL_STEPS and not _FAR.search(regex.replace(_NEAR, ""))


def _common(one: list[int], other: list[int]) -> list[int]:
    """The ids that both begin with."""
    if one == other[: len(one)]:
        return one
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [first for first, _ in pairs]
