"""The results of a job: `Embeddings` and `Ranking`. They need NumPy only, so producers can use them.

Logs and Flower show their repr, so it states shapes and never a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from embedq.core.codec import register

#: Element types of dense vectors.
Dtype = Literal["float32", "float16", "int8", "ubinary"]


#: Readable names of NumPy's element types.
_NAMES = {"<f4": "float32", "<f2": "float16", "|i1": "int8", "|u1": "uint8"}


class Sparse(NamedTuple):
    """The lexical weights of one text; each token occurs once."""

    #: (num_tokens,) int32 token ids, ascending
    ids: np.ndarray
    #: (num_tokens,) float32, above 0
    weights: np.ndarray

    def as_tokens(self, vocabulary: Mapping[int, str] | Callable[[int], str]) -> dict[str, float]:
        """The weights by token string. Of ids with the same string the largest weight counts."""
        read = vocabulary if callable(vocabulary) else vocabulary.__getitem__
        named: dict[str, float] = {}
        for token_id, weight in zip(self.ids.tolist(), self.weights.tolist(), strict=True):
            named[read(token_id)] = max(weight, named.get(read(token_id), 0.0))
        return named


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that one job spent in each stage of its worker. Excludes the time in the queue before it was fetched."""

    #: From its fetch to the start of its first batch, less its encoding until then.
    waited_s: float
    #: Encoding texts into token ids, summed over threads, which may run at once and beside batches.
    encoded_s: float
    #: From the start of its first batch to the end of its last, waits between them included.
    computed_s: float
    #: Sequences of the largest batch it was in, other jobs' included.
    batch_size: int
    #: Tokens of its sequences, without padding; equal texts count each.
    num_tokens: int
    #: Of embedq, in the worker that computed it; empty for workers before 0.2.0.
    version: str = ""

    @classmethod
    def from_map(cls, fields: Any) -> Timings | None:
        """Read what arrived as a map; None for none. Keys we do not know are a newer worker's, and left out.

        ValueError if it is no map of numbers and a version.
        """
        if fields is None:
            return None
        names = ("waited_s", "encoded_s", "computed_s", "batch_size", "num_tokens")
        given = {name: fields.get(name) for name in names} if isinstance(fields, dict) else {"": None}
        version = fields.get("version", "") if isinstance(fields, dict) else ""
        if not all(type(one) in (int, float) for one in given.values()) or not isinstance(version, str):
            raise ValueError("malformed timings arrived: not a map of numbers and a version")
        known: dict[str, Any] = {**given, "version": version}
        return cls(**known)


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Embeddings:
    """The vectors of one job, in the order of its texts. Works where an array is expected.

    Arrays that came from a worker are read-only, because they lie in the message they came in; `copy` returns one that may be
    changed. `shape`, `dtype`, `ndim`, `T`, `tolist` and `copy` are those of `dense`.
    """

    #: (num_texts, dim) of the requested dtype; "ubinary" packs 8 dimensions into a byte: (num_texts, dim / 8).
    dense: np.ndarray | None = None
    #: One (num_tokens, dim) float32 array per text.
    colbert: list[np.ndarray] | None = None
    #: One `Sparse` per text.
    sparse: list[Sparse] | None = None
    #: For int8: (2, dim) float32, the values that -128 and 127 stand for in each dimension.
    int8_ranges: np.ndarray | None = None
    #: Alias of the model that computed them.
    model: str = ""
    #: For calls with `timings=True`.
    timings: Timings | None = None
    #: Revision of that model: a hash of its files, a dot, a hash of how they are read. Empty if unknown: from workers
    #: before 0.2.0, and for models that were not loaded from files.
    revision: str = ""
    #: Arithmetic it was computed in: "bfloat16", "float32", …; empty from workers before 0.2.0.
    precision: str = ""

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

    @property
    def shape(self) -> tuple[int, ...]:
        """(num_texts, dim) of `dense`."""
        return self._array().shape

    @property
    def ndim(self) -> int:
        """2: the number of dimensions of `dense`."""
        return self._array().ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type of `dense`."""
        return self._array().dtype

    @property
    def T(self) -> np.ndarray:  # noqa: N802  # NumPy's name
        """(dim, num_texts): `dense`, transposed, without a copy."""
        return self._array().T

    def tolist(self) -> list[list[float]]:
        """`dense` as lists of Python's own numbers, one per text."""
        rows: list[list[float]] = self._array().tolist()
        return rows

    def copy(self) -> np.ndarray:
        """A copy of `dense` that may be changed."""
        return self._array().copy()

    def _array(self) -> np.ndarray:
        if self.dense is None:
            # Not TypeError as above: libraries ask by `hasattr` whether an object is like an array.
            raise AttributeError("these embeddings have no dense vectors; read .sparse or .colbert")
        return self.dense

    def __repr__(self) -> str:
        parts = [] if self.dense is None else [f"{self.dense.shape[0]} × {self.dense.shape[1]} {_name(self.dense)}"]
        parts += [name for name in ("sparse", "colbert") if getattr(self, name) is not None]
        return " + ".join(parts) if self.dense is not None else f"{len(self)} × {' + '.join(parts)}"

    def to_map(self) -> dict[str, Any]:
        """Plain values and arrays; ColBERT rows travel as one array and the offsets that cut it."""
        colbert, sparse = None, None
        if self.colbert is not None:
            colbert = {"values": _joined(self.colbert, np.empty((0, 0), np.float32)), "offsets": _offsets(self.colbert)}
        if self.sparse is not None:
            ids, weights = [one.ids for one in self.sparse], [one.weights for one in self.sparse]
            joined = _joined(ids, np.empty(0, np.int32)), _joined(weights, np.empty(0, np.float32))
            sparse = {"ids": joined[0], "weights": joined[1], "offsets": _offsets(ids)}
        return {
            "dense": self.dense,
            "colbert": colbert,
            "sparse": sparse,
            "int8_ranges": self.int8_ranges,
            "model": self.model,
            **_optional(self),
        }

    @classmethod
    def from_map(cls, fields: dict[str, Any]) -> Embeddings:
        """Rebuild from `to_map`'s fields. ValueError if it cannot have written them."""
        dense, colbert, sparse = fields.get("dense"), fields.get("colbert"), fields.get("sparse")
        ranges, model = fields.get("int8_ranges"), fields.get("model", "")
        if colbert is not None:
            colbert = list(_cut(colbert, "values", 2))
        if sparse is not None:
            cut = zip(_cut(sparse, "ids", 1), _cut(sparse, "weights", 1), strict=True)
            sparse = [Sparse(ids, weights) for ids, weights in cut]
        if not (_is_array(dense, 2) and _is_array(ranges, 2) and isinstance(model, str)):
            raise ValueError("malformed Embeddings arrived")
        return cls(dense, colbert, sparse, ranges, model, Timings.from_map(fields.get("timings")), *_origin(fields))

    def _rows(self) -> Any:
        return next((rows for rows in (self.dense, self.sparse, self.colbert) if rows is not None), [])


