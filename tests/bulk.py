"""Bulk work that keeps a worker's device busy for as long as a test needs it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from embedq import tasks
from tests.events import TIMEOUT_S, Events

#: A worker with room takes a job within milliseconds; one that has not taken it by then leaves it in the queue.
_TAKEN_S = 1.0

#: Each of them is one token to any vocabulary of English words.
_WORDS = ("cat", "dog", "sun", "rain", "tree", "stone", "river", "house", "road", "night", "light", "fire", "water")

#: With the two special tokens as long as MiniLM takes them.
_NUM_WORDS = 254

#: Texts of the job that tells how fast the machine is.
_NUM_PROBE_TEXTS = 40

#: Events after which a job needs the device no more.
_LAST = ("task-succeeded", "task-failed", "task-revoked")

#: Lowest priority: bulk.
PRIORITY = 9


def texts(num_texts: int, seed: int) -> list[str]:
    """Different texts of 256 tokens each, the same for the same seed."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(_WORDS, k=_NUM_WORDS)) for _ in range(num_texts)]


def send(num_texts: int, seed: int, **sending: Any) -> Any:
    """Send one bulk job."""
    return tasks.embed.apply_async((texts(num_texts, seed),), priority=PRIORITY, **sending)


def num_texts_of(seconds: float) -> int:
    """How many bulk texts keep the worker busy for about so long, by a measurement; no more than a job may hold."""
    started_s = time.monotonic()
    send(_NUM_PROBE_TEXTS, seed=0).get(timeout=TIMEOUT_S)
    took_s = time.monotonic() - started_s
    return min(int(seconds / took_s * _NUM_PROBE_TEXTS) + 1, tasks.config.wire["max_texts_per_job"])


def is_taken(job: Any, events: Events) -> bool:
    """Whether the worker takes this job now: it waits there, or, if the worker holds enough, in the queue."""
    events.settle(lambda: "received" in events.types(job.id), _TAKEN_S)
    return "received" in events.types(job.id)


@contextmanager
def busy(num_texts: int, events: Events) -> Iterator[Any]:
    """A bulk job that is being computed; at the end it is ended."""
    job = send(num_texts, seed=1)
    events.wait_for("started", job.id)
    try:
        yield job
    finally:
        job.revoke(terminate=True)
        events.wait_until(
            lambda seen: any(e.get("uuid") == job.id and e["type"] in _LAST for e in seen),
            "the bulk job did not end",
            TIMEOUT_S,
        )
