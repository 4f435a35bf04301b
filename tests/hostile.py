"""What somebody with access to the server may leave there, and a way to notice that it was run."""

from __future__ import annotations

import base64
import json
import os
import pickle
from pathlib import Path
from typing import Any


class Trap:
    """Unpickled anywhere, it makes a directory: the sign that something was run."""

    def __init__(self, directory: Path) -> None:
        self._sign = directory / "sprung"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._sign),)

    @property
    def is_sprung(self) -> bool:
        return self._sign.exists()

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(self)


PICKLE = "application/x-python-serialize"

PING = json.dumps({"method": "ping", "arguments": {}}).encode()


def message(body: bytes, content_type: str = "application/json", **changes: Any) -> bytes:
    """A message as kombu writes it to a channel, with changes of its headers, properties or the whole."""
    properties = {"delivery_tag": "tag", "body_encoding": "base64", "priority": 0,
                  "delivery_info": {"exchange": "", "routing_key": ""}}  # fmt: skip
    whole = {
        "body": base64.b64encode(body).decode(),
        "content-type": content_type,
        "content-encoding": "utf-8" if content_type == "application/json" else "binary",
        "headers": {"clock": 1, "expires": 0},
        "properties": properties | changes.pop("properties", {}),
    }
    return json.dumps(whole | changes).encode()


def command(**fields: Any) -> bytes:
    """A command of remote control."""
    return message(json.dumps({"method": "ping", "arguments": {}} | fields).encode())


def _named(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes whose names are no identifiers."""
    return changes


#: Messages to workers' ears that make no sense, by what is wrong with them.
COMMANDS: dict[str, bytes] = {
    "nested beyond reason": b"[" * 100_000,
    "no JSON": b"\xff\xfe",
    "a list": b"[1]",
    "a number": b"7",
    "no properties": b'{"body": "x"}',
    "properties that are a list": b'{"properties": [], "body": "x"}',
    "no base64": message(PING).replace(b'"body": "', b'"body": "a'),
    "an unknown body encoding": message(PING, properties={"body_encoding": "rot13"}),
    "a type nobody knows": message(PING, "application/x-unknown"),
    "a type that is a number": message(PING, **_named({"content-type": 7})),
    "an encoding that is a number": message(PING, **_named({"content-encoding": 7})),
    "a codec as encoding": message(PING, "application/data", **_named({"content-encoding": "zip"})),
    "a body nested beyond reason": message(b"[" * 100_000),
    "msgpack nested beyond reason": message(b"\x91" * 100_000, "application/x-embedq-msgpack"),
    "a body that claims gigabytes": message(b"\xdd\xff\xff\xff\xff", "application/x-embedq-msgpack"),
    "a body that is a list": message(b"[1]"),
    "a body that is null": message(b"null"),
    "headers that are a list": message(PING, headers=[1]),
    "a clock that is a text": message(PING, headers={"clock": "x"}),
    "a wrong compression": message(PING, headers={"compression": "application/x-gzip"}),
    "a compression that is a list": message(PING, headers={"compression": [1]}),
    "no method": message(b"{}"),
    "a method of Python's": command(method="os.system", arguments={"command": "true"}),
    "a method that is a list": command(method=["ping"]),
    "arguments nobody asked for": command(arguments={"a": 1}),
    "arguments that are a list": command(arguments=[1]),
    "unknown fields": command(unheard="of"),
    "a destination that is a number": command(destination=7),
    "a matcher nobody has": command(pattern="x", matcher="x"),
    "a matcher that is a list": command(pattern={"a": 1}, matcher=["x"]),
    "an answer to nowhere": command(reply_to="x"),
    "an answer to numbers": command(reply_to={"exchange": 7, "routing_key": [1]}),
    "an id that is a map": command(method="revoke", arguments={"task_id": {"a": 1}}),
}
