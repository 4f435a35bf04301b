"""Applies the scaling policy to a fleet: collects what it decides by, and logs every decision with its figures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from embedq.workers.launcher.backlog_seconds import mean_speeds, others_s, work_s
from embedq.workers.launcher.fleet import Fleet
from embedq.workers.launcher.queue_lengths import Look
from embedq.workers.launcher.scaling_policy import Policy, Seen, Since, decide

log = logging.getLogger(__name__)


class Autoscaler:
    """Decides how many workers a fleet should have."""

    def __init__(self, policy: Policy, fleet: Fleet, queues: Mapping[str, str], is_on: bool) -> None:
        """`queues` maps each queue to its model, as a guess until a worker reports its own."""
        #: Off while an operator has set the number of workers.
        self.is_on = is_on
        self._policy = policy
        self._fleet = fleet
        self._since = Since()
        self.assume(queues)
        #: By model, the tokens per second of a worker at work for it, as last known.
        self._speeds: dict[str, float] = {}

    def assume(self, queues: Mapping[str, str]) -> None:
        """Take these queues, each with its model, for the workers' until one of them reports its own."""
        self._queues = dict(queues)

    def step(self, look: Look, now_s: float) -> None:
        """Decide by `look` and the fleet's heartbeats, and set the number of workers that the fleet should have."""
        seen = self.seen(look, now_s)
        decision = decide(self._policy, seen, self._since, now_s)
        self._since = decision.since
        present = seen.num_ready + len(seen.loading_s)
        if decision.num_workers == present:
            return
        self._fleet.wanted = decision.num_workers
        fields = {
            "from": present,
            "to": decision.num_workers,
            "reason": decision.reason,
            "waiting_jobs": sum(look.queued.values()),
            "work_s": "unknown" if seen.work_s is None else round(seen.work_s, 1),
            "tokens_s_per_worker": ",".join(f"{alias}:{speed:.0f}" for alias, speed in self._speeds.items()),
            "load_s": round(seen.load_s, 1),
        }
        log.info("the number of workers changes", extra={"action": "scaled", **fields})

    def seen(self, look: Look, now_s: float) -> Seen:
        """The input of the policy: the fleet and its queues."""
        staying = self._fleet.staying
        beats = {child.name: child.beat for child in staying if child.is_ready}
        for beat in beats.values():
            self._queues = beat.queues or self._queues
        self._speeds |= mean_speeds(beats.values())
        loading_s = tuple(now_s - child.started_s for child in staying if not child.is_ready)
        leaving = {child.name for child in self._fleet.children} - beats.keys()  # or they load, and take nothing yet
        present = {name: report for name, report in look.workers.items() if name not in leaving}
        look = replace(look, workers=present)
        return Seen(
            num_ready=len(beats),
            loading_s=loading_s,
            work_s=work_s(look, beats, self._queues, self._speeds),
            num_busy=sum(beat.busy for beat in beats.values()),
            load_s=self._fleet.load_s,
            others_s=others_s(look, beats, self._queues),
        )
