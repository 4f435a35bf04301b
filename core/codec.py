"""Arrays and plain values to msgpack bytes and back.

An array travels as a plain msgpack map of three keys, so that any language can read it:

    {"dtype": "<f4", "shape": [128, 384], "data": <raw little-endian bytes, C order>}

A result class (`Embeddings`, `Ranking`) travels as a map too, with its name under the key
"embedq"; `register` says which class a name stands for. Nothing here can run code or import a
module: unknown names stay plain maps, and an array may only hold the numeric types in DTYPES.
Knows nothing of Redis, Celery or the meaning of what it carries.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeVar

import msgpack
import numpy as np

#: Element types an array may have on the wire: NumPy's little-endian names. No object, string or
#: structured type, whose decoding could be made to run code or to read beside the buffer.
DTYPES = frozenset({"<f4", "<f2", "|i1", "|u1", "<i4", "<u4", "<i8", "<u8"})

#: Keys of an array on the wire.
_ARRAY_KEYS = frozenset({"dtype", "shape", "data"})

#: More dimensions than any result has; a longer shape is refused before its product is computed.
_MAX_DIMENSIONS = 4


class Wired(Protocol):
    """A result class that can travel: `to_map()` gives plain values and arrays, `from_map` undoes it.

    `from_map` gets whatever arrived, and raises ValueError if that is not what `to_map` gives.
    """

    def to_map(self) -> dict[str, Any]: ...

    @classmethod
    def from_map(cls, fields: dict[str, Any]) -> Wired: ...


_Class = TypeVar("_Class", bound=type)
_classes: dict[str, type[Wired]] = {}


def register(cls: _Class) -> _Class:
    """Let instances of `cls` travel under its lower-case name. A class decorator."""
    _classes[cls.__name__.lower()] = cls
    return cls


def pack(value: Any) -> bytes:
    """Encode `value`. TypeError for what has no form on the wire (datetimes, sets, object arrays)."""
    packed = msgpack.packb(value, default=_to_plain, use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def unpack(packed: bytes | bytearray | memoryview) -> Any:
    """Decode `packed`; arrays come back as read-only views of its bytes, without a copy of their own.

    ValueError for anything malformed. Cost is bounded by `len(packed)`: msgpack takes every length
    limit from the buffer and refuses deep nesting, and an array's bytes are already in the buffer.
    """
    try:
        return msgpack.unpackb(packed, raw=False, strict_map_key=False, object_hook=_from_plain)
    except TypeError as error:  # a map's key that is itself a map or a list
        raise ValueError(f"malformed bytes arrived: {error}") from None


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _array_to_map(value)
    if isinstance(value, np.number | np.bool_):
        return value.item()
    name = type(value).__name__.lower()
    if _classes.get(name) is type(value):
        return {"embedq": name, **value.to_map()}
    raise TypeError(f"cannot send a {type(value).__name__}; plain values, arrays and results can travel")


def _array_to_map(array: np.ndarray) -> dict[str, Any]:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if little.dtype.str not in DTYPES:
        raise TypeError(f"cannot send an array of {array.dtype}; the types that travel are {sorted(DTYPES)}")
    if array.ndim > _MAX_DIMENSIONS:
        raise TypeError(f"cannot send an array of {array.ndim} dimensions; at most {_MAX_DIMENSIONS} travel")
    return {"dtype": little.dtype.str, "shape": list(array.shape), "data": little.tobytes()}


def _from_plain(fields: dict[str, Any]) -> Any:
    if fields.keys() == _ARRAY_KEYS and isinstance(fields["data"], bytes):
        return _array_from_map(fields)
    cls = _classes.get(fields["embedq"]) if isinstance(fields.get("embedq"), str) else None
    if cls is None:
        return fields
    return cls.from_map({key: value for key, value in fields.items() if key != "embedq"})


def _array_from_map(fields: dict[str, Any]) -> np.ndarray:
    dtype, shape, data = fields["dtype"], fields["shape"], fields["data"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        given = repr(dtype)[:20] if isinstance(dtype, str) else type(dtype).__name__  # a nested list has no safe repr
        raise ValueError(f"an array of {given} arrived; the types that travel are {sorted(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"an array's shape must be a list of at most {_MAX_DIMENSIONS} lengths")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("an array's shape must hold whole numbers from 0")
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != wanted:
        raise ValueError(f"an array of shape {shape} and type {dtype} needs {wanted} bytes, not {len(data)}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