def _name(array: np.ndarray) -> str:
    """The readable name of its element type, from a table: NumPy would build it anew for every job's event."""
    return _NAMES.get(array.dtype.str) or array.dtype.name


def _offsets(rows: list[np.ndarray]) -> np.ndarray:
    """(num_rows + 1,): row i of the joined array is offsets[i] to offsets[i + 1]."""
    return np.cumsum([0, *map(len, rows)], dtype=np.int64)


def _joined(rows: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate(rows) if rows else empty


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Ranking:
    """The scores of one query's passages."""

    #: (num_passages,) float32 in the order of the passages; of several layers, the last one's.
    scores: np.ndarray
    #: (top_k,) indices of the passages, best first; equal scores keep the order of the passages.
    order: np.ndarray
    #: Alias of the model that scored.
    model: str = ""
    #: (num_layers, num_passages) float32, layers ascending, if the call asked for several.
    layer_scores: np.ndarray | None = None
    #: For calls with `timings=True`.
    timings: Timings | None = None
    #: Revision of that model: a hash of its files, a dot, a hash of how they are read. Empty if unknown: from workers
    #: before 0.2.0, and for models that were not loaded from files.
    revision: str = ""
    #: Arithmetic it was computed in: "bfloat16", "float32", …; empty from workers before 0.2.0.
    precision: str = ""

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Iterate over (index of the passage, score), best first."""
        return ((int(index), float(self.scores[index])) for index in self.order)

    def __repr__(self) -> str:
        return f"best {len(self.order)} of {len(self.scores)} passages"

    def to_map(self) -> dict[str, Any]:
        """Plain values and arrays."""
        return {
            "scores": self.scores,
            "order": self.order,
            "model": self.model,
            "layer_scores": self.layer_scores,
            **_optional(self),
        }

    @classmethod
    def from_map(cls, fields: dict[str, Any]) -> Ranking:
        """Rebuild from `to_map`'s fields. ValueError if it cannot have written them."""
        scores, order, model = fields.get("scores"), fields.get("order"), fields.get("model", "")
        layers = fields.get("layer_scores")
        if scores is None or order is None or not (_is_array(scores, 1) and _is_array(order, 1, "iu")):
            raise ValueError("a malformed Ranking arrived")
        if not (isinstance(model, str) and _is_array(layers, 2)):
            raise ValueError("a malformed Ranking arrived: its model is not a string, or its layers no array")
        return cls(scores, order, model, layers, Timings.from_map(fields.get("timings")), *_origin(fields))


class Scores(np.ndarray):
    """An array of scores that carries its timings; `Engine.score` returns it for calls with `timings=True`."""

    timings: Timings | None = None


def timed(result: Any, timings: Timings) -> Any:
    """Return `result` with its timings."""
    if isinstance(result, np.ndarray):
        scores = result.view(Scores)
        scores.timings = timings
        return scores
    return replace(result, timings=timings)


#: Fields of a result that say how its numbers were made, in the order of both classes.
_ORIGIN = ("revision", "precision")


def _optional(result: Embeddings | Ranking) -> dict[str, Any]:
    """The fields of timings, revision and precision; left out if empty, so that other results are no larger."""
    timings = {"timings": asdict(result.timings)} if result.timings else {}
    return timings | {name: value for name in _ORIGIN if (value := getattr(result, name))}


def _origin(fields: dict[str, Any]) -> list[str]:
    """Revision and precision that arrived, empty from a worker that does not send them. ValueError if they are no strings."""
    found = [fields.get(name, "") for name in _ORIGIN]
    if not all(isinstance(one, str) for one in found):
        raise ValueError(f"a malformed {' or '.join(_ORIGIN)} arrived: not a string")
    return found


def _is_array(value: Any, num_dimensions: int, kinds: str = "fiu") -> bool:
    """Returns True for None, and for an array of that many dimensions and one of those kinds of numbers."""
    return value is None or (
        isinstance(value, np.ndarray) and value.ndim == num_dimensions and value.dtype.kind in kinds
    )


def _cut(joined: Any, name: str, num_dimensions: int) -> Iterator[np.ndarray]:
    """The rows of each text, cut by the offsets from the joined array of that name. ValueError if it is malformed."""
    values, offsets = (joined.get(name), joined.get("offsets")) if isinstance(joined, dict) else (None, None)
    if values is None or offsets is None or not (_is_array(values, num_dimensions) and _is_array(offsets, 1, "iu")):
        raise ValueError(f"malformed Embeddings arrived: {name} are not an array and its offsets")
    return (values[start:end] for start, end in pairwise(offsets))
