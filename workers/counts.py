"""What the pool of one worker has done so far: counted where jobs come and go, read by the heartbeat.

Knows no engine and no message. Written by the event loop and the answers thread, each its own fields.
"""

from __future__ import annotations

import time

#: What a job still weighs after each further one of its queue, in what is learned of their sizes.
_DECAY = 0.99

#: Names of queues come with messages, and anybody may write those: beyond so many, no more are learned.
_MAX_QUEUES = 200


class Counts:
    """Counts of one pool since it started."""

    def __init__(self) -> None:
        #: Jobs answered, failures included.
        self.num_jobs = 0
        #: Turns of the event loop: it looks for jobs in each.
        self.num_turns = 0
        #: Per queue, decayed sums over its answered jobs: how many, and their tokens.
        self._sizes: dict[str, tuple[float, float]] = {}
        self._busy_s = 0.0
        self._busy_since_s: float | None = None

    def holds(self, is_holding: bool) -> None:
        """The pool holds jobs now, or none any more. Its caller holds the pool's lock."""
        now_s = time.monotonic()
        if is_holding and self._busy_since_s is None:
            self._busy_since_s = now_s
        elif not is_holding and self._busy_since_s is not None:
            self._busy_s += now_s - self._busy_since_s
            self._busy_since_s = None

    @property
    def busy_s(self) -> float:
        """Seconds in which there was a job to work on."""
        since_s = self._busy_since_s
        return self._busy_s + (time.monotonic() - since_s if since_s is not None else 0.0)

    def answered(self, queue: str, num_tokens: int) -> None:
        """A job of `queue` has its answer. Called on the answers thread only."""
        self.num_jobs += 1
        if num_tokens and (queue in self._sizes or len(self._sizes) < _MAX_QUEUES):
            jobs, tokens = self._sizes.get(queue, (0.0, 0.0))
            self._sizes[queue] = _DECAY * jobs + 1, _DECAY * tokens + num_tokens

    def tokens_per_job(self) -> dict[str, float]:
        """By queue, the tokens of a job as seen lately."""
        return {queue: round(tokens / jobs, 1) for queue, (jobs, tokens) in tuple(self._sizes.items())}
