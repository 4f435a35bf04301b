"""Policies of how many workers there are, tried on a load of some hours: the launcher's, and the cluster's.

Work is a fluid here, in seconds of one worker; workers load before they work. The launcher's policy is its very code
(`workers.launcher.scaling_policy`); the cluster's is what `deploy/kubernetes/worker/scaling.yaml` makes of the rules of a horizontal pod
autoscaler, written down again here, with its figures read from that file.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import yaml

from embedq.workers.launcher.scaling_policy import Policy, Since, decide
from embedq.workers.launcher.scaling_policy import Seen as Fleet
from tests.running import ROOT

SEED = 13

#: Seconds between two looks of the launcher, and between two of the cluster's autoscaler.
STEP_S, HPA_STEP_S = 1.0, 15.0

#: Seconds that are looked back for how many workers were busy, by the launcher and by the cluster's query.
BUSY_S = {"launcher": 10.0, "cluster": 120.0}

Load = Callable[[float], float]


@dataclass(frozen=True)
class Row:
    """What a policy made of a load."""

    #: Worst backlog, in seconds of all workers there were; the longest time it was above a minute.
    worst_backlog_s: float
    late_s: float
    most_workers: int
    #: Hours of workers, and how many of them the work itself needed.
    worker_hours: float
    needed_hours: float
    #: Changes of mind: from more to fewer workers or back.
    num_turns: int
    #: Seconds after the end of all work until the fewest workers were left; None if not within the time.
    emptied_after_s: float | None


class Deciding(Protocol):
    """How many workers there are to be."""

    def __call__(self, now_s: float, pool: Pool) -> int: ...


@dataclass
class Pool:
    """Workers, some of which still load, and the work that waits, in seconds of one of them."""

    load_s: float
    num_ready: int = 0
    starts_s: list[float] = field(default_factory=list)
    work_s: float = 0.0
    #: Work done in each of the last steps.
    done_s: deque[float] = field(default_factory=lambda: deque(maxlen=round(max(BUSY_S.values()) / STEP_S)))

    @property
    def num_workers(self) -> int:
        return self.num_ready + len(self.starts_s)

    def num_busy(self, looked_back_s: float) -> float:
        """How many workers the work of the last seconds has kept busy."""
        steps = list(self.done_s)[-round(looked_back_s / STEP_S) :]
        return sum(steps) / (len(steps) * STEP_S) if steps else 0.0

    def step(self, now_s: float, arriving_s: float, wanted: int) -> None:
        """One step: who has loaded is ready, work comes and is done, and as many workers are started or drained."""
        up = [start_s for start_s in self.starts_s if now_s - start_s >= self.load_s]
        self.starts_s = [start_s for start_s in self.starts_s if now_s - start_s < self.load_s]
        self.num_ready += len(up)
        self.work_s += arriving_s
        done_s = min(self.work_s, self.num_ready * STEP_S)
        self.work_s -= done_s
        self.done_s.append(done_s)
        more = wanted - self.num_workers
        self.starts_s += [now_s] * max(0, more)
        for _ in range(max(0, -more)):
            if self.starts_s:
                self.starts_s.pop()
            else:
                self.num_ready -= 1


class ByLauncher:
    """`python -m embedq.workers --min … --max …`."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._since = Since()

    def __call__(self, now_s: float, pool: Pool) -> int:
        loading_s = tuple(now_s - start_s for start_s in pool.starts_s)
        busy = pool.num_busy(BUSY_S["launcher"])
        # A speed is known once something has been done.
        work_s = pool.work_s if busy or not pool.work_s or pool.num_ready else None
        seen = Fleet(pool.num_ready, loading_s, work_s, busy, pool.load_s)
        decision = decide(self._policy, seen, self._since, now_s)
        self._since = decision.since
        return decision.num_workers


