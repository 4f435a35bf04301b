"""The special tokens that a checkpoint puts around a text or a pair: found out once, and put there by us."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from tokenizers import Tokenizer

from embedq.core.errors import CannotLoadModel
from embedq.core.sequence import Tokens

#: A word that stands in for a text where only the special tokens around it are wanted.
_WORD = "a"


@dataclass(frozen=True, slots=True)
class Frame:
    """The special tokens around one text or a pair, as runs: before, between, after.

    Joining is done here because the Rust side, given a cut text, also joins everything that was cut
    off: with two long texts each piece of the one with each piece of the other.
    """

    ids: list[list[int]]
    type_ids: list[list[int]]
    #: Segment of each text's tokens.
    text_types: list[int]

    def around(self, rows: Sequence[tuple[list[int], ...]]) -> list[Tokens]:
        """Each row's texts between the special tokens.

        All lie in one array, of which each row has its part: an array for each would take longer than its tokens.
        """
        runs: list[list[int]] = []
        ends, num_special = [0], self.num_tokens
        for texts in rows:
            runs.append(self.ids[0])
            for text, behind in zip(texts, self.ids[1:], strict=True):
                runs += (text, behind)
            ends.append(ends[-1] + num_special + sum(map(len, texts)))
        all_ids = np.fromiter(chain.from_iterable(runs), np.int32, ends[-1])
        all_types = self._types(rows, ends[-1])
        return [Tokens(all_ids[start:end], all_types[start:end]) for start, end in pairwise(ends)]

    def _types(self, rows: Sequence[tuple[list[int], ...]], num_tokens: int) -> np.ndarray:
        """The segments of all rows' tokens, from those of one row: a text's for as many tokens as it has."""
        of_row, places = [*self.type_ids[0]], []
        for of_text, behind in zip(self.text_types, self.type_ids[1:], strict=True):
            places.append(len(of_row))
            of_row += [of_text, *behind]
        if not any(of_row):
            return np.zeros(num_tokens, np.int32)
        times = np.ones((len(rows), len(of_row)), np.int64)
        times[:, places] = np.reshape([len(text) for texts in rows for text in texts], (len(rows), len(places)))
        return np.repeat(np.tile(np.array(of_row, np.int32), len(rows)), times.ravel())

    def ended_by(self, end: list[int]) -> Frame:
        """The same with `end` behind all; its tokens count as segment 0."""
        types = [*self.type_ids[:-1], self.type_ids[-1] + [0] * len(end)]
        return Frame([*self.ids[:-1], self.ids[-1] + end], types, self.text_types)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))


def read_frame(rust: Tokenizer, num_texts: int) -> Frame:
    """Find out what the checkpoint puts around texts, by letting it do so to a word."""
    word = rust.encode(_WORD, add_special_tokens=False)
    framed = rust.post_process(word, word if num_texts == 2 else None, True)
    ids, types = framed.ids, framed.type_ids
    plain = [index for index, is_special in enumerate(framed.special_tokens_mask) if not is_special]
    if not word.ids or len(plain) != num_texts * len(word.ids):
        raise CannotLoadModel(
            f"the tokenizer gives no tokens for {_WORD!r}, so its special tokens cannot be told apart"
        )
    starts = plain[:: len(word.ids)]
    ends = [start + len(word.ids) for start in starts]
    runs = [slice(start, end) for start, end in zip([0, *ends], [*starts, len(ids)], strict=True)]
    return Frame([ids[run] for run in runs], [types[run] for run in runs], [types[start] for start in starts])
