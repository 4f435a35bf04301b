"""The jobs in flight: what a worker holds, and the channel that acknowledges them in bulk and gives them back in order.

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

#: Errors of a server that cannot be reached, or refuses.
BROKEN = (redis.RedisError, OSError)


class InFlight:
    """The jobs that one worker holds, and what it has still to report of them. Thread-safe, with one lock.

    It outlives channels, so that a cut connection does not cost a worker the jobs it is computing. The event loop adds
    and acknowledges, the answers thread gives back, the renewal thread removes what other workers hold by now.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Tags that `fetch` took, in that order, and the channel's QoS that delivers each.
        self._owners: dict[str, QoS] = {}
        self._acknowledged: list[str] = []
        #: Tag, and whether to give it back or to bury it.
        self._rejected: list[tuple[str, bool]] = []
        #: Up to which cancelled jobs are known, in microseconds of the server's clock; negative before the first are asked for.
        self.cancelled_us = b"-1"

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, tag: str) -> bool:
        return tag in self._owners

    def add(self, tag: str, owner: QoS) -> None:
        """Hold one more job, which `owner` delivers."""
        with self._lock:
            self._owners[tag] = owner

    def remove(self, tag: str) -> QoS | None:
        """Hold a job no longer; returns who delivered it, None if it was not held any more."""
        with self._lock:
            return self._owners.pop(tag, None)

    def clear(self) -> None:
        """Hold nothing, as after a crash."""
        with self._lock:
            self._owners.clear()

    def tags(self) -> list[str]:
        """The jobs held at this moment, in the order in which they were fetched."""
        with self._lock:
            return list(self._owners)

    def latest_first(self) -> list[tuple[str, QoS]]:
        """The jobs held at this moment and who delivered each, the latest fetched first."""
        with self._lock:
            return list(reversed(self._owners.items()))

    def acknowledge(self, tags: list[str]) -> None:
        """Note jobs as done; `take_acknowledged` returns them to whoever reports that to the server."""
        with self._lock:
            self._acknowledged.extend(tags)

    def take_acknowledged(self) -> list[str]:
        """The jobs that are done; held no longer, so that no renewal brings one back to life."""
        with self._lock:
            taken, self._acknowledged = self._acknowledged, []
            for tag in taken:
                self._owners.pop(tag, None)
            return taken

    def reject(self, rejected: list[tuple[str, bool]]) -> None:
        """Note jobs as rejected; each is held until the server has it back."""
        with self._lock:
            self._rejected.extend(rejected)

    def take_rejected(self) -> list[tuple[str, bool]]:
        """The rejected jobs, each with whether it is given back; the caller reports them, or notes them again."""
        with self._lock:
            taken, self._rejected = self._rejected, []
            return taken


class QoS(QoSBase):
    """The jobs that a channel holds. Acknowledgements wait until the loop's next turn and are sent in one call."""

    #: By worker.
    _in_flight: ClassVar[dict[str, InFlight]] = {}

    #: Acknowledgements that any thread requested, for the event loop's thread; and whether the loop was woken for them.
    _asked: ClassVar[deque[Callable[[], None]]] = deque()
    _is_woken: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Not by `fetch`, but one by one with `basic_get`.
        self._taken_by_kombu: set[str] = set()
        self._next_sweep_s = 0.0

    @property
    def taken(self) -> InFlight:
        """The jobs that this worker holds, through whatever channel."""
        return self._in_flight.setdefault(self.channel.worker, InFlight())

    def append(self, message: Any, delivery_tag: str) -> None:
        """Record a delivered message; on the server, what `fetch` took is recorded as in flight already."""
        if delivery_tag in self.taken:
            self.hold(message, delivery_tag)
        else:
            super().append(message, delivery_tag)
            self._taken_by_kombu.add(delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge at the loop's next turn, or at once if there is no loop."""
        self.taken.acknowledge([delivery_tag])
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
        """Give the job back to the head of its list, or make it a dead letter.

        Where that cannot be done now, because the channel is closed or the server is away, the next `flush` does it, on
        this channel or the next. Any thread may call it.
        """
        if self.channel.closed:
            self.taken.reject([(delivery_tag, requeue)])
            return
        try:
            self._reject_now(delivery_tag, requeue)
        except BROKEN as error:  # it would be renewed for ever and computed by nobody
            self.taken.reject([(delivery_tag, requeue)])
            fields = {"action": "rejection_waits", "error": type(error).__name__}
            log.warning("a job cannot be given back yet", extra=fields)

    def drop(self, delivery_tag: str) -> None:
        """Hold a job no longer: it was given back or is a dead letter."""
        self.taken.remove(delivery_tag)
        self.settle(delivery_tag)

    def flush(self) -> None:
        """Send all rejections one by one, then all acknowledgements in one call; what cannot be sent is kept."""
        self._acknowledge_asked()
        self._flush_rejected()
        tags = self.taken.take_acknowledged()
        if not tags:
            return
        try:
            self.channel.leases.acknowledge(tags)
        except BaseException:
            self.taken.acknowledge(tags)
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
        except BROKEN as error:
            log.warning("jobs cannot be given back yet", extra={"action": "jobs_kept", "error": type(error).__name__})

    def give_back_idle(self, is_own: bool = False) -> None:
        """Give back the jobs of closed channels, and with `is_own` those of this one; not those being computed."""
        running = set(self.channel.context.running())
        idle = [
            tag
            for tag, owner in self.taken.latest_first()
            if ((owner is self and is_own) or owner.channel.closed) and owner.job_id(tag) not in running
        ]
        if idle:
            self._give_back(idle)
        for tag in idle:
            owner = self.taken.remove(tag)
            if owner is not None:  # else the renewal found another worker holding it
                owner.delivered.pop(tag, None)

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

    def _flush_rejected(self) -> None:
        """Reject what could not be rejected before; each once, also on a closed channel: the process may be ending."""
        rejected = self.taken.take_rejected()
        while rejected:
            try:
                self._reject_now(*rejected[0])
            except BaseException:
                self.taken.reject(rejected)
                raise
            del rejected[0]

    def _reject_now(self, tag: str, requeue: bool) -> None:
        if requeue:
            self._give_back([tag])
        else:
            self.channel.leases.bury(tag, "rejected")
        self.drop(tag)

    def _give_back(self, tags: list[str]) -> None:
        for tag in self.channel.leases.give_back(tags):
            self.restore_by_tag(tag)
