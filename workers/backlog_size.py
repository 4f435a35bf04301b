"""How much work waits: the lengths of the queues' lists on the server, asked by a thread of its own.

In go names of queues; out come jobs per queue, or nothing while the server does not answer. What workers hold is
theirs to tell. Bytes are not asked for: the server has none but by reading every message.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis
from kombu.exceptions import OperationalError

import tasks
from core.settings import Settings
from workers.beats import Beat

log = logging.getLogger(__name__)

#: Seconds between two looks; each is one round trip.
_INTERVAL_S = 1.0


class BacklogSize(threading.Thread):
    """Tells the lengths of the queues each second, None while the server is away."""

    def __init__(self, queues: Sequence[str], tell: Callable[[dict[str, int] | None], None]) -> None:
        super().__init__(name="backlog size", daemon=True)
        #: May be replaced at any time.
        self.queues = list(queues)
        self._tell = tell
        self._is_over = threading.Event()

    def close(self) -> None:
        """End after the present look."""
        self._is_over.set()

    def run(self) -> None:
        while not self._is_over.is_set():
            try:
                with tasks.app.connection_for_read() as connection:
                    channel = connection.channel()
                    while not self._is_over.is_set():
                        self._tell(lengths(channel, self.queues))
                        self._is_over.wait(_INTERVAL_S)
            except (redis.RedisError, OperationalError, OSError) as error:
                log.debug("the queues cannot be seen: %s", type(error).__name__)
                self._tell(None)
                self._is_over.wait(_INTERVAL_S)


def lengths(channel: Any, queues: Sequence[str]) -> dict[str, int]:
    """Jobs in each of `queues`, all priorities together. What is in flight is not in the lists."""
    with redis.Redis(connection_pool=channel.pool) as client, client.pipeline(transaction=False) as pipe:
        for queue in queues:
            for key in keys(channel, queue):
                pipe.llen(key)
        found = iter(pipe.execute())
        return {queue: sum(next(found) for _ in channel.priority_steps) for queue in queues}


def keys(channel: Any, queue: str) -> list[str]:
    """The lists of a queue, one per priority step."""
    return [f"{channel.global_keyprefix}{channel._q_for_pri(queue, step)}" for step in channel.priority_steps]


def queues_of(settings: Settings) -> list[str]:
    """The queues that workers with these settings serve, as far as settings tell; a worker that is ready knows better."""
    names = [tasks.config.queue_name(kind, alias) for alias in settings.models for kind in ("embed", "rerank")]
    defaults = {"embed": settings.default_embed, "rerank": settings.default_rerank}
    for kind, alias in defaults.items():
        if alias in settings.models or (alias is None and len(settings.models) == 1):
            names.append(tasks.config.queue_name(kind))
    return names


def waiting_tokens(queued: Mapping[str, int], beats: Sequence[Beat]) -> float | None:
    """Tokens that wait in queues and in workers; None if jobs wait whose size nobody can tell.

    A job in a queue counts as one answered from there lately; if there was none, as the average of all queues, and
    if none was answered at all, as those that workers hold.
    """
    held = sum(beat.waiting_tokens for beat in beats)
    known: dict[str, list[float]] = {}
    for beat in beats:
        for queue, tokens in beat.tokens_per_job.items():
            known.setdefault(queue, []).append(tokens)
    sizes = {queue: sum(found) / len(found) for queue, found in known.items()}
    usual = sum(sizes.values()) / len(sizes) if sizes else held / max(1, sum(beat.num_held for beat in beats))
    total = float(held)
    for queue, num_jobs in queued.items():
        size = sizes.get(queue, usual)
        if num_jobs and not size:
            return None
        total += num_jobs * size
    return total
