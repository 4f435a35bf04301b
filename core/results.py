"""What a job gives back: `Embeddings` and `Ranking`. NumPy only, so that a producer can hold them.

Their repr is what logs and Flower show, so it tells the shape and never a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from core.codec import register

#: Forms a vector can have.
Dtype = Literal["float32", "float16", "int8", "ubinary"]


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Embeddings:
    """The vectors of one job, in the order of its texts. Works where an array is expected."""

    #: (num_texts, dim), dtype as asked; "ubinary" packs 8 dimensions into a byte, (num_texts, dim / 8).
    dense: np.ndarray | None = None
    #: One (num_tokens, dim) float32 array per text.
    colbert: list[np.ndarray] | None = None
    #: For int8 only: (2, dim) float32, the values that -128 and 127 stand for in each dimension.
    int8_ranges: np.ndarray | None = None
    #: Alias of the model that made them.
    model: str = ""

    def __len__(self) -> int:
        return len(self._rows())

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._rows())

    def __getitem__(self, index: Any) -> Any:
        return self._rows()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.dense is None:
            raise TypeError("these embeddings have no dense vectors; read .colbert")
        return np.array(self.dense, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        if self.dense is not None:
            shape = f"{self.dense.shape[0]} × {self.dense.shape[1]} {self.dense.dtype}"
            return shape if self.colbert is None else f"{shape} + colbert"
        return f"{len(self)} × colbert"

    def to_map(self) -> dict[str, Any]:
        """Plain values and arrays; ColBERT rows travel as one array and the offsets that cut it."""
        colbert = None
        if self.colbert is not None:
            offsets = np.cumsum([0, *map(len, self.colbert)], dtype=np.int64)
            values = np.concatenate(self.colbert) if self.colbert else np.empty((0, 0), np.float32)
            colbert = {"values": values, "offsets": offsets}
        return {"dense": self.dense, "colbert": colbert, "int8_ranges": self.int8_ranges, "model": self.model}

    @classmethod
    def from_map(cls, fields: dict[str, Any]) -> Embeddings:
        """Undo `to_map`."""
        colbert = fields.get("colbert")
        if colbert is not None:
            values, offsets = colbert["values"], colbert["offsets"]
            colbert = [values[start:end] for start, end in pairwise(offsets)]
        return cls(fields.get("dense"), colbert, fields.get("int8_ranges"), fields.get("model", ""))

    def _rows(self) -> Any:
        return self.dense if self.dense is not None else self.colbert or []


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Ranking:
    """The scores of one query's passages."""

    #: (num_passages,) float32, in the order of the passages.
    scores: np.ndarray
    #: (top_k,) indices of the passages, best first; equal scores keep the order of the passages.
    order: np.ndarray
    #: Alias of the model that scored.
    model: str = ""

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """(index of the passage, score), best first."""
        return ((int(index), float(self.scores[index])) for index in self.order)

    def __repr__(self) -> str:
        return f"best {len(self.order)} of {len(self.scores)} passages"

    def to_map(self) -> dict[str, Any]:
        """Plain values and arrays."""
        return {"scores": self.scores, "order": self.order, "model": self.model}

    @classmethod
    def from_map(cls, fields: dict[str, Any]) -> Ranking:
        """Undo `to_map`."""
        return cls(fields["scores"], fields["order"], fields.get("model", ""))
