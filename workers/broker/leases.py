"""The server's records of the jobs in flight: renews leases, gives jobs back, acknowledges and buries them.

Input: a channel's key names and connection pool, and delivery tags. The bookkeeping itself is `transport.lua`, whose
head lists the keys. Knows nothing of messages, event loops or engines.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import redis
from celery import Celery, bootsteps
from kombu.exceptions import OperationalError

from embedq import __version__
from embedq.core.guarded_thread import GuardedThread
from embedq.tasks.cancelling import CANCELLED_KEY, WORDS_KEY
from embedq.workers.celery_private import Consumer
from embedq.workers.context import WorkerContext

log = logging.getLogger(__name__)

SCRIPT = f"local VERSION = '{__version__}'\n" + Path(__file__).with_name("transport.lua").read_text(encoding="utf-8")

#: Renewals per lease: two may fail before a job is given away.
_RENEWALS_PER_LEASE = 3

#: Times that the thread which renews leases is started again if it ends unexpectedly; then the worker ends.
_MAX_RESTARTS = 3

#: Delivery tags of one call; Lua passes on at most some thousands of arguments.
_MAX_TAGS_PER_CALL = 1000

#: Seconds after which a stock worker's job is given back: kombu's own default, since a stock worker
#: of another application on the same server renews nothing.
_FOREIGN_LEASE_S = 3600

#: Seconds that a job's attempts are remembered while nobody holds it: it waits in its queue, or is gone.
_RECORD_S = 86_400


#: Our own keys, in the order of `transport.lua`.
_OWN_KEYS = (
    "embedq:jobs",
    "embedq:dead",
    "embedq:delayed",
    "embedq:delayed_jobs",
    CANCELLED_KEY,
    WORDS_KEY,
    "embedq:cancel_scans",
)


class LeasingChannel(Protocol):
    """The part of the channel whose jobs they are for that leases use."""

    context: WorkerContext
    #: A `redis.ConnectionPool`.
    pool: Any
    worker: str
    global_keyprefix: str
    unacked_key: str
    unacked_index_key: str
    visibility_timeout: float
    max_dead_letters: int


class HoldingChannel(Protocol):
    """A channel that holds jobs."""

    context: WorkerContext
    #: An `in_flight.QoS`.
    qos: Any
    leases: Leases
    visibility_timeout: float


class Leases:
    """The operations of `transport.lua` on the keys of one channel, in the name of one worker.

    All of them raise `redis.RedisError` or `OSError` where the server cannot be reached.
    """

    def __init__(self, channel: LeasingChannel) -> None:
        self._channel = channel
        prefix = channel.global_keyprefix
        self.keys = [prefix + name for name in (channel.unacked_key, channel.unacked_index_key, *_OWN_KEYS)]
        self._cursor: Any = 0
        self._client: Any = None

    @property
    def key_of_cancelled(self) -> bytes:
        """The key that names the cancelled jobs."""
        return self.keys[2 + _OWN_KEYS.index(CANCELLED_KEY)].encode()

    @property
    def client(self) -> Any:
        """A plain client: kombu's own would put its key prefix before the first key of a script only."""
        if self._client is None or self._client.connection_pool is not self._channel.pool:
            self._client = redis.Redis(connection_pool=self._channel.pool)  # takes as long as a round trip
        return self._client

    @cached_property
    def _script(self) -> Any:
        return self.client.register_script(SCRIPT)

    @property
    def sha(self) -> str:
        """Name of the script on a server that has seen it."""
        return str(self._script.sha)

    def acknowledge(self, tags: list[str]) -> None:
        """Remove jobs that are done, in one round trip; not those that another worker holds by now."""
        for part in _in_parts(tags):
            self._run("ack", self._channel.worker, *part)

    def renew(self, tags: Iterable[str]) -> list[str]:
        """Restart the leases of `tags`; returns the tags that this worker no longer holds."""
        return [tag.decode() for part in _in_parts(tags) for tag in self._run("renew", self._channel.worker, *part)]

    def give_back(self, tags: Iterable[str]) -> list[str]:
        """Put jobs back at the head of their lists, in the given order: the latest fetched first. Counts no attempt.

        Returns the tags that `fetch` did not take; those are left as they are.
        """
        return [tag.decode() for part in _in_parts(tags) for tag in self._run("give_back", self._channel.worker, *part)]

    def give_back_expired(self) -> tuple[int, list[str]]:
        """Put the jobs of dead workers back at the head of their lists.

        Returns how many, and the tags that stock workers left behind; those are left as they are.
        """
        foreign: list[bytes] = []
        total, has_more = 0, 1
        while has_more:
            lease_s = self._channel.visibility_timeout
            timeouts = (lease_s, max(_FOREIGN_LEASE_S, lease_s), _RECORD_S)
            num_jobs, has_more, self._cursor, foreign = self._run("expire", *timeouts, self._cursor)
            total += num_jobs
        return total, [tag.decode() for tag in foreign]

    def give_back_of(self, process: str) -> int:
        """Put the jobs of a process that has ended back at the head of their lists, without waiting for their leases.

        `process` is its name in the records of leases. The delivery counts as an attempt. Returns how many jobs.
        """
        total, place = 0, 0
        while place >= 0:
            num_jobs, place = self._run("abandon", process, place)
            total += num_jobs
        return total

    def bury(self, tag: str, reason: str, detail: str = "") -> bool:
        """Make a job in flight a dead letter; False if it is no longer in flight."""
        return bool(self._run("bury", self._channel.max_dead_letters, tag, reason, detail))

    def say(self, words: Mapping[str, str]) -> None:
        """Tell whoever cancelled these jobs what each was found as, and that its place is free."""
        for part in _in_parts(words):
            self._run("say", *(one for job_id in part for one in (job_id, words[job_id])))

    def _run(self, *arguments: Any) -> Any:
        return self._script(keys=self.keys, args=arguments, client=self.client)


