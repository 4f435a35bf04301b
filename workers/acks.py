"""The jobs one channel holds: acknowledged in bulk, given back in order.

In go delivery tags, from kombu; out go calls of `workers.leases`. Knows nothing of how jobs are taken.
Like `workers/transport.py`, it leans on kombu's private names.
"""

from __future__ import annotations

import logging
import threading
from time import monotonic
from typing import Any, ClassVar

import redis
from kombu.transport import redis as stock
from kombu.transport import virtual

from workers.leases import renew

log = logging.getLogger(__name__)


class QoS(stock.QoS):
    """The jobs a channel holds. Acknowledgements wait for the end of the tick and go in one call."""

    #: Acknowledged on a channel whose server was gone; the next channel sends them.
    _left_over: ClassVar[list[str]] = []
    _flushing = threading.Lock()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Tags of the jobs in flight that `fetch` took, in that order; also read by the renewal thread.
        self.taken: dict[str, bool] = {}
        self._acked: list[str] = []
        self._next_sweep_s = 0.0

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a delivered message; what `fetch` took is in flight on the server already."""
        if delivery_tag in self.taken:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge at the end of this tick, or at once where no tick will follow."""
        self._acked.append(delivery_tag)
        self._quick_ack(delivery_tag)
        if not self.channel.ticks:
            self.flush()

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Give the job back to the head of its list, or bury it."""
        if requeue:
            self._give_back([delivery_tag])
        else:
            self.channel.leases.bury(delivery_tag, "rejected")
        self.drop(delivery_tag)

    def drop(self, delivery_tag: str) -> None:
        """Hold a job no longer: it was given back or buried."""
        self.taken.pop(delivery_tag, None)
        self._quick_ack(delivery_tag)

    def flush(self) -> None:
        """Send all acknowledgements in one call; those that cannot be sent are kept for later."""
        if not self._acked and not self._left_over:
            return
        with self._flushing:
            tags = [*self._left_over, *self._acked]
            self._left_over.clear()
            self._acked.clear()
            for tag in tags:
                self.taken.pop(tag, None)
            try:
                self.channel.leases.acknowledge(tags)
            except BaseException:
                self._left_over.extend(tags)
                raise

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Called as the channel closes, and again by kombu and as the process ends."""
        # kombu's looks at delivered messages only, and forgets those acknowledged: both would stay
        # behind here, the acknowledgements unsent and the jobs that had not been delivered yet.
        self._on_collect.cancel()
        if self.restore_at_shutdown and self.channel.do_restore:
            self.restore_unacked()
        self._delivered.restored = True

    def restore_unacked(self, client: Any = None) -> None:
        """Acknowledge what is done, give back the rest in the order in which it was taken."""
        try:
            self.flush()
            held = set(self._delivered) - self._dirty
            if tags := [*reversed(self.taken), *(held - self.taken.keys())]:
                self._give_back(tags)
        except (redis.RedisError, OSError) as error:
            log.warning(
                "jobs not given back; their leases will run out",
                extra={"action": "jobs_kept", "num_jobs": len(self.taken), "error": type(error).__name__},
            )
        finally:
            self.taken.clear()
            self._delivered.clear()
            self._dirty.clear()

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Give back what dead workers held; kombu calls this often, and it looks seldom."""
        if monotonic() < self._next_sweep_s:
            return
        self._next_sweep_s = monotonic() + self.channel.unacked_restore_interval
        renew(self.channel)  # a renewal that comes late on a busy machine must not cost us our own jobs
        num_jobs, foreign = self.channel.leases.give_back_expired()
        for tag in foreign:
            self.restore_by_tag(tag)
        if num_jobs or foreign:
            num_jobs += len(foreign)
            log.warning("jobs of dead workers given back", extra={"action": "jobs_returned", "num_jobs": num_jobs})

    def _give_back(self, tags: list[str]) -> None:
        for tag in self.channel.leases.give_back(tags):
            self.restore_by_tag(tag)
