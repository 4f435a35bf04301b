"""The result backend of a connected application: Celery's own on Redis, which also reads what our workers stored."""

from __future__ import annotations

from typing import Any

from celery.backends.redis import RedisBackend, SentinelBackend

from embedq.core.codec import unpack

#: First bytes of a msgpack map of 1 to 15 and of more entries. JSON and YAML begin with ASCII, pickle with 0x80.
_FIRST_BYTES = frozenset({*range(0x81, 0x90), 0xDE})


class _ReadsBoth:
    """Decodes a result by its first byte.

    Celery reads all results with the application's one serializer. The children of a task may be jobs of ours, to whose
    channels it subscribes: their results would be errors of whoever waits for another one.
    """

    def decode(self, payload: Any) -> Any:
        """Decode our msgpack map, or what the application's serializer wrote. ValueError for a malformed map."""
        if isinstance(payload, bytes) and payload[:1] and payload[0] in _FIRST_BYTES:
            return unpack(payload)
        return super().decode(payload)  # type: ignore[misc]


class ConnectedBackend(_ReadsBoth, RedisBackend):
    """Results on one server."""


class ConnectedSentinelBackend(_ReadsBoth, SentinelBackend):
    """Results on the server that Sentinel names."""
