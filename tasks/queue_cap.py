"""Bounds the queues: a job for which its queue has no room is refused where it is sent.

Interactive and bulk jobs of a queue count apart, each up to the limit. A script on the server counts and puts the job
there in one round trip, so that producers that send at the same time do not exceed the limit together. Workers send
without a limit: nobody could send the next step of a chain again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import redis
from redis.exceptions import NoPermissionError, NoScriptError

from embedq import celeryconfig as config
from embedq.core.errors import InvalidSettings, QueueFull
from embedq.tasks.celery_private import PublishingChannel, transport_with
from embedq.tasks.speeds import Speeds

#: Priorities up to this one are interactive; see `core.batching.job`.
_MAX_INTERACTIVE_PRIORITY = 4

_SCRIPT = Path(__file__).with_name("queue_cap.lua").read_text(encoding="utf-8")
_SHA = sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

#: Seconds between two tries of a sender that waits for room: at least, and at most or where nobody knows better.
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.05, 1.0

#: What an ACL's user must have for it, beyond what every producer has.
RIGHTS = "(+eval +evalsha +llen +lpush +memory|usage ~embed ~embed:[369] ~embed.* ~rerank ~rerank:[369] ~rerank.*)"

Sent = TypeVar("Sent")


class QueueCap(NamedTuple):
    """The most jobs, and bytes of messages, of one class in one queue; 0 for no limit."""

    max_jobs: int = 0
    max_bytes: int = 0


def configured_cap() -> QueueCap | None:
    """The cap of this process's settings; None if they have none."""
    cap = QueueCap(config.wire["max_queued_jobs"], config.wire["max_queued_bytes"])
    return cap if any(cap) else None


@cache
def capped_transport(scheme: str, cap: QueueCap) -> type:
    """kombu's transport for URLs of a scheme, but its channels put no job where `cap` leaves no room."""
    return transport_with(scheme, lambda base: type("CappedChannel", (_CappedChannel, base), {"cap": cap}))


class _CappedChannel(PublishingChannel):
    """A channel of a producer. QueueFull, and nothing is put, where the messages of one write do not fit."""

    cap: ClassVar[QueueCap]
    _client: Any = None

    def takes(self, queue: str) -> bool:
        """Returns True for queues of jobs; parts of datasets are bounded by their runs."""
        return queue.partition(".")[0] in ("embed", "rerank")

    def put(self, messages: Sequence[tuple[str, int, str]]) -> None:
        """Put messages, each with its queue and priority step; those of one queue and class at once, or none of them."""
        classes: dict[tuple[str, bool], list[tuple[int, str]]] = {}
        for queue, step, message in messages:
            classes.setdefault((queue, step > _MAX_INTERACTIVE_PRIORITY), []).append((step, message))
        for (queue, is_bulk), some in classes.items():
            self._put_class(queue, is_bulk, some)

    def _put_class(self, queue: str, is_bulk: bool, messages: list[tuple[int, str]]) -> None:
        steps = [step for step in self.priority_steps if (step > _MAX_INTERACTIVE_PRIORITY) == is_bulk]
        keys = [self.list_key(queue, step) for step in steps]
        given: list[Any] = [*self.cap]
        for step, message in messages:
            given += (steps.index(step) + 1, message)
        held = self._run(len(keys), *keys, *given)
        if held:
            raise self._refusal(queue, is_bulk, held, len(messages), sum(len(message) for _, message in messages))

    def _run(self, *given: Any) -> list[int]:
        if self._client is None or self._client.connection_pool is not self.pool:
            self._client = redis.Redis(connection_pool=self.pool)  # kombu's would prefix the first key alone
        try:
            try:
                held: list[int] = self._client.evalsha(_SHA, *given)
            except NoScriptError:
                held = self._client.eval(_SCRIPT, *given)
        except NoPermissionError:
            raise InvalidSettings(
                "this user of the server may run no script, which EMBEDQ_MAX_QUEUED_JOBS and EMBEDQ_MAX_QUEUED_BYTES need; "
                f"give it {RIGHTS}"
            ) from None
        return held

    def _refusal(self, queue: str, is_bulk: bool, held: list[int], num_jobs: int, num_bytes: int) -> QueueFull:
        max_jobs, max_bytes = self.cap
        limits = [f"{max_jobs:,} jobs (EMBEDQ_MAX_QUEUED_JOBS)"] * bool(max_jobs)
        limits += [f"{max_bytes:,} bytes (EMBEDQ_MAX_QUEUED_BYTES)"] * bool(max_bytes)
        size = f"{held[0]:,}" + (f" and {held[1]:,} bytes" if max_bytes else "")
        error = QueueFull(
            f"queue {queue} holds {size} {'bulk' if is_bulk else 'interactive'} jobs of at most {' or '.join(limits)}; "
            f"{num_jobs:,} more of {num_bytes:,} bytes were given. Send again later, or wait with block_s"
        )
        over = max(held[0] + num_jobs - max_jobs if max_jobs else 0, 1)
        if max_bytes:
            over = max(over, math.ceil((held[1] + num_bytes - max_bytes) * held[0] / max(1, held[1])))
        error.retry_after_s = self._seconds_for(queue, over)
        return error

    def _seconds_for(self, queue: str, num_jobs: int) -> float | None:
        """Seconds in which the workers present compute so many jobs of a queue; None if nobody has measured that."""
        reports = Speeds(self._client, self.global_keyprefix).present().values()
        speeds = [speed for one in reports for speed in one.models.values() if queue in speed.tokens_per_job]
        per_second = sum(speed.tokens_per_second for speed in speeds)
        size = sum(speed.tokens_per_job[queue] for speed in speeds) / max(1, len(speeds))
        return num_jobs * size / per_second if per_second else None


def waiting_for_room(send: Callable[[], Sent], block_s: float | None) -> Sent:
    """Call `send` until it is not refused as QueueFull, for `block_s` seconds at most; None tries once."""
    until_s = time.monotonic() + (block_s or 0.0)
    while True:
        try:
            return send()
        except QueueFull as error:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise
            wanted_s = error.retry_after_s if error.retry_after_s is not None else _MAX_PAUSE_S
            time.sleep(min(left_s, max(_MIN_PAUSE_S, min(wanted_s, _MAX_PAUSE_S))))
