"""The engine's answers for a part, gathered row by row, and the columns they become in the part's object.

Equal texts of a part are one row here, computed once and written wherever they occur. Not thread-safe: one part, one thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from embedq.core.results import Embeddings

if TYPE_CHECKING:
    import pyarrow

DENSE, SPARSE_IDS, SPARSE_WEIGHTS, COLBERT, SCORE = "dense", "sparse_ids", "sparse_weights", "colbert", "score"


class Computed:
    """The answers for up to `max_rows` different texts or pairs, each at its place."""

    def __init__(self, max_rows: int, kind: str, outputs: tuple[str, ...], dtype: str, width: int) -> None:
        """`width` is that of a dense vector in elements of `dtype`."""
        self._max_rows = max_rows
        self._width = width
        self._outputs = outputs if kind == "embed" else (SCORE,)
        self._dtype = dtype
        self._dense: np.ndarray | None = None
        self._scores = np.empty(max_rows if kind == "rerank" else 0, np.float32)
        self._sparse: dict[int, Any] = {}
        self._colbert: dict[int, np.ndarray] = {}

    def add(self, places: list[int], answer: Any) -> None:
        """Take an answer's rows, whose places these are."""
        if not isinstance(answer, Embeddings):
            self._scores[places] = answer
            return
        if answer.dense is not None:
            if self._dense is None:
                self._dense = np.empty((self._max_rows, answer.dense.shape[1]), answer.dense.dtype)
            self._dense[places] = answer.dense
        self._sparse.update(zip(places, answer.sparse or (), strict=False))
        self._colbert.update(zip(places, answer.colbert or (), strict=False))

    @property
    def what(self) -> str:
        """For people: "1024 float16", "score"."""
        if self._dense is None:
            return " + ".join(self._outputs)
        more = "".join(f" + {one}" for one in self._outputs if one != DENSE)
        return f"{self._dense.shape[1]} {self._dense.dtype}{more}"

    def columns(self, places: np.ndarray) -> dict[str, pyarrow.Array]:
        """The columns of rows whose answers lie at these places; -1 for a row without one, which becomes null."""
        made: dict[str, Any] = {}
        if SCORE in self._outputs:
            made[SCORE] = _scores(self._scores, places)
        if DENSE in self._outputs:
            made[DENSE] = _dense(self._dense, places, self._dtype, self._width)
        if "sparse" in self._outputs:
            made |= _sparse(self._sparse, places)
        if COLBERT in self._outputs:
            made[COLBERT] = _colbert(self._colbert, places, self._dtype)
        return made


def _scores(scores: np.ndarray, places: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.array(scores[np.maximum(places, 0)], mask=places < 0)


def _dense(rows: np.ndarray | None, places: np.ndarray, dtype: str, width: int) -> Any:
    import pyarrow as pa

    if rows is None:  # no row of the part has a vector
        return pa.nulls(len(places), pa.list_(_element(dtype), width))
    chosen = rows[np.maximum(places, 0)]
    chosen[places < 0] = 0
    values = pa.array(chosen.reshape(-1))
    mask = pa.array(places < 0) if (places < 0).any() else None
    return pa.FixedSizeListArray.from_arrays(values, rows.shape[1], mask=mask)


def _element(dtype: str) -> Any:
    import pyarrow as pa

    return {"float32": pa.float32(), "float16": pa.float16(), "ubinary": pa.uint8()}[dtype]


def _sparse(rows: dict[int, Any], places: np.ndarray) -> dict[str, Any]:
    chosen = [rows.get(place) for place in places.tolist()]
    ids = [None if one is None else one.ids for one in chosen]
    weights = [None if one is None else one.weights for one in chosen]
    return {SPARSE_IDS: _lists(ids, np.int32), SPARSE_WEIGHTS: _lists(weights, np.float32)}


def _colbert(rows: dict[int, np.ndarray], places: np.ndarray, dtype: str) -> Any:
    import pyarrow as pa

    as_type = np.float16 if dtype == "float16" else np.float32
    chosen = [rows.get(place) for place in places.tolist()]
    width = next((one.shape[1] for one in chosen if one is not None), 1)
    joined = np.concatenate([np.empty((0, width), as_type), *(one for one in chosen if one is not None)])
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(joined.astype(as_type, copy=False).reshape(-1)), width)
    return pa.ListArray.from_arrays(_offsets(chosen), tokens, mask=_mask(chosen))


def _lists(rows: list[np.ndarray | None], kind: Any) -> Any:
    import pyarrow as pa

    joined = np.concatenate([np.empty(0, kind), *(one for one in rows if one is not None)]).astype(kind, copy=False)
    return pa.ListArray.from_arrays(_offsets(rows), pa.array(joined), mask=_mask(rows))


def _offsets(rows: list[Any]) -> Any:
    import pyarrow as pa

    return pa.array(np.cumsum([0, *(0 if one is None else len(one) for one in rows)], dtype=np.int32))


def _mask(rows: list[Any]) -> Any:
    import pyarrow as pa

    missing = [one is None for one in rows]
    return pa.array(missing) if any(missing) else None
