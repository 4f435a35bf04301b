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
        """Undo `to_map`. ValueError if `fields` are not what it gives."""
        dense, colbert, ranges = fields.get("dense"), fields.get("colbert"), fields.get("int8_ranges")
        model = fields.get("model", "")
        if colbert is not None:
            colbert = _cut(colbert)
        if not (_is_array(dense, 2) and _is_array(ranges, 2) and isinstance(model, str)):
            raise ValueError("malformed Embeddings arrived")
        return cls(dense, colbert, ranges, model)

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
        """Undo `to_map`. ValueError if `fields` are not what it gives."""
        scores, order, model = fields.get("scores"), fields.get("order"), fields.get("model", "")
        if scores is None or order is None or not (_is_array(scores, 1) and _is_array(order, 1, "iu")):
            raise ValueError("a malformed Ranking arrived")
        if not isinstance(model, str):
            raise ValueError("a malformed Ranking arrived: its model is not a string")
        return cls(scores, order, model)


def _is_array(value: Any, num_dimensions: int, kinds: str = "fiu") -> bool:
    """Whether `value` is None or an array of that many dimensions and one of those kinds of numbers."""
    return value is None or (
        isinstance(value, np.ndarray) and value.ndim == num_dimensions and value.dtype.kind in kinds
    )


def _cut(colbert: Any) -> list[np.ndarray]:
    """The rows of each text, from one array and the offsets that cut it. ValueError if it is neither."""
    values, offsets = (colbert.get("values"), colbert.get("offsets")) if isinstance(colbert, dict) else (None, None)
    if values is None or offsets is None or not (_is_array(values, 2) and _is_array(offsets, 1, "iu")):
        raise ValueError("malformed Embeddings arrived: the ColBERT rows are not an array and its offsets")
    return [values[start:end] for start, end in pairwise(offsets)]
