"""Encodes arrays, results and plain values as msgpack bytes, and decodes them.

An array travels as a plain msgpack map of three keys, so that any language can read it:

    {"dtype": "<f4", "shape": [128, 384], "data": <raw little-endian bytes, C order>}

In JSON, for senders that have no msgpack, `data` is base64 (`json_form`).

A result class (`Embeddings`, `Ranking`) travels as a map too, with its name under the key
"embedq"; `register` maps names to classes. Types that msgpack lacks travel as kombu's JSON writes
them, {"__type__": "decimal", "__value__": "1.5"}: see `_TYPES`. Nothing here can run code
or import a module: unknown names stay plain maps, and an array may only hold the numeric types in DTYPES.
Knows nothing of Redis, Celery or the meaning of what it carries.
"""

from __future__ import annotations

import json
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Protocol, TypeVar
from uuid import UUID

import msgpack
import numpy as np

#: Element types of arrays on the wire: NumPy's little-endian names. No object, string or structured type: decoding
#: those could run code or read outside the buffer.
DTYPES = frozenset({"<f4", "<f2", "|i1", "|u1", "<i4", "<u4", "<i8", "<u8"})

#: Keys of an array on the wire.
_ARRAY_KEYS = frozenset({"dtype", "shape", "data"})

#: Keys of a value of one of `_TYPES`.
_TYPE_KEYS = frozenset({"__type__", "__value__"})

#: Whole numbers that msgpack can write; a larger one travels in hexadecimal digits, which Python reads in linear time.
_MIN_INTEGER, _MAX_INTEGER = -(2**63), 2**64 - 1

#: Types beyond msgpack's: the name on the wire, how a value is written and read. The names and forms are those of
#: kombu's JSON, so that an application may change its serializer and keep its arguments; sets and whole numbers of more
#: than 64 bits are ours. A datetime is a date, too, and must be looked for first.
_TYPES: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    datetime: ("datetime", datetime.isoformat, datetime.fromisoformat),
    date: ("date", date.isoformat, lambda written: datetime.fromisoformat(written).date()),
    time: ("time", time.isoformat, time.fromisoformat),
    Decimal: ("decimal", str, Decimal),
    UUID: ("uuid", lambda value: {"hex": value.hex}, lambda written: UUID(hex=written["hex"])),
    set: ("set", list, set),
    frozenset: ("frozenset", list, frozenset),
}
_DECODERS = {marker: decode for marker, _, decode in _TYPES.values()} | {"int": lambda written: int(written, 16)}

#: Most dimensions of an array; a longer shape is refused before its product is computed.
_MAX_DIMENSIONS = 4


class Wired(Protocol):
    """A result class that can travel: `to_map()` returns plain values and arrays, `from_map` rebuilds the result.

    `from_map` gets whatever arrived, and raises ValueError if `to_map` cannot have written it.
    """

    def to_map(self) -> dict[str, Any]: ...

    @classmethod
    def from_map(cls, fields: dict[str, Any]) -> Wired: ...


_Class = TypeVar("_Class", bound=type)
_classes: dict[str, type[Wired]] = {}


def register(cls: _Class) -> _Class:
    """Register `cls` under its lower-case name, so that its instances can be encoded. A class decorator.

    kombu's JSON encodes them as well, by the method that it looks for.
    """
    _classes[cls.__name__.lower()] = cls
    cls.__json__ = json_form  # type: ignore[attr-defined]
    return cls


def pack(value: Any) -> bytes:
    """Encode `value`. TypeError for types without a form on the wire (object arrays, instances of other classes).

    A subclass of a plain type travels as that type, by what iterating over it yields. Its length may differ from
    that: the length of Celery's `group`, a dict, is its number of tasks, and its lazy lists begin empty. Packed as the
    dict and list they are, both gave bytes that nobody can read.
    """
    packed = msgpack.packb(value, default=_to_plain, use_bin_type=True, strict_types=True)
    assert isinstance(packed, bytes)
    return packed


def json_form(value: Any) -> Any:
    """`value` as JSON can write it: an array's `data` in base64, all else as kombu's JSON writes it.

    TypeError as `pack`.
    """
    if isinstance(value, bytes | bytearray):
        return b64encode(value).decode()
    if isinstance(value, Mapping):
        return {key: json_form(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_form(one) for one in value]
    if value is None or type(value) in (bool, str, float) or isinstance(value, int):
        return value
    return json_form(_to_plain(value))


def unpack(packed: bytes | bytearray | memoryview) -> Any:
    """Decode `packed`; arrays are read-only views of its bytes, not copies.

    ValueError for anything malformed. `len(packed)` bounds the cost: msgpack limits every length by the buffer and
    refuses deep nesting, and an array's bytes are already in the buffer.
    """
    try:
        return msgpack.unpackb(packed, raw=False, strict_map_key=False, object_hook=_from_plain)
    except TypeError as error:  # a map's key that is itself a map or a list
        raise ValueError(f"malformed bytes arrived: {error}") from None


def unpack_json(text: bytes) -> Any:
    """Decode what `json_form` wrote. ValueError for anything malformed."""
    return json.loads(text, object_hook=_from_json)


def _from_json(fields: dict[str, Any]) -> Any:
    if fields.keys() == _ARRAY_KEYS and isinstance(fields["data"], str):
        fields = fields | {"data": b64decode(fields["data"], validate=True)}
    return _from_plain(fields)


def _to_plain(value: Any) -> Any:
    """The next plainer form of what msgpack cannot write as it is: it comes back here until nothing is left to do."""
    if isinstance(value, tuple | list):
        return [*value]
    if isinstance(value, np.ndarray):
        return _array_to_map(value)
    if isinstance(value, np.number | np.bool_):
        return value.item()
    name = type(value).__name__.lower()
    if _classes.get(name) is type(value):
        return {"embedq": name, **value.to_map()}
    for cls, (marker, encode, _) in _TYPES.items():
        if isinstance(value, cls):
            return {"__type__": marker, "__value__": encode(value)}
    if isinstance(value, Mapping):
        return {key: value[key] for key in value}
    return _base_value(value)


def _base_value(value: Any) -> Any:
    """A subclass of a scalar type as that type; what a class writes of itself for JSON."""
    scalars: tuple[type[Any], ...] = (str, float, bytes, bytearray)
    for base in scalars:
        if isinstance(value, base):
            return base(value)
    if isinstance(value, int):  # also a plain one that needs more than 64 bits
        return int(value) if _MIN_INTEGER <= value <= _MAX_INTEGER else {"__type__": "int", "__value__": hex(value)}
    if callable(getattr(type(value), "__json__", None)):
        return value.__json__()
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
    if fields.keys() == _TYPE_KEYS:
        return _type_from_map(fields)
    cls = _classes.get(fields["embedq"]) if isinstance(fields.get("embedq"), str) else None
    if cls is None:
        return fields
    return cls.from_map({key: value for key, value in fields.items() if key != "embedq"})


def _type_from_map(fields: dict[str, Any]) -> Any:
    """ValueError where the value is not what its type is written as."""
    marker, written = fields["__type__"], fields["__value__"]
    decode = _DECODERS.get(marker) if isinstance(marker, str) else None
    if decode is None:
        return fields
    try:
        return decode(written)
    except (ValueError, TypeError, ArithmeticError, KeyError, AttributeError):
        raise ValueError(f"malformed bytes arrived: no {marker}") from None  # the value may be a text


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
