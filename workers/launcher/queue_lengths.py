"""What the server knows of waiting work: the lengths of the queues' lists and who works on them, asked by a thread.

In go names of queues; out comes a `Look`, or nothing while the server does not answer. What workers hold is theirs to
tell. Bytes are not asked for: the server has none but by reading every message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import redis

from embedq.tasks.speeds import INTERVAL_S, Report, Speed, Speeds
from embedq.workers.celery_private import list_key
from embedq.workers.launcher.server_thread import Connected

#: Seconds between two looks; each is one round trip.
_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Look:
    """The server at one moment."""

    #: Jobs by queue, all priorities together.
    queued: dict[str, int] = field(default_factory=dict)
    #: All workers that take jobs, of whichever launcher, by name; as they said within the last seconds.
    workers: dict[str, Report] = field(default_factory=dict)
    #: The speed last measured of each model, by whichever worker, also one that is gone.
    latest: dict[str, Speed] = field(default_factory=dict)


class BacklogSize(Connected):
    """Tells what it sees each second, None while the server is away."""

    def __init__(self, queues: Iterable[str], tell: Callable[[Look | None], None]) -> None:
        super().__init__("backlog size")
        #: May be replaced at any time.
        self.queues = list(queues)
        self._tell = tell
        self._channel: Any = None
        self._speeds: Speeds
        self._look = Look()
        self._num_looks = 0

    def _begin(self, connection: Any) -> None:
        self._channel = connection.channel()
        client = redis.Redis(connection_pool=self._channel.pool)
        self._speeds = Speeds(client, self._channel.global_keyprefix)
        self._num_looks = 0

    def _step(self, connection: Any) -> None:
        queued = lengths(self._channel, self.queues)
        if self._num_looks % int(INTERVAL_S / _INTERVAL_S) == 0:  # workers say no more often how fast they are
            self._look = Look({}, self._speeds.present(), self._speeds.latest())
        self._num_looks += 1
        self._tell(Look(queued, self._look.workers, self._look.latest))
        self._is_over.wait(_INTERVAL_S)

    def _lost(self) -> None:
        self._tell(None)


def lengths(channel: Any, queues: Iterable[str]) -> dict[str, int]:
    """Jobs in each of `queues`, all priorities together. What is in flight is not in the lists."""
    with redis.Redis(connection_pool=channel.pool) as client, client.pipeline(transaction=False) as pipe:
        for queue in queues:
            for key in keys(channel, queue):
                pipe.llen(key)
        found = iter(pipe.execute())
        return {queue: sum(next(found) for _ in channel.priority_steps) for queue in queues}


def keys(channel: Any, queue: str) -> list[str]:
    """The lists of a queue, one per priority step."""
    return [list_key(channel, queue, step) for step in channel.priority_steps]
