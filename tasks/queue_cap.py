"""Bounds the queues: a job for which its queue has no room is refused where it is sent.

Interactive and bulk jobs of a queue count apart, each up to the limit. A script on the server counts and puts the job
there in one round trip, so that producers that send at the same time do not exceed the limit together. Workers send
without a limit: nobody could send the next step of a chain again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from redis.exceptions import NoPermissionError, NoScriptError

from embedq.core.errors import InvalidSettings, QueueFull
from embedq.tasks.speeds import Speeds

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


def configured_cap(wire: Mapping[str, Any]) -> QueueCap | None:
    """The cap of a process's settings; None if they have none."""
    cap = QueueCap(wire["max_queued_jobs"], wire["max_queued_bytes"])
    return cap if any(cap) else None


def put_within(
    cap: QueueCap, client: Any, prefix: str, queue: str, lists: dict[int, str], messages: list[tuple[int, str]]
) -> None:
    """Put messages, each with its priority step, into a queue's `lists` of one class; QueueFull, and none, beyond `cap`.

    `lists` are keys by step; `prefix` is the installation's. InvalidSettings if the server's user may run no script.
    """
    numbers = {step: number for number, step in enumerate(lists, 1)}
    given: list[Any] = [*cap]
    for step, message in messages:
        given += (numbers[step], message)
    held = _run(client, len(lists), *lists.values(), *given)
    if held:
        error = QueueFull(_refusal(cap, queue, held, messages))
        error.retry_after_s = _seconds_for(queue, _excess(cap, held, messages), Speeds(client, prefix))
        raise error


def _run(client: Any, *given: Any) -> list[int]:
    try:
        try:
            held: list[int] = client.evalsha(_SHA, *given)
        except NoScriptError:
            held = client.eval(_SCRIPT, *given)
    except NoPermissionError:
        raise InvalidSettings(
            "this user of the server may run no script, which EMBEDQ_MAX_QUEUED_JOBS and EMBEDQ_MAX_QUEUED_BYTES need; "
            f"give it {RIGHTS}"
        ) from None
    return held


def _refusal(cap: QueueCap, queue: str, held: list[int], messages: list[tuple[int, str]]) -> str:
    limits = [f"{cap.max_jobs:,} jobs (EMBEDQ_MAX_QUEUED_JOBS)"] * bool(cap.max_jobs)
    limits += [f"{cap.max_bytes:,} bytes (EMBEDQ_MAX_QUEUED_BYTES)"] * bool(cap.max_bytes)
    size = f"{held[0]:,} job{'s' * (held[0] > 1)}" + (f" of {held[1]:,} bytes" if cap.max_bytes else "")
    return (
        f"queue {queue} holds {size} of this class, and at most {' or '.join(limits)}; {len(messages):,} more of "
        f"{_num_bytes(messages):,} bytes were given. Send again later, or wait with block_s"
    )


def _excess(cap: QueueCap, held: list[int], messages: list[tuple[int, str]]) -> int:
    """Jobs that must be gone before these find room, at least 1."""
    over = max(held[0] + len(messages) - cap.max_jobs if cap.max_jobs else 0, 1)
    if cap.max_bytes:
        over = max(over, math.ceil((held[1] + _num_bytes(messages) - cap.max_bytes) * held[0] / max(1, held[1])))
    return over


def _num_bytes(messages: list[tuple[int, str]]) -> int:
    return sum(len(message) for _, message in messages)


def _seconds_for(queue: str, num_jobs: int, reports: Speeds) -> float | None:
    """Seconds in which the workers present compute so many jobs of a queue; None if nobody has measured that."""
    speeds = [one for report in reports.present().values() for one in report.models.values()]
    speeds = [one for one in speeds if queue in one.tokens_per_job]
    per_second = sum(one.tokens_per_second for one in speeds)
    size = sum(one.tokens_per_job[queue] for one in speeds) / max(1, len(speeds))
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
