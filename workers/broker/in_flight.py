"""The jobs that a channel holds: acknowledges them in bulk, gives them back in order.

Input: delivery tags, from kombu. Output: calls of `workers.broker.leases`. Knows nothing of how jobs are fetched.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, ClassVar

import redis
from kombu.asynchronous import get_event_loop

from embedq.workers.broker.fetch import nothing
from embedq.workers.broker.leases import renew
from embedq.workers.celery_private import QoSBase

log = logging.getLogger(__name__)


class QoS(QoSBase):
    """The jobs that a channel holds. Acknowledgements wait until the loop's next turn and are sent in one call."""

    #: By worker: tags of the jobs in flight that `fetch` took, in that order, and who holds them here.
    #: Outlives a channel, so that a cut connection does not cost a worker the jobs it is computing.
    _taken: ClassVar[dict[str, dict[str, QoS]]] = {}

    #: Acknowledged and rejected (whether to give back) on a channel that is closed or whose server is
    #: gone; the next channel sends them.
    _left_over: ClassVar[deque[str]] = deque()
    _rejected_late: ClassVar[deque[tuple[str, bool]]] = deque()
    _flushing = threading.Lock()

    #: Acknowledgements that any thread requested, for the event loop's thread; and whether the loop was woken for them.
    _asked: ClassVar[deque[Callable[[], None]]] = deque()
    _is_woken: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acked: deque[str] = deque()
        #: Not by `fetch`, but one by one with `basic_get`.
        self._taken_by_kombu: set[str] = set()
        self._next_sweep_s = 0.0

    @property
    def taken(self) -> dict[str, QoS]:
        """The jobs that this worker holds. The renewal thread reads them, too."""
        return self._taken.setdefault(self.channel.worker, {})

    def append(self, message: Any, delivery_tag: str) -> None:
        """Record a delivered message; on the server, what `fetch` took is recorded as in flight already."""
        if delivery_tag in self.taken:
            self.hold(message, delivery_tag)
        else:
            super().append(message, delivery_tag)
            self._taken_by_kombu.add(delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge at the loop's next turn, or at once if there is no loop."""
        (self._left_over if self.channel.closed else self._acked).append(delivery_tag)
        self.settle(delivery_tag)
        if not self.channel.ticks and not self.channel.closed:
            self.flush()

    @classmethod
    def acknowledge_soon(cls, acknowledge: Callable[[], None]) -> bool:
        """Make the event loop call `acknowledge` at its next turn; False if there is no loop. Any thread may call it.

        Celery also acknowledges on the loop, with three promises for each job; here the loop is woken once for all.
        """
        hub = get_event_loop()
        if hub is None:
            return False
        cls._asked.append(acknowledge)
        if not QoS._is_woken:
            QoS._is_woken = True
            hub.call_soon(nothing)
        return True

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Give the job back to the head of its list, or make it a dead letter."""
        if self.channel.closed:
            self._rejected_late.append((delivery_tag, requeue))
            return
        if requeue:
            self._give_back([delivery_tag])
        else:
            self.channel.leases.bury(delivery_tag, "rejected")
        self.drop(delivery_tag)

    def drop(self, delivery_tag: str) -> None:
        """Hold a job no longer: it was given back or is a dead letter."""
        self.taken.pop(delivery_tag, None)
        self.settle(delivery_tag)

    def flush(self) -> None:
        """Send all acknowledgements in one call; those that cannot be sent are kept for the next."""
        self._acknowledge_asked()
        while self._rejected_late:
            self.reject(*self._rejected_late[0])
            self._rejected_late.popleft()
        if not self._acked and not self._left_over:
            return
        with self._flushing:
            tags = []
            for waiting in (self._left_over, self._acked):
                while waiting:  # one by one: other threads acknowledge meanwhile
                    tags.append(waiting.popleft())
            for tag in tags:
                self.taken.pop(tag, None)
            try:
                self.channel.leases.acknowledge(tags)
            except BaseException:
                self._left_over.extend(tags)
                raise

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Give the jobs back. Called as the channel closes, and again by kombu and at the end of the process."""
        # kombu's looks at delivered messages only, and forgets those acknowledged: both would stay
        # behind here, the acknowledgements unsent and the jobs that had not been delivered yet.
        self.cancel_restoring_at_exit()
        if self.restore_at_shutdown and self.channel.do_restore:
            self.restore_unacked()
        self.finish_restoring()

    def restore_unacked(self, client: Any = None) -> None:
        """Acknowledge what is done; give back, in order, the held jobs that are not being computed.

        If the server is away, the next channel gives them back.
        """
        try:
            self.flush()
            self.give_back_idle(is_own=True)
            for tag in self._taken_by_kombu & self.delivered.keys() - self.settled:
                self.restore_by_tag(tag)
        except (redis.RedisError, OSError) as error:
            log.warning("jobs cannot be given back yet", extra={"action": "jobs_kept", "error": type(error).__name__})

    def give_back_idle(self, is_own: bool = False) -> None:
        """Give back the jobs of closed channels, and with `is_own` those of this one; not those being computed."""
        running = set(self.channel.context.running())
        idle = [
            tag
            for tag, owner in reversed(self.taken.items())
            if ((owner is self and is_own) or owner.channel.closed) and owner.job_id(tag) not in running
        ]
        if idle:
            self._give_back(idle)
        for tag in idle:
            self.taken.pop(tag).delivered.pop(tag, None)

    def job_id(self, tag: str) -> str | None:
        """The job's id; None if it was not delivered yet."""
        message = self.delivered.get(tag)
        return message.headers.get("id") if message else None

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Give back the jobs of dead workers. kombu calls it often; it looks once in a while."""
        if monotonic() < self._next_sweep_s:
            return
        self._next_sweep_s = monotonic() + self.channel.unacked_restore_interval
        renew(self.channel)  # a renewal that comes late on a busy machine must not cost us our own jobs
        num_jobs, foreign = self.channel.leases.give_back_expired()
        for tag in foreign:
            self.restore_by_tag(tag)
        if num_jobs or foreign:
            num_jobs += len(foreign)
            log.warning("jobs of dead workers were given back", extra={"action": "jobs_returned", "num_jobs": num_jobs})

    def _acknowledge_asked(self) -> None:
        QoS._is_woken = False  # first: what is requested meanwhile wakes the loop again
        while self._asked:
            try:
                self._asked.popleft()()
            except Exception:  # of one job; as where Celery's loop calls it
                log.exception("a job cannot be acknowledged", extra={"action": "acknowledgement_failed"})

    def _give_back(self, tags: list[str]) -> None:
        for tag in self.channel.leases.give_back(tags):
            self.restore_by_tag(tag)
