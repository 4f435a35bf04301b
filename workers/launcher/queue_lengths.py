"""A thread that reads the lengths of the queues and the reports of all workers from the server, once a second.

Input: names of queues. Output: a `Look`, or None while the server does not answer. Workers themselves report the jobs
that they hold. Lengths are in jobs, not bytes: for bytes the server would have to read every message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import redis

from embedq.tasks.speeds import INTERVAL_S, Report, Speed, Speeds
from embedq.workers.celery_private import RedisChannel, list_key
from embedq.workers.launcher.server_thread import Connected

#: Seconds between two looks at the queues; each is one round trip.
_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Look:
    """The queues and workers on the server at one moment."""

    #: Jobs by queue, all priorities together.
    queued: dict[str, int] = field(default_factory=dict)
    #: All workers that take jobs, of any launcher, by name; as they reported within the last seconds.
    workers: dict[str, Report] = field(default_factory=dict)
    #: The speed last measured of each model, by any worker, also by one that is gone.
    latest: dict[str, Speed] = field(default_factory=dict)


class BacklogSize(Connected):
    """Calls `report` with a look each second, with None while the server is away."""

    def __init__(self, queues: Iterable[str], report: Callable[[Look | None], None]) -> None:
        super().__init__("backlog size")
        #: May be replaced at any time.
        self.queues = list(queues)
        self._report = report
        self._channel: RedisChannel
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
        if self._num_looks % int(INTERVAL_S / _INTERVAL_S) == 0:  # workers publish no more often
            self._look = Look({}, self._speeds.present(), self._speeds.latest())
        self._num_looks += 1
        self._report(Look(queued, self._look.workers, self._look.latest))
        self._is_over.wait(_INTERVAL_S)

    def _lost(self) -> None:
        self._report(None)


def lengths(channel: RedisChannel, queues: Iterable[str]) -> dict[str, int]:
    """Jobs in each of `queues`, all priorities together. Jobs in flight are not in the lists."""
    with redis.Redis(connection_pool=channel.pool) as client, client.pipeline(transaction=False) as pipe:
        for queue in queues:
            for key in keys(channel, queue):
                pipe.llen(key)
        found = iter(pipe.execute())
        return {queue: sum(next(found) for _ in channel.priority_steps) for queue in queues}


def keys(channel: RedisChannel, queue: str) -> list[str]:
    """The lists of a queue, one per priority step."""
    return [list_key(channel, queue, step) for step in channel.priority_steps]
