"""Dead letters: messages that no worker could read, and jobs that killed every worker that held them.

Workers leave them in the stream `embedq:dead` (see `workers/broker/transport.lua`), at most
`max_dead_letters` of them; here they are read, sent again or dropped. A letter holds the message as it was, texts
and all; the commands of `embedq dead` print everything about it but those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from embedq import tasks
from embedq.core.errors import InvalidInput

#: Key of the stream, after the installation's prefix.
_KEY = "embedq:dead"

#: The last second of the year 9999: a letter's id may be any number, a date may not.
_LAST_S = 253_402_300_799

#: Headers of a job that are shown.
_SHOWN_HEADERS = ("id", "task", "argsrepr", "kwargsrepr", "origin", "retries")


@dataclass(frozen=True)
class Delivery:
    """One delivery of the job that ended without an answer."""

    taken: datetime
    worker: str


@dataclass(frozen=True)
class Letter:
    """One dead letter."""

    id: str
    reason: str
    #: Key of the list it came from: the queue, and the priority step after a colon.
    source: str
    #: The error at which the worker stopped reading it, or the exits of the workers that held it.
    detail: str
    deliveries: list[Delivery]
    #: As it was in its list; empty if it was too large to be kept.
    message: bytes
    #: Of embedq, in the worker that buried it; empty for workers before 0.2.0.
    version: str = ""

    @property
    def buried(self) -> datetime:
        """The time at which it became a dead letter, in UTC."""
        return datetime.fromtimestamp(min(int(self.id.partition("-")[0]) / 1e3, _LAST_S), UTC)

    @property
    def headers(self) -> dict[str, Any]:
        """The headers of the job that may be shown; empty if the message cannot be read."""
        try:
            headers = json.loads(self.message)["headers"]
            return {name: headers[name] for name in _SHOWN_HEADERS if headers.get(name) is not None}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}


class DeadLetters:
    """The dead letters of one installation, the oldest first."""

    def __init__(self, client: redis.Redis, prefix: str = "") -> None:
        self._client = client
        self._key = prefix + _KEY

    def all(self) -> Iterator[Letter]:
        """Yield every letter, read one by one: each may hold megabytes."""
        after = "-"
        while found := self._client.xrange(self._key, min=after, count=1):
            ((letter_id, fields),) = found
            yield _letter(letter_id, fields)
            after = f"({letter_id.decode()}"

    def get(self, letter_id: str) -> Letter:
        """One letter. InvalidInput if there is none of this id."""
        try:
            found = self._client.xrange(self._key, min=letter_id, max=letter_id)
        except redis.ResponseError:  # not the form of an id
            found = []
        if not found:
            raise InvalidInput(f"there is no dead letter {letter_id!r:.40}; `dead list` shows their ids")
        return _letter(*found[0])

    def num_buried(self) -> int:
        """The number of letters ever buried, dropped ones included: it only grows."""
        try:
            return int(self._client.xinfo_stream(self._key)["entries-added"])
        except redis.ResponseError:  # none yet
            return 0

    def replay(self, letter_id: str) -> Letter:
        """Send it again, to the end of its queue and with all attempts. InvalidInput if its message was not kept."""
        letter = self.get(letter_id)
        if not letter.message or not letter.source:
            raise InvalidInput(f"dead letter {letter_id} was too large to be kept, or its queue is unknown; drop it")
        with self._client.pipeline() as pipe:
            pipe.lpush(letter.source, letter.message).xdel(self._key, letter_id).execute()
        return letter

    def drop(self, letter_id: str) -> Letter:
        """Delete it."""
        letter = self.get(letter_id)
        self._client.xdel(self._key, letter_id)
        return letter


@contextmanager
def dead_letters() -> Iterator[DeadLetters]:
    """The dead letters of this installation, over the producer's connection."""
    with tasks.app.connection_for_write() as connection:
        channel = connection.channel()
        yield DeadLetters(redis.Redis(connection_pool=channel.pool), channel.global_keyprefix)


def _letter(letter_id: bytes, fields: dict[bytes, bytes]) -> Letter:
    names = (b"reason", b"list", b"detail", b"deliveries", b"version")
    reason, source, detail, lines, version = (fields.get(name, b"").decode(errors="replace") for name in names)
    deliveries = [delivery for line in lines.splitlines() if (delivery := _delivery(line))]
    return Letter(letter_id.decode(), reason, source, detail, deliveries, fields.get(b"message", b""), version)


def _delivery(line: str) -> Delivery | None:
    """A line of `transport.lua`; None if it is none."""
    try:
        taken_us, _, _, worker, _ = line.split("\t", 4)
        return Delivery(datetime.fromtimestamp(int(taken_us) / 1e6, UTC), worker)
    except (ValueError, OverflowError, OSError):
        return None
