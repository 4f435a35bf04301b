"""Dead letters: messages that no worker could read, and jobs that killed every worker that held them.

Workers leave them in the stream `embedq:dead` (see `workers/broker/transport.lua`), at most
`max_dead_letters` of them; here they are listed, shown, sent again or dropped. A letter holds the
message as it was, texts and all: what is printed says everything about it but those.
"""

from __future__ import annotations

import argparse
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

#: Characters of one value that are printed.
_MAX_SHOWN = 200

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
    #: Where the worker stumbled, or how its workers died.
    detail: str
    deliveries: list[Delivery]
    #: As it was in its list; empty if it was too large to be kept.
    message: bytes

    @property
    def buried(self) -> datetime:
        """When it became a dead letter."""
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


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The commands of `python -m embedq.tasks dead`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="one line per dead letter")
    listing.set_defaults(run=_list)
    for name, run, text in [
        ("show", _show, "everything about them but their texts"),
        ("replay", _replay, "send them again"),
        ("drop", _drop, "forget them"),
    ]:
        command = commands.add_parser(name, help=text)
        command.add_argument("ids", nargs="+", metavar="ID", help="as `dead list` shows it, or `all`")
        command.set_defaults(run=run)


def _list(_: argparse.Namespace) -> None:
    with dead_letters() as letters:
        for letter in letters.all():
            job, source, reason = map(_shown, (letter.headers.get("id", "no job id"), letter.source, letter.reason))
            print(f"{letter.id}  {letter.buried:%Y-%m-%d %H:%M:%S}  {source}  {job}  {reason}")


def _show(asked: argparse.Namespace) -> None:
    with dead_letters() as letters:
        for letter in map(letters.get, _ids(letters, asked)):
            print(f"{letter.id}: {_shown(letter.reason)}")
            print(f"  buried     {letter.buried:%Y-%m-%d %H:%M:%S} UTC, from list {_shown(letter.source)}")
            print(f"  message    {len(letter.message):,} bytes")
            for name, value in letter.headers.items():
                print(f"  {name:<10} {_shown(value)}")
            for delivery in letter.deliveries:
                print(f"  delivered  {delivery.taken:%Y-%m-%d %H:%M:%S} UTC to {_shown(delivery.worker)}")
            for line in letter.detail.splitlines():
                print(f"  {_shown(line)}")


def _replay(asked: argparse.Namespace) -> None:
    with dead_letters() as letters:
        for letter_id in _ids(letters, asked):
            print(f"{letter_id}: sent again to {_shown(letters.replay(letter_id).source)}")


def _drop(asked: argparse.Namespace) -> None:
    with dead_letters() as letters:
        for letter_id in _ids(letters, asked):
            letters.drop(letter_id)
            print(f"{letter_id}: dropped")


def _ids(letters: DeadLetters, asked: argparse.Namespace) -> list[str]:
    return [letter.id for letter in letters.all()] if asked.ids == ["all"] else asked.ids


def _letter(letter_id: bytes, fields: dict[bytes, bytes]) -> Letter:
    reason, source, detail, lines = (
        fields.get(name, b"").decode(errors="replace") for name in (b"reason", b"list", b"detail", b"deliveries")
    )
    deliveries = [delivery for line in lines.splitlines() if (delivery := _delivery(line))]
    return Letter(letter_id.decode(), reason, source, detail, deliveries, fields.get(b"message", b""))


def _delivery(line: str) -> Delivery | None:
    """A line of `transport.lua`; None if it is none."""
    try:
        taken_us, _, _, worker, _ = line.split("\t", 4)
        return Delivery(datetime.fromtimestamp(int(taken_us) / 1e6, UTC), worker)
    except (ValueError, OverflowError, OSError):
        return None


def _shown(value: Any) -> str:
    """A value for the terminal: cut, on one line, without control characters, since anybody may have written it."""
    return "".join(char if char.isprintable() else "?" for char in str(value)[:_MAX_SHOWN])
