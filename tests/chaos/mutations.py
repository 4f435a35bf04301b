"""Messages that are nearly jobs: real ones, changed in every way that a program may get them wrong.

In go messages as producers sent them and a seeded random; out come bytes for a list, each with a kind.
Every message has an id and a delivery tag of its own, unless it is these that were changed.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
import uuid
import zlib
from collections.abc import Callable
from typing import Any

import msgpack

Message = dict[str, Any]

#: In place of anything, anywhere.
_ODD: list[Any] = [
    None, True, 0, -1, 7, 2**31, 2**63, -(2**63), 10**40, 0.5, 1e308, float("nan"), float("inf"), "", "x", "0", "None", "\x00",
    "\ud800", "é" * 50, "x" * 10_000, "../../etc", "tasks.rerank", "celery.chord", "celery.map", "2020-01-01T00:00:00",
    "2020-01-01", "24:00", [], [None], [[]], [[[]]], [1, 2], ["x", "y", "z"], {}, {"x": None}, {"": {}}, {"task": "x"},
    {"task": "tasks.embed", "args": 5, "options": {}}, [{"task": "tasks.embed"}], list(range(1000)),
]  # fmt: skip

#: What a header or property may be called; some are in no message of ours.
_NAMES = [
    "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id", "parent_id",
    "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps", "meth",
    "compression", "delivery_tag", "priority", "delivery_mode", "body_encoding", "correlation_id", "reply_to",
    "delivery_info", "exchange", "routing_key", "redelivered", "body", "content-type", "content-encoding", "headers",
    "properties", "callbacks", "errbacks", "chain", "chord", "args", "kwargs", "embed", "taskset", "utc", "method",
]  # fmt: skip


class Mutations:
    """Changes `samples`: messages as bytes, all with msgpack bodies."""

    def __init__(self, samples: list[bytes], seed: int) -> None:
        self._samples = samples
        self._random = random.Random(seed)
        self._kinds: dict[str, Callable[[], bytes]] = {
            "raw bytes": self._raw,
            "cut off": self._cut,
            "bytes changed": self._changed_bytes,
            "a field missing": self._missing,
            "a field of another type": self._wrong_type,
            "a field too many": self._added,
            "deep nesting": self._nested,
            "huge numbers": self._huge,
            "body: another shape": self._body_shape,
            "body: an argument changed": self._body_argument,
            "body: what follows changed": self._body_embed,
            "body: bytes changed": self._body_bytes,
            "compression": self._compression,
            "content type": self._content_type,
        }

    def __call__(self) -> tuple[str, bytes]:
        """The next message, and its kind."""
        kind = self._random.choice(list(self._kinds))
        return kind, self._kinds[kind]()

    def fresh(self) -> Message:
        """A real message with an id and a tag of its own."""
        message: Message = json.loads(self._random.choice(self._samples))
        job_id = str(uuid.UUID(int=self._random.getrandbits(128)))
        message["headers"] |= {"id": job_id, "root_id": job_id}
        message["properties"] |= {"delivery_tag": job_id, "correlation_id": job_id}
        return message

    def _raw(self) -> bytes:
        return self._random.randbytes(self._random.choice([0, 1, 10, 100, 2000]))

    def _cut(self) -> bytes:
        raw = _dump(self.fresh())
        return raw[: self._random.randrange(len(raw))]

    def _changed_bytes(self) -> bytes:
        return self._damage(_dump(self.fresh()))

    def _missing(self) -> bytes:
        message = self.fresh()
        part, name = self._field(message)
        del part[name]
        return _dump(message)

    def _wrong_type(self) -> bytes:
        message = self.fresh()
        part, name = self._field(message)
        part[name] = self._odd()
        return _dump(message)

    def _added(self) -> bytes:
        message = self.fresh()
        part = self._random.choice(_parts(message))
        part[self._random.choice(_NAMES)] = self._odd()
        return _dump(message)

    def _nested(self) -> bytes:
        depth = self._random.choice([50, 500, 900, 1500, 20_000])
        opening, closing = self._random.choice([("[", "]"), ('{"a":', "}")])
        nested = opening * depth + "1" + closing * depth
        message = self.fresh()
        part, name = self._field(message)
        if self._random.random() < 0.5:
            part[name] = "NESTED"
            return _dump(message).replace(b'"NESTED"', nested.encode())
        body: Any = 1
        for _ in range(min(depth, 1000)):
            body = [body] if opening == "[" else {"a": body}
        packed = msgpack.packb([[body], {}, {}]) if depth < 500 else b"\x91" * depth + b"\x01"
        return _dump(_with_body(message, packed))

    def _huge(self) -> bytes:
        message = self.fresh()
        part, name = self._field(message)
        part[name] = "HUGE"
        number = self._random.choice(
            [b"1e999", b"-1e999", b"9" * 400, b"9" * 5000, b"1" + b"0" * 30, b"1e-999", b"Infinity"]
        )
        return _dump(message).replace(b'"HUGE"', number)

    def _body_shape(self) -> bytes:
        good = [["a text"], {}, {}]
        odd = [self._odd(), good[:2], [*good, 1], [good], {"args": [], "kwargs": {}}, [{}, [], {}], [None] * 3, "abc"]
        return _dump(_with_body(self.fresh(), _pack(self._random.choice(odd))))

    def _body_argument(self) -> bytes:
        message = self.fresh()
        args, kwargs, embed = _body(message)
        names = [
            "texts",
            "query",
            "model",
            "dtype",
            "outputs",
            "dimensions",
            "instruction",
            "max_length",
            "priority",
            "self",
        ]
        if args and self._random.random() < 0.5:
            args[self._random.randrange(len(args))] = self._odd()
        else:
            kwargs[self._random.choice(names)] = self._odd()
        return _dump(_with_body(message, _pack([args, kwargs, embed])))

    def _body_embed(self) -> bytes:
        message = self.fresh()
        args, kwargs, embed = _body(message)
        embed = {**(embed or {}), self._random.choice(["callbacks", "errbacks", "chain", "chord"]): self._odd()}
        return _dump(_with_body(message, _pack([args, kwargs, embed])))

    def _body_bytes(self) -> bytes:
        message = self.fresh()
        return _dump(message | {"body": base64.b64encode(self._damage(base64.b64decode(message["body"]))).decode()})

    def _compression(self) -> bytes:
        message = self.fresh()
        codecs: list[tuple[str, Callable[[bytes], bytes]]] = [("application/x-gzip", _gzip), ("application/zstd", zlib.compress),
                                           ("gzip", zlib.compress), ("zstd", _gzip), ("lzma", zlib.compress)]  # fmt: skip
        name, codec = self._random.choice(codecs)
        plain = self._random.choice([_pack([["a text"], {}, {}]), bytes(50_000_000), b"\x91" * 100_000])
        packed = codec(plain)
        if self._random.random() < 0.7:
            packed = packed[: self._random.randrange(len(packed))]
        message["headers"]["compression"] = name
        return _dump(_with_body(message, packed))

    def _content_type(self) -> bytes:
        odd = [
            "application/json",
            "application/x-python-serialize",
            "application/x-msgpack",
            "pickle",
            "text/plain",
            "yaml",
            5,
            None,
        ]
        message = self.fresh() | {"content-type": self._random.choice(odd)}
        if self._random.random() < 0.5:
            message["content-encoding"] = self._random.choice(["utf-8", "binary", "rot13", "idna", "zlib", 5, None])
        return _dump(message)

    def _field(self, message: Message) -> tuple[Message, str]:
        part = self._random.choice([part for part in _parts(message) if part])
        return part, self._random.choice(list(part))

    def _odd(self) -> Any:
        return self._random.choice(_ODD)

    def _damage(self, raw: bytes) -> bytes:
        damaged = bytearray(raw)
        for _ in range(self._random.choice([1, 1, 2, 10])):
            place = self._random.randrange(len(damaged) + 1)
            length = self._random.choice([1, 1, 4, 100])
            damaged[place : place + self._random.choice([0, length])] = self._random.randbytes(
                self._random.choice([0, 1, length])
            )
        return bytes(damaged)


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # else the time would be in it


def _parts(message: Message) -> list[Message]:
    """The maps of a message whose fields mean something."""
    properties = message["properties"]
    return [message, message["headers"], message["headers"], properties, properties["delivery_info"]]


def _body(message: Message) -> list[Any]:
    body: list[Any] = msgpack.unpackb(base64.b64decode(message["body"]))
    return body


def _with_body(message: Message, body: bytes) -> Message:
    return message | {"body": base64.b64encode(body).decode()}


def _pack(value: Any) -> bytes:
    try:
        return msgpack.packb(value)
    except (OverflowError, UnicodeEncodeError):  # msgpack has no such number, no such text
        return b"\xcf" + b"\xff" * 8


def _dump(message: Message) -> bytes:
    return json.dumps(message).encode()
