"""Any number of different texts of stated lengths: words of docstrings, drawn by a seed, cut by the model's tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from embedq.deploy.demo import texts

#: Docstrings whose words are drawn from.
_NUM_READ = 2_000

#: Special tokens around a text, or a pair at most.
_NUM_SPECIAL = 2

#: Texts encoded at a time.
_AT_ONCE = 1_024

#: Tokens of the query that stands before all passages.
QUERY = "which function reads a file"


def lengths_of(bounds: tuple[int, int], count: int, seed: int = 0) -> np.ndarray:
    """(count,) lengths, spread evenly within `bounds`, in random order."""
    lengths = np.linspace(*bounds, count).round().astype(np.int64)
    return np.random.default_rng(seed).permutation(lengths)


def draw(model: Path, bounds: tuple[int, int], count: int, seed: int = 0, num_before: int = 0) -> list[str]:
    """`count` texts that have lengths within `bounds` in tokens of `model`, special ones and `num_before` included."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    words = [word for one in texts.read(_NUM_READ) for word in one.text.split()]
    random_ = random.Random(seed)
    wanted = np.maximum(lengths_of(bounds, count, seed) - _NUM_SPECIAL - num_before, 1).tolist()
    found = []
    for start in range(0, count, _AT_ONCE):
        some = wanted[start : start + _AT_ONCE]
        whole = [" ".join(random_.choices(words, k=length)) for length in some]
        encoded = tokenizer.encode_batch(whole, add_special_tokens=False)
        for text, encoding, length in zip(whole, encoded, some, strict=True):
            found.append(text[: encoding.offsets[min(length, len(encoding.ids)) - 1][1]])
    return found
