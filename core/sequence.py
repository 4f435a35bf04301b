"""What travels from encoding to the forward pass: token ids, what is wanted of them, and whose rows they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Tokens:
    """One checked sequence: no longer than its model allows, special tokens included."""

    #: (num_tokens,) int32
    ids: np.ndarray
    #: (num_tokens,) int32 segment of each token, 0 for the first text of a pair and 1 for the second;
    #: None for models that know no segments.
    type_ids: np.ndarray | None = None
    #: For models that treat the parts of a pair differently: tokens at the start that belong to the
    #: query, and at the end that belong to the prompt.
    num_query_tokens: int = 0
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a forward pass shall give. Sequences share a batch only if they want the same."""

    #: Of "dense", "sparse", "colbert", "score".
    outputs: frozenset[str]
    #: Layers whose scores are wanted, ascending; empty for a model's last one.
    cutoff_layers: tuple[int, ...] = ()
    #: For each of them the layer whose head reads its state; empty for its own.
    head_layers: tuple[int, ...] = ()
    #: Layers before which passages are compressed, and how many tokens become one.
    compress_layers: tuple[int, ...] = ()
    compress_ratio: int = 1
    #: Made once: sequences are looked up by what is wanted of them, each several times.
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = self.outputs, self.cutoff_layers, self.head_layers, self.compress_layers, self.compress_ratio
        object.__setattr__(self, "_hash", hash(parts))

    def __hash__(self) -> int:
        return self._hash


#: A model's alias, and what it must give: sequences share a batch only if they have the same.
Key = tuple[str, Wanted]


@dataclass(slots=True, eq=False)
class Sequence:
    """One tokenized text, or one query-passage pair. Identical ones of several jobs are one sequence."""

    tokens: Tokens
    #: Alias of the model it is for.
    model: str = ""
    wanted: Wanted = Wanted(frozenset())
    #: Bulk work yields to interactive work.
    is_bulk: bool = False
    #: What it is found by among those in flight; two of one key with the same have the same rows.
    identity: Any = None
    #: The job and the row of it that this answers; several if jobs in flight hold the same text.
    #: The scheduler never looks at them.
    rows: list[tuple[Any, int]] = field(default_factory=list)
    #: Tokens it has.
    length: int = field(init=False)
    #: Only sequences of one key share a batch.
    key: Key = field(init=False)

    def __post_init__(self) -> None:
        self.length, self.key = len(self.tokens.ids), (self.model, self.wanted)


def num_computed_tokens(batch: list[Sequence], is_padded: bool) -> int:
    """Tokens of a pass over `batch`: where it is padded, all are as long as the longest."""
    lengths = [sequence.length for sequence in batch]
    return max(lengths) * len(batch) if is_padded else sum(lengths)