def give_back_jobs_of(process: str, app: Celery) -> None:
    """Put the jobs of a process that has ended back in their queues, over a connection of its own; logs how many.

    Logs a failure: then they return when their leases end. Any thread may call it.
    """
    fields = {"action": "jobs_returned", "worker_process": process}
    try:
        with app.connection_for_read() as connection:
            num_jobs = Leases(connection.channel()).give_back_of(process)
    except (redis.RedisError, OperationalError, OSError) as error:
        fields["error"] = type(error).__name__
        log.warning("jobs of a worker that ended return when their leases end", extra=fields)
        return
    if num_jobs:
        log.info("jobs of a worker that ended are back in their queues", extra=fields | {"num_jobs": num_jobs})


class LeaseRenewal(bootsteps.StartStopStep):
    """Consumer step: a thread that renews the leases of the jobs this worker holds, until it has drained.

    It is a thread of its own, so that a busy event loop loses no lease. It outlives `stop`, because a
    worker that stops still computes the jobs it has, maybe for minutes.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    _channel: HoldingChannel

    def __init__(self, consumer: Consumer, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._is_over = threading.Event()
        self._thread: GuardedThread | None = None

    def start(self, consumer: Consumer) -> None:
        """Begin to renew. Called again after each reconnect, with a new channel."""
        self._channel = consumer.task_consumer.channel
        if self._thread is None:
            self._thread = GuardedThread("lease renewal", self._run, self._channel.context.end, _MAX_RESTARTS)
            self._thread.start()

    def stop(self, consumer: Consumer) -> None:
        """Do nothing: jobs are still being computed, or the worker is about to reconnect."""

    def shutdown(self, consumer: Consumer) -> None:
        """End the thread: every job is done, or the channel gives it back as it closes."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        was_alive = True
        while not self._is_over.wait(self._channel.visibility_timeout / _RENEWALS_PER_LEASE):
            is_alive = self._channel.context.is_alive()
            if was_alive and not is_alive:
                log.error(
                    "the engine makes no progress, so leases are not renewed", extra={"action": "leases_withheld"}
                )
            was_alive = is_alive
            try:
                renew(self._channel)
            except Exception as error:  # of a channel that closes meanwhile: the leases of the next must not run out
                fields = {"action": "leases_failed", "error": type(error).__name__}
                log.warning("leases cannot be renewed", exc_info=True, extra=fields)


def renew(channel: HoldingChannel) -> int:
    """Renew every lease of `channel`; returns how many. Logs a failure: the next attempt is soon."""
    taken = channel.qos.taken
    tags = taken.tags()
    if not tags or not channel.context.is_alive():
        return 0
    try:
        # A job that was settled meanwhile is not lost.
        lost = [tag for tag in channel.leases.renew(tags) if taken.remove(tag)]
    except (redis.RedisError, OSError) as error:
        log.warning("leases cannot be renewed", extra={"action": "leases_failed", "error": type(error).__name__})
        return 0
    if lost:
        log.warning("leases were lost to other workers", extra={"action": "leases_lost", "num_jobs": len(lost)})
    log.debug("leases were renewed", extra={"action": "leases_renewed", "num_jobs": len(tags) - len(lost)})
    return len(tags) - len(lost)


def _in_parts(tags: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(tags)
    while part := list(islice(remaining, _MAX_TAGS_PER_CALL)):
        yield part
