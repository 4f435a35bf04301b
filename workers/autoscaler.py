"""Joins what workers and queues say to the policy of `workers.scaling`, and logs every decision with its figures."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from workers.backlog_size import waiting_tokens
from workers.fleet import Fleet
from workers.scaling import Policy, Seen, Since, decide

log = logging.getLogger(__name__)


class Autoscaler:
    """Decides how many workers a fleet is to have."""

    def __init__(self, policy: Policy, fleet: Fleet, is_on: bool) -> None:
        #: Off while an operator has said how many there are to be.
        self.is_on = is_on
        self._policy = policy
        self._fleet = fleet
        self._since = Since()
        #: Tokens per second of a worker at work, as last known.
        self._speed = 0.0

    def step(self, queued: Mapping[str, int], now_s: float) -> None:
        """Look at everything, and let the fleet have as many workers as the policy wants."""
        seen = self.seen(queued, now_s)
        decision = decide(self._policy, seen, self._since, now_s)
        self._since = decision.since
        present = seen.num_ready + len(seen.loading_s)
        if decision.num_workers == present:
            return
        self._fleet.wanted = decision.num_workers
        told = {
            "from": present,
            "to": decision.num_workers,
            "reason": decision.reason,
            "waiting_jobs": sum(queued.values()),
            "work_s": "unknown" if seen.work_s is None else round(seen.work_s, 1),
            "tokens_s_per_worker": round(self._speed),
            "load_s": round(seen.load_s, 1),
        }
        log.info("scaling", extra={"action": "scaled", **told})

    def seen(self, queued: Mapping[str, int], now_s: float) -> Seen:
        """The fleet and its queues as the policy sees them."""
        staying = self._fleet.staying
        beats = [child.beat for child in staying if child.is_ready]
        speeds = [beat.speed for beat in beats if beat.speed]
        if speeds:
            self._speed = sum(speeds) / len(speeds)
        tokens = waiting_tokens(queued, beats)
        work_s = None if tokens is None or (tokens and not self._speed) else tokens / (self._speed or 1.0)
        num_busy = sum(beat.tokens_s / (beat.speed or self._speed) if self._speed else 0.0 for beat in beats)
        loading_s = tuple(now_s - child.started_s for child in staying if not child.is_ready)
        return Seen(len(beats), loading_s, work_s, num_busy, self._fleet.load_s)