class ByCluster:
    """KEDA and a horizontal pod autoscaler, told what our ScaledObject tells them."""

    def __init__(self, max_workers: int) -> None:
        text = (ROOT / "deploy" / "kubernetes" / "worker" / "scaling.yaml").read_text(encoding="utf-8")
        (spec,) = [one["spec"] for one in yaml.safe_load_all(text) if one["kind"] == "ScaledObject"]
        thresholds = {one["name"]: float(one["metadata"].get("threshold", 0)) for one in spec["triggers"]}
        self._backlog_s, self._busy = thresholds["backlog-seconds"], thresholds["busy-workers"]
        self._behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        self._cooldown_s, self._max_workers = float(spec["cooldownPeriod"]), max_workers
        self._active_s = -math.inf
        self._looked_s = -math.inf
        #: (when, how many were recommended, how many there were), the oldest first.
        self._past: deque[tuple[float, int, int]] = deque()

    def __call__(self, now_s: float, pool: Pool) -> int:
        busy, present = pool.num_busy(BUSY_S["cluster"]), pool.num_workers
        if pool.work_s or busy > 0.01:
            self._active_s = now_s
        if present == 0:
            return int(pool.work_s > 0)
        if now_s - self._active_s > self._cooldown_s:
            self._past.clear()
            return 0
        if now_s - self._looked_s < HPA_STEP_S:
            return present
        self._looked_s = now_s
        return self._look(now_s, pool, busy)

    def _look(self, now_s: float, pool: Pool, busy: float) -> int:
        present = pool.num_workers
        backlog_s = pool.work_s / max(1, pool.num_ready)
        ratio = backlog_s / self._backlog_s
        # Within a tenth of what is aimed at nothing changes; that is the autoscaler's own rule.
        by_backlog = present if abs(ratio - 1) <= 0.1 else math.ceil(ratio * pool.num_ready)
        by_busy = present if abs(busy / self._busy / present - 1) <= 0.1 else math.ceil(busy / self._busy)
        wanted = min(max(1, by_backlog, by_busy), self._max_workers)
        self._past.append((now_s, wanted, present))
        while now_s - self._past[0][0] > 300:
            self._past.popleft()
        if wanted > present:
            return min(wanted, self._bound(self._behavior["scaleUp"], now_s, present, 1))
        window_s = float(self._behavior["scaleDown"]["stabilizationWindowSeconds"])
        wanted = max(recommended for when_s, recommended, _ in self._past if now_s - when_s <= window_s)
        return min(present, max(wanted, self._bound(self._behavior["scaleDown"], now_s, present, -1)))

    def _bound(self, rules: dict[str, Any], now_s: float, present: int, sign: int) -> int:
        """How many there may be by the policies, each of which counts from what there was its period ago."""
        bounds = []
        for policy in rules["policies"]:
            before = [there for when_s, _, there in self._past if now_s - when_s < policy["periodSeconds"]]
            start = (min if sign > 0 else max)([*before, present])
            change = policy["value"] if policy["type"] == "Pods" else start * policy["value"] / 100
            bounds.append(math.ceil(start + change) if sign > 0 else max(0, math.floor(start - change)))
        return max(bounds) if sign > 0 else min(bounds)


def simulate(decide_: Deciding, load: Load, seconds: float, load_s: float, fewest: int) -> Row:
    """A policy on a load, which is in workers that it would keep busy; the load ends at half of `seconds`."""
    draw, pool = np.random.default_rng(SEED), Pool(load_s, num_ready=fewest)
    worst_s = late_s = longest_late_s = worked_s = needed_s = 0.0
    most, turns, direction, emptied_s = fewest, 0, 0, None
    for step in range(round(seconds / STEP_S)):
        now_s = step * STEP_S
        arriving_s = float(draw.poisson(100 * load(now_s) * STEP_S)) / 100 if now_s < seconds / 2 else 0.0
        before = pool.num_workers
        wanted = decide_(now_s, pool)
        pool.step(now_s, arriving_s, wanted)
        change = int(np.sign(wanted - before))
        turns += change * direction < 0
        direction = change or direction
        backlog_s = pool.work_s / max(1, pool.num_ready)
        late_s = late_s + STEP_S if backlog_s > 60 else 0.0
        worst_s, longest_late_s = max(worst_s, backlog_s), max(longest_late_s, late_s)
        worked_s, needed_s, most = (
            worked_s + pool.num_workers * STEP_S,
            needed_s + arriving_s,
            max(most, pool.num_workers),
        )
        if now_s >= seconds / 2 and pool.num_workers <= fewest and emptied_s is None:
            emptied_s = now_s - seconds / 2
    return Row(worst_s, longest_late_s, most, worked_s / 3600, needed_s / 3600, turns, emptied_s)
