"""Fetches jobs for a channel: decides when and how many, and waits without polling.

Input: the connection that the event loop watches. Output: jobs, in flight. Knows nothing of what becomes of them. An
idle worker sends nothing: the server tracks which lists the last call read (CLIENT TRACKING) and sends an invalidation
on the same connection when one of them changes.

The same way it learns of cancelled jobs, also while it has no room for others: the server tells that the key which names
them has changed, and the worker asks which they are, and for their messages as far as they wait.

Lists are emptied in the order of their priorities. But bulk that was passed over for `max_bulk_wait_s`, though there is
room for it, is fetched first once: a batch's worth, alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any, NamedTuple, Protocol

from kombu.asynchronous import get_event_loop
from redis.exceptions import ResponseError

from embedq.celeryconfig import PARTS
from embedq.core.batching.bulk_share import BulkShare
from embedq.core.batching.job import MAX_INTERACTIVE_PRIORITY
from embedq.workers.broker.leases import SCRIPT, Leases
from embedq.workers.celery_private import RedisChannel, list_key, on_invalidation, socket_of
from embedq.workers.context import Room, WorkerContext

log = logging.getLogger(__name__)

#: Jobs fetched in one call; the server does nothing else meanwhile (some 15 µs per job).
_MAX_JOBS_PER_FETCH = 512

#: Seconds between two fetches of an idle worker that waits for invalidations: shows that the connection still lives.
_LOOK_S = 1.0

#: The same where the server sends no invalidations; a job waits that long on an idle worker, at worst.
POLL_S = 0.2

#: What the parser returns for an invalidation, to distinguish it from an answer.
INVALIDATION = object()

#: State of the lists after a fetch; `transport.lua` says when.
_IS_EMPTY, _HAS_MORE, _NEXT_IS_ALONE, _TOOK_ALONE = range(4)


class Fetched(NamedTuple):
    """A fetched message, as the script returns it."""

    queue: str
    tag: str
    #: Earlier deliveries whose worker died, one line each.
    deliveries: list[str]
    raw: bytes
    is_cancelled: bool = False


#: Fields of a message in an answer: those of `Fetched`.
_NUM_FIELDS = 5


class Answer(NamedTuple):
    """What the server answered."""

    jobs: list[Fetched]
    #: Ids of jobs that were cancelled since the last answer that told of any.
    cancelled: Sequence[str] = ()


class FetchingChannel(RedisChannel, Protocol):
    """The part of the channel it is for that fetching uses."""

    context: WorkerContext
    leases: Leases
    qos: Any
    worker: str
    visibility_timeout: float
    max_message_bytes: int
    max_attempts: int
    max_dead_letters: int
    priority_steps: list[int]

    def queues_in_order(self) -> list[str]:
        """The consumed queues, the next to be looked at first."""
        ...


class Fetch:
    """Sends fetches on one channel's connection, one at a time; the answer comes later."""

    def __init__(self, channel: FetchingChannel) -> None:
        self._channel = channel
        #: The lists of the last fetch: how many of parts come first, and each one's queue and priority step.
        self._num_part_lists = 0
        self._lists: list[tuple[str, int]] = []
        self._socket: Any = None
        self._is_tracked = False
        self._is_known = False
        self._should_look = True
        #: The last priority step that was looked at; of what is beyond it nothing is known.
        self._looked_to = -1
        self._looked_for_parts, self._num_parts_asked = False, 0
        self._next_look_s = 0.0
        self._alone_until_s = 0.0
        self._bulk_share = BulkShare(channel.context.max_bulk_wait_s)
        #: Whether the last fetch saw bulk, or that there is none; and whether it took bulk first.
        self._saw_bulk, self._is_bulk_first = True, False
        #: Whether there may be news of cancelled jobs, and whether the awaited answer tells them.
        self._may_be_cancelled, self._asked_for_cancelled = True, False
        self._next_cancelled_look_s = 0.0

    def ask(self, connection: Any) -> bool:
        """Ask for cancelled jobs if there may be some, else for jobs if there may be some and there is room for them.

        Returns whether an answer will come.
        """
        if socket_of(connection) is not self._socket:
            self._track(connection)
        self._asked_for_cancelled, self._may_be_cancelled = self._may_be_cancelled, False
        if self._asked_for_cancelled:
            connection.send_command(*self._command_for_cancelled())
            return True
        return self._ask_for_jobs(connection)

    def _ask_for_jobs(self, connection: Any) -> bool:
        now_s = monotonic()
        room = self._room()
        if room.max_jobs < 1 or room.max_bytes < 1:
            return False
        is_news = room.max_priority > self._looked_to or (room.max_parts > 0 and not self._looked_for_parts)
        if not self._should_look and now_s < self._next_look_s and not is_news:
            return False
        may_be_alone = not self._channel.qos.taken or self._alone_until_s <= now_s
        if self._alone_until_s and not may_be_alone:
            return False
        self._is_bulk_first = self._is_bulk_due(room, now_s)
        self._choose_lists(room)
        if not self._lists:
            return False
        connection.send_command(*self._command(room, may_be_alone))
        self._alone_until_s, self._should_look, self._looked_to = 0.0, False, room.max_priority
        self._looked_for_parts, self._num_parts_asked = room.max_parts > 0, room.max_parts
        self._next_look_s = now_s + (_LOOK_S if self._is_tracked else POLL_S)
        if not self._is_tracked and now_s >= self._next_cancelled_look_s:
            self._may_be_cancelled, self._next_cancelled_look_s = True, now_s + 2 * POLL_S
        return True

    def take(self, answer: list[Any]) -> Answer:
        """What an answer holds."""
        if not self._asked_for_cancelled:
            return Answer(list(self._jobs(answer)))
        latest_us, has_more, ids, *flat = answer
        self._is_known = True
        self._may_be_cancelled |= bool(has_more)
        if not has_more:
            self._channel.qos.taken.cancelled_us = latest_us
        return Answer(list(self._fetched(flat)), [one.decode(errors="replace") for one in ids])

    def _jobs(self, answer: list[Any]) -> Iterator[Fetched]:
        state, *flat = answer
        # Invalidations that came before this answer are covered by it.
        self._is_known, self._should_look = True, state != _IS_EMPTY or self._is_bulk_first
        self._saw_bulk = state == _IS_EMPTY or self._is_bulk_first
        if state in (_NEXT_IS_ALONE, _TOOK_ALONE):
            # Not for ever: a job held until its ETA would stop this worker from taking any other.
            self._alone_until_s = monotonic() + self._channel.visibility_timeout
        if not self._is_tracked and (hub := get_event_loop()) is not None:
            hub.call_later(POLL_S, nothing)
        num_parts = sum(number < self._num_part_lists for number in flat[::_NUM_FIELDS])
        if 0 < self._num_parts_asked <= num_parts:
            self._looked_for_parts = False  # there may be more, which are wanted once there is room for them
        for number in flat[::_NUM_FIELDS]:
            # Parts do not count as bulk here: they have a room of their own.
            self._saw_bulk |= self._lists[number][1] > MAX_INTERACTIVE_PRIORITY and number >= self._num_part_lists
        yield from self._fetched(flat)

    def _fetched(self, flat: list[Any]) -> Iterator[Fetched]:
        for number, tag, lines, raw, is_cancelled in zip(*(iter(flat),) * _NUM_FIELDS, strict=True):
            deliveries = lines.decode(errors="replace").splitlines()
            yield Fetched(self._lists[number][0], tag.decode(), deliveries, raw, bool(is_cancelled))

    def forget_script(self) -> None:
        """Send the script again: the server was restarted, or its scripts were flushed."""
        self._is_known, self._should_look = False, True
        self._may_be_cancelled |= self._asked_for_cancelled

    def _room(self) -> Room:
        """The worker's room, within the prefetch count if Celery set one."""
        qos = self._channel.qos
        room = self._channel.context.room()
        max_jobs = min(room.max_jobs, _MAX_JOBS_PER_FETCH)
        if qos.prefetch_count:
            max_jobs = min(max_jobs, qos.prefetch_count - len(qos.taken))
        return room._replace(max_jobs=max_jobs if qos.can_consume() else 0)

    def _is_bulk_due(self, room: Room, now_s: float) -> bool:
        """Returns True if this fetch takes bulk first, because those before it have passed it over for long."""
        has_bulk = room.max_priority > MAX_INTERACTIVE_PRIORITY < self._channel.priority_steps[-1]
        is_passed_over = has_bulk and not self._saw_bulk
        is_due = is_passed_over and self._bulk_share.is_due(now_s)
        if is_due or not is_passed_over:
            self._bulk_share.restart()
        return is_due

    def _choose_lists(self, room: Room) -> None:
        """Choose the lists to look at, in their order; none where only parts are consumed, and no more may be taken."""
        channel = self._channel
        of_parts: list[str] = []
        of_texts: list[str] = []
        for queue in channel.queues_in_order():
            (of_parts if _is_of_parts(queue) else of_texts).append(queue)
        least = MAX_INTERACTIVE_PRIORITY + 1 if self._is_bulk_first else 0
        steps = [step for step in channel.priority_steps if least <= step <= room.max_priority]
        # Parts first, because few are taken: behind a stream of texts that fills the room they would never be.
        self._lists = [(queue, step) for step in channel.priority_steps for queue in of_parts if room.max_parts > 0]
        self._num_part_lists = len(self._lists)
        self._lists += [(queue, step) for step in steps for queue in of_texts]

    def _command_for_cancelled(self) -> list[Any]:
        channel = self._channel
        self._lists = [(queue, step) for queue in channel.queues_in_order() for step in channel.priority_steps]
        holder = (channel.worker, channel.visibility_timeout)
        return [*self._script(), "cancelled", *holder, channel.max_message_bytes, channel.qos.taken.cancelled_us]

    def _script(self) -> list[Any]:
        """The call of the script on the chosen lists, up to its arguments."""
        channel = self._channel
        keys = [*channel.leases.keys, *(list_key(channel, queue, step) for queue, step in self._lists)]
        script = ["EVALSHA", channel.leases.sha] if self._is_known else ["EVAL", SCRIPT]
        return [*script, len(keys), *keys]

    def _command(self, room: Room, may_be_alone: bool) -> list[Any]:
        channel = self._channel
        holder = (channel.worker, channel.visibility_timeout)
        max_bytes = min(room.max_bytes, room.batch_bytes) if self._is_bulk_first else room.max_bytes
        room_and_limits = (room.max_jobs, max_bytes, channel.max_message_bytes, channel.max_attempts)
        more = (int(may_be_alone), channel.max_dead_letters, room.max_delayed, self._num_part_lists, room.max_parts)
        return [*self._script(), "fetch", *holder, *room_and_limits, *more]

    def _track(self, connection: Any) -> None:
        """Make the server send an invalidation on this connection when a list that it read changes."""
        self._socket, self._is_known, self._should_look = socket_of(connection), False, True
        self._may_be_cancelled = True  # what the server told the last connection, this one was not told
        self._channel.qos.give_back_idle()  # what the last connection could not give back
        on_invalidation(connection, self._on_invalidation)
        connection.send_command("CLIENT", "TRACKING", "ON", "NOLOOP")
        try:
            connection.read_response()
            self._is_tracked = True
        except ResponseError as error:
            self._is_tracked = False
            log.warning(
                "the server sends no invalidations; it is polled for jobs instead",
                extra={"action": "tracking_refused", "interval_s": POLL_S, "error": str(error)},
            )

    def _on_invalidation(self, data: Any) -> object:
        keys, key_of_cancelled = data[1], self._channel.leases.key_of_cancelled
        self._may_be_cancelled |= keys is None or key_of_cancelled in keys  # None: the server was emptied
        self._should_look |= keys != [key_of_cancelled]
        return INVALIDATION


def _is_of_parts(queue: str) -> bool:
    return queue.startswith(f"{PARTS}.")


def nothing() -> None:
    """Do nothing: called by an event loop, it ends the loop's wait, and the next turn does the rest."""
