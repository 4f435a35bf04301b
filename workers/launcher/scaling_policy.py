"""Decides how many workers there should be, by the work that waits. Pure: no clock, no process, no server.

Work is counted in seconds of one worker, so that queues of models with jobs of any size add up; if several launchers
share queues, it is one launcher's part (`workers.launcher.backlog_seconds`). The backlog in seconds decides: that work,
divided by the number of workers. More are started if a new one, which has to load first, would still find more than
`target_s` of it; one is drained if the others have next to no backlog and are idle for part of their time. Either must
hold for a while, so that neither a short burst nor a short pause changes anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from embedq.core.errors import InvalidSettings
from embedq.workers.logs import counted

#: With one worker less, the backlog may be at most this part of `target_s`: well below what would start one again.
_DOWN_PART = 0.5

#: With one worker less, the others may be busy for at most this part of their time, else a backlog would build up.
_BUSY_PART = 0.7


@dataclass(frozen=True)
class Policy:
    """The operator's bounds and patience."""

    min_workers: int
    max_workers: int
    #: Seconds of backlog that start no worker.
    target_s: float = 10.0
    #: Seconds for which there must be too much of it before workers are started, or too little before one is drained.
    up_delay_s: float = 3.0
    down_delay_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_workers <= self.max_workers or self.max_workers < 1:
            raise InvalidSettings(
                f"the fewest workers must be 0 or more, the most 1 or more and no fewer; given {self.min_workers} and "
                f"{self.max_workers}"
            )
        if self.target_s <= 0 or self.up_delay_s < 0 or self.down_delay_s < 0:
            raise InvalidSettings(
                f"the target backlog must be above 0 s and delays 0 s or more; given {self.target_s}, "
                f"{self.up_delay_s} and {self.down_delay_s}"
            )


@dataclass(frozen=True, slots=True)
class Seen:
    """The workers and the work at one moment."""

    #: Workers that take jobs.
    num_ready: int
    #: For each loading worker, the seconds since its start.
    loading_s: tuple[float, ...]
    #: Seconds that one worker would need for all that waits for these workers, in the queues and in them; None if
    #: something waits and no worker's speed is known yet.
    work_s: float | None
    #: How many workers the work of the last seconds has kept busy.
    num_busy: float
    #: Seconds from a worker's start to its first job; 0 if none has been seen to load.
    load_s: float
    #: Seconds in which workers of other launchers empty the queues; None if they do not serve all of them.
    others_s: float | None = None


@dataclass(frozen=True, slots=True)
class Since:
    """Since when there has been a reason to scale up or down; None if there is none."""

    up_s: float | None = None
    down_s: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The number of workers there should be, and the reason. `since` is an argument of the next decision."""

    num_workers: int
    reason: str
    since: Since


def decide(policy: Policy, seen: Seen, since: Since, now_s: float) -> Decision:
    """The wanted number of workers: within the policy's bounds, and at most one less than are present."""
    present = seen.num_ready + len(seen.loading_s)
    bounded = min(max(present, policy.min_workers), policy.max_workers)
    if bounded != present:
        return Decision(
            bounded,
            f"{counted(present, 'worker')}, and {policy.min_workers} to {policy.max_workers} are allowed",
            Since(),
        )
    if present == 0:
        return _from_none(policy, seen)
    if seen.work_s is None:
        return Decision(present, "work waits, and no worker's speed is measured yet", Since())
    left_s = work_left_s(seen, seen.load_s)
    if left_s > policy.target_s * present and present < policy.max_workers:
        return _up(policy, seen, since, now_s, left_s)
    if _is_idle(policy, seen):
        return _down(policy, seen, since, now_s)
    return Decision(present, f"{_backlog(seen)} for {counted(present, 'worker')}", Since())


def work_left_s(seen: Seen, after_s: float) -> float:
    """The work, in seconds of one worker, that is left after `after_s` seconds if none is added."""
    done_s = seen.num_ready * after_s
    for loading_s in seen.loading_s:
        ready_in_s = max(0.0, seen.load_s - loading_s)
        done_s += max(0.0, after_s - ready_in_s)
    return max(0.0, (seen.work_s or 0.0) - done_s)


def _from_none(policy: Policy, seen: Seen) -> Decision:
    """Without workers: the first job starts one, unless workers of others will soon have done it."""
    if seen.work_s == 0:
        return Decision(0, "nothing waits", Since())
    if seen.others_s is not None and seen.others_s <= policy.target_s:
        return Decision(0, f"workers of others will have done it in {seen.others_s:.1f} s", Since())
    return Decision(1, "work waits, and there is no worker", Since())


def _up(policy: Policy, seen: Seen, since: Since, now_s: float, left_s: float) -> Decision:
    present = seen.num_ready + len(seen.loading_s)
    up_s = now_s if since.up_s is None else since.up_s
    if now_s - up_s < policy.up_delay_s:
        return Decision(present, f"{_backlog(seen)} for {now_s - up_s:.1f} s", Since(up_s=up_s))
    wanted = min(policy.max_workers, math.ceil(left_s / policy.target_s))
    reason = (
        f"{_backlog(seen)} for {now_s - up_s:.1f} s: after {seen.load_s:.1f} s of loading {left_s:.1f} s of work are left, "
        f"the target is {policy.target_s:.1f} s per worker"
    )
    return Decision(wanted, reason, Since())


def _down(policy: Policy, seen: Seen, since: Since, now_s: float) -> Decision:
    down_s = now_s if since.down_s is None else since.down_s
    if now_s - down_s < policy.down_delay_s:
        return Decision(seen.num_ready, f"{_backlog(seen)} for {now_s - down_s:.1f} s", Since(down_s=down_s))
    reason = f"{_backlog(seen)} for {now_s - down_s:.1f} s, and work for {seen.num_busy:.2f} workers"
    return Decision(seen.num_ready - 1, reason, Since())


def _is_idle(policy: Policy, seen: Seen) -> bool:
    """Returns True if one worker less would suffice. While one loads, its effect is not known yet."""
    fewer = seen.num_ready - 1
    if seen.loading_s or fewer < policy.min_workers:
        return False
    if fewer == 0:
        return seen.work_s == 0 and seen.num_busy == 0
    assert seen.work_s is not None
    return seen.work_s <= _DOWN_PART * policy.target_s * fewer and seen.num_busy <= _BUSY_PART * fewer


def _backlog(seen: Seen) -> str:
    workers = seen.num_ready + len(seen.loading_s)
    return f"a backlog of {(seen.work_s or 0.0) / workers:.1f} s"
