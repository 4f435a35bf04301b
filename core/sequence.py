"""Sequences on their way from encoding to the forward pass: token ids, requested outputs, and their jobs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of one text or pair, special tokens included; no longer than the model allows."""

    #: (num_tokens,) int32
    ids: np.ndarray
    #: (num_tokens,) int32 segment of each token, 0 for the first text of a pair and 1 for the second;
    #: None for models that know no segments.
    type_ids: np.ndarray | None = None
    #: For models that treat the parts of a pair differently: how many tokens at the start are the query's, and how
    #: many at the end the prompt's.
    num_query_tokens: int = 0
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """The outputs and layers requested of a forward pass. Sequences share a batch only if these are equal."""

    #: Of "dense", "sparse", "colbert", "score".
    outputs: frozenset[str]
    #: Layers whose scores to return, ascending; empty for a model's last one.
    cutoff_layers: tuple[int, ...] = ()
    #: For each of them the layer whose head reads its state; empty if each layer's own head does.
    head_layers: tuple[int, ...] = ()
    #: Layers before which to compress passages, and how many tokens become one.
    compress_layers: tuple[int, ...] = ()
    compress_ratio: int = 1
    #: Computed once, because each sequence is looked up by it several times.
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = self.outputs, self.cutoff_layers, self.head_layers, self.compress_layers, self.compress_ratio
        object.__setattr__(self, "_hash", hash(parts))

    def __hash__(self) -> int:
        return self._hash


#: A model's alias and the request: only sequences with equal keys share a batch.
Key = tuple[str, Wanted]


@dataclass(slots=True, eq=False)
class Sequence:
    """One tokenized text, or one query-passage pair. Equal ones of several jobs are one sequence."""

    tokens: Tokens
    #: Alias of the model it is for.
    model: str = ""
    wanted: Wanted = Wanted(frozenset())
    #: Whether it is bulk work, which yields to interactive work.
    is_bulk: bool = False
    #: Two sequences of one key with equal identities have the same rows, so they are computed once.
    identity: Any = None
    #: The (job, row) pairs that its result answers; several if jobs in flight hold the same text. The scheduler never
    #: reads them.
    rows: list[tuple[Any, int]] = field(default_factory=list)
    #: Number of tokens.
    length: int = field(init=False)
    #: Only sequences of one key share a batch.
    key: Key = field(init=False)

    def __post_init__(self) -> None:
        self.length, self.key = len(self.tokens.ids), (self.model, self.wanted)


def num_computed_tokens(batch: list[Sequence], is_padded: bool) -> int:
    """Tokens that a pass over `batch` computes: longest x count if padded, otherwise their sum."""
    lengths = [sequence.length for sequence in batch]
    return max(lengths) * len(batch) if is_padded else sum(lengths)
