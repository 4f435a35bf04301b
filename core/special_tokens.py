"""The special tokens a checkpoint adds. We read the template once at load and apply it ourselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from tokenizers import Tokenizer

from embedq.core.errors import CannotLoadModel
from embedq.core.sequence import Tokens

#: A text that every tokenizer knows; it is encoded to read the special tokens around it.
_WORD = "a"


@dataclass(frozen=True, slots=True)
class Frame:
    """The special tokens around one text or a pair, as runs: before, between, after.

    We join texts and special tokens here because the Rust tokenizer, given a truncated text, also joins everything it
    cut off: with two long texts each piece of the one with each piece of the other.
    """

    ids: list[list[int]]
    type_ids: list[list[int]]
    #: Segment of each text's tokens.
    text_types: list[int]

    def around(self, rows: Sequence[tuple[list[int], ...]]) -> list[Tokens]:
        """Join each row's texts with the special tokens.

        All rows are views of one array: an array for each would take longer than its tokens.
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
        """The segment ids of all rows' tokens: the template's, a text's repeated for each of its tokens."""
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
        """This frame with the tokens `end` after everything else, as segment 0."""
        types = [*self.type_ids[:-1], self.type_ids[-1] + [0] * len(end)]
        return Frame([*self.ids[:-1], self.ids[-1] + end], types, self.text_types)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))


def read_frame(rust: Tokenizer, num_texts: int) -> Frame:
    """Read the checkpoint's template by encoding one word with it. CannotLoadModel if the word has no tokens."""
    word = rust.encode(_WORD, add_special_tokens=False)
    framed = rust.post_process(word, word if num_texts == 2 else None, True)
    ids, types = framed.ids, framed.type_ids
    plain = [index for index, is_special in enumerate(framed.special_tokens_mask) if not is_special]
    if not word.ids or len(plain) != num_texts * len(word.ids):
        raise CannotLoadModel(
            f"the tokenizer encodes {_WORD!r} into no tokens, so its special tokens cannot be recognised"
        )
    starts = plain[:: len(word.ids)]
    ends = [start + len(word.ids) for start in starts]
    runs = [slice(start, end) for start, end in zip([0, *ends], [*starts, len(ids)], strict=True)]
    return Frame([ids[run] for run in runs], [types[run] for run in runs], [types[start] for start in starts])
