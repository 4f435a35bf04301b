"""The texts that all systems get: docstrings, joined and cut so that their lengths are spread as stated.

Lengths are counted by the measured model's own tokenizer, special tokens included, and are within
what the model reads: no system cuts a text, so that all compute the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from embedq.core.errors import OperatorError
from embedq.deploy.demo import texts
from tests.bench import real_texts

#: Tokens of a text at least and at most, by kind. Lengths are spread evenly from the first to the second and cut to
#: the third, in random order: mixed texts have 145 tokens on average, a few of them all 256.
SPREADS = {"short": (0, 0, real_texts.MAX_SHORT_TOKENS), "mixed": (20, 270, 256), "long": (512, 2_048, 2_048)}

#: Passages of one rerank.
PASSAGES_PER_CALL = 256

#: Special tokens of one text.
_NUM_SPECIAL = 2

_SEED = 7

#: Tokens of a docstring on average, or less: so many more are read than are wanted.
_EACH_TOKENS = 64

_ENCODED_AT_ONCE = 256


@dataclass(frozen=True)
class Work:
    """What one round gives each system: texts to embed, or calls of a query and its passages to rerank."""

    texts: list[str]
    calls: list[tuple[str, list[str]]]
    #: (num_sequences,) tokens of each, as the model computes them.
    lengths: np.ndarray

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def first(self, num_sequences: int) -> Work:
        """As much of it as one call holds at most, and no more than `num_sequences`."""
        calls = [(query, passages[:num_sequences]) for query, passages in self.calls[:1]]
        return Work(self.texts[:num_sequences], calls, self.lengths[:num_sequences])


def to_embed(kind: str, num_texts: int, model: Path) -> Work:
    """`num_texts` different texts of that kind."""
    chosen = _read(kind, num_texts, model)
    return Work(chosen, [], _lengths(model, chosen))


def to_rerank(kind: str, num_passages: int, model: Path) -> Work:
    """As many passages of that kind, in calls of up to 256 with a short query each."""
    passages = _read(kind, num_passages, model)
    starts = range(0, num_passages, PASSAGES_PER_CALL)
    queries = _read("short", max(len(starts), 16), model)
    calls = [
        (query, passages[at : at + PASSAGES_PER_CALL]) for query, at in zip(queries[: len(starts)], starts, strict=True)
    ]
    return Work([], calls, _lengths(model, [(query, passage) for query, of in calls for passage in of]))


def distribution(lengths: np.ndarray) -> str:
    """Mean, quartiles and extremes, for people."""
    least, first, half, third, most = np.percentile(lengths, [0, 25, 50, 75, 100])
    return f"{lengths.mean():.0f} tokens on average, quartiles {first:.0f} {half:.0f} {third:.0f}, {least:.0f} to {most:.0f}"


def _read(kind: str, num_texts: int, model: Path) -> list[str]:
    if kind == "short":
        return real_texts.read(num_texts, model).short
    low, high, limit = SPREADS[kind]
    wanted = [min(low + (high - low) * (2 * number + 1) // (2 * num_texts), limit) for number in range(num_texts)]
    random.Random(_SEED).shuffle(wanted)
    tokenizer, num_read = _tokenizer(model), 1 << (sum(wanted) // _EACH_TOKENS).bit_length()
    while True:
        prose = _prose(num_read)
        found = _joined(wanted, prose, tokenizer)
        if len(found) == num_texts:
            return found
        if len(prose) < num_read:
            raise OperatorError(
                f"the standard library has {len(found):,} {kind} texts to measure with; {num_texts:,} were asked for"
            )
        num_read *= 2


@cache
def _prose(max_texts: int) -> list[str]:
    return [text.text for text in texts.read(max_texts)]


def _joined(wanted: list[int], prose: list[str], tokenizer: Tokenizer) -> list[str]:
    """A text for each number of tokens, while there are docstrings: whole ones, the last of each text cut."""
    encoded = _encoded(prose, tokenizer)
    found: list[str] = []
    for num_tokens in wanted:
        parts, left = [], num_tokens - _NUM_SPECIAL
        while left > 0:
            text, offsets = next(encoded, ("", []))
            if not offsets:
                return found
            last = min(left, len(offsets)) - 1
            parts.append(text[: offsets[last][1]])
            left -= last + 1
        found.append("\n\n".join(parts))
    return found


def _encoded(prose: list[str], tokenizer: Tokenizer) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Docstrings with their tokens' places, some at a time: most runs need few of them."""
    for start in range(0, len(prose), _ENCODED_AT_ONCE):
        several = prose[start : start + _ENCODED_AT_ONCE]
        for text, encoding in zip(several, tokenizer.encode_batch(several, add_special_tokens=False), strict=True):
            if encoding.ids:
                yield text, encoding.offsets


def _lengths(model: Path, of: list[str] | list[tuple[str, str]]) -> np.ndarray:
    return np.array([len(encoding.ids) for encoding in _tokenizer(model).encode_batch(of)])


def _tokenizer(model: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
