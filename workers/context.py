"""Wires the parts of one worker: all that they need of each other, complete before Celery builds any of them.

Celery and kombu create channels, steps and the pool themselves, so these cannot be handed anything when they are made.
Each is therefore a class made for one `WorkerContext`: see `transport.install`, `pool.pool_for` and `health.readiness_for`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from embedq.core.errors import Poisoned
from embedq.workers.heartbeat_line import DRAINING, LOADING, READY, Beat

__all__ = ["DRAINING", "LOADING", "READY", "WAITING", "Lifecycle", "Room", "WorkerContext"]

#: Between the loss of the connection to the server and the next subscription. Launchers see such a worker as ready:
#: they know by themselves whether the server answers.
WAITING = "waiting for the server"


class Lifecycle:
    """The state of this process: LOADING, then READY or WAITING by turns, and DRAINING at last.

    One thread at a time writes it (the event loop, but for the start); any thread reads it.
    """

    def __init__(self) -> None:
        self.state = LOADING


class Room(NamedTuple):
    """The room a worker has for jobs. It takes none if `max_jobs` or `max_bytes` is 0, else at least one."""

    max_jobs: int = 1_000_000
    max_bytes: int = 256 * 1024 * 1024
    #: Only lists of this priority step and more urgent ones: 0 interactive … 9 all.
    max_priority: int = 9
    #: Bytes of a batch: as much bulk is taken first if it was passed over for long.
    batch_bytes: int = 1024 * 1024
    #: Most jobs to take that wait for their countdown; others wait on the server.
    max_delayed: int = 1_000_000
    #: Of them, parts of datasets: each is minutes of work, whatever the size of its message.
    max_parts: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerContext:
    """One worker process. No field has a default: a part that asks for nothing would silently do nothing."""

    #: `<models>.<device>@<host>`, as Celery and Flower show it.
    name: str
    #: This very process, in leases and dead letters: another one of the same name may follow it.
    process: str
    lifecycle: Lifecycle
    #: Asked before each fetch, on the event loop: how much the worker takes now.
    room: Callable[[], Room]
    #: Seconds that bulk is passed over for interactive jobs at a fetch before a batch's worth of it is taken first.
    max_bulk_wait_s: float
    #: Ids of the jobs being computed. They are kept when the connection breaks, instead of given back
    #: and run twice; the worker must acknowledge or reject each in the end.
    running: Callable[[], Collection[str]]
    #: Asked before each renewal of leases, on its thread. False lets every lease run out, so that other workers take
    #: the jobs of one whose engine hangs.
    is_alive: Callable[[], bool]
    #: Frees the places of cancelled jobs, given their ids: those it holds at once, others as they arrive. Returns what each
    #: of those it held was found as: "running" or "waiting".
    cancel: Callable[[Collection[str]], Mapping[str, str]]
    #: Stores the failure of a poisoned job, given its message and the error, for its producer.
    fail: Callable[[Any, Poisoned], None]
    #: Ends this process at once, given the reason: a thread that jobs need ended unexpectedly. Their leases then run out.
    end: Callable[[str], None]
    #: The last heartbeat, which remote control shows.
    last_beat: Callable[[], Beat]
