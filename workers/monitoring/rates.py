"""Turns counts at moments into rates: jobs and tokens per second, and the speed of each model. Pure: time is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from embedq.core.batching.decayed_mean import DecayedMean

#: Rates are those of the last so many seconds.
_RATE_S = 10.0

#: Seconds of work after which what was measured counts half: a speed follows other texts within half a minute of work,
#: and one odd batch does not make it jump.
_HALF_LIFE_S = 5.0

#: Seconds of work below which a speed is unknown: half a second of it has decayed to this.
_MIN_SPEED_S = 0.45


class PassCounts(NamedTuple):
    """Counts of one model's passes since the start."""

    #: Seconds of the device; passes at the same time share them.
    seconds: float = 0.0
    num_tokens: int = 0
    #: Passes that left others waiting as they began.
    num_loaded: int = 0


class Rates:
    """Counts at moments -> what was done per second, and per second of work for each model.

    The time in which there was work is divided among the models as the device's time was. What it spends around
    the passes is then part of each speed, and the speeds of several models add up: what waits for each, divided by
    its speed, is together the time the worker will need.
    """

    def __init__(self) -> None:
        #: (moment, seconds of work, jobs, tokens)
        self._lately: deque[tuple[float, float, int, int]] = deque()
        #: Seconds of work, and each model's counts, up to which time is divided.
        self._busy_s = 0.0
        self._passes: dict[str, PassCounts] = {}
        self._speeds: dict[str, _ModelSpeed] = {}

    def add(self, now_s: float, busy_s: float, num_jobs: int, passes: Mapping[str, PassCounts]) -> None:
        """Counts since the start, at `now_s`; `passes` are by model."""
        num_tokens = sum(counts.num_tokens for counts in passes.values())
        self._lately.append((now_s, busy_s, num_jobs, num_tokens))
        while now_s - self._lately[0][0] > _RATE_S:
            self._lately.popleft()
        self._divide(busy_s, passes)

    def _divide(self, busy_s: float, passes: Mapping[str, PassCounts]) -> None:
        """Divide the time since the last division among the models; a pass that has not ended yet waits for the next."""
        before = {alias: self._passes.get(alias, PassCounts()) for alias in passes}
        spent_s = {alias: counts.seconds - before[alias].seconds for alias, counts in passes.items()}
        all_s, work_s = sum(spent_s.values()), busy_s - self._busy_s
        if all_s <= 0 or work_s <= 0:
            return
        for alias, counts in passes.items():
            num_tokens = counts.num_tokens - before[alias].num_tokens
            is_loaded = counts.num_loaded > before[alias].num_loaded
            speed = self._speeds.setdefault(alias, _ModelSpeed())
            speed.add(work_s * spent_s[alias] / all_s, num_tokens, is_loaded)
        self._busy_s, self._passes = busy_s, dict(passes)

    @property
    def per_second(self) -> tuple[float, float]:
        """Jobs and tokens per second."""
        (first_s, _, *first), (last_s, _, *last) = self._lately[0], self._lately[-1]
        seconds = last_s - first_s
        if seconds <= 0:
            return 0.0, 0.0
        return (last[0] - first[0]) / seconds, (last[1] - first[1]) / seconds

    @property
    def busy(self) -> float:
        """Part of the time in which there was work."""
        (first_s, first_busy_s, *_), (last_s, last_busy_s, *_) = self._lately[0], self._lately[-1]
        return min(1.0, (last_busy_s - first_busy_s) / (last_s - first_s)) if last_s > first_s else 0.0

    @property
    def speeds(self) -> dict[str, float]:
        """By model, tokens per second of its work; without those that have worked too little for it to be known."""
        found = {alias: speed.per_second for alias, speed in self._speeds.items()}
        return {alias: speed for alias, speed in found.items() if speed}


class _ModelSpeed:
    """Tokens over the seconds of the last work for one model; kept while there is none.

    Work in which batches left others waiting counts apart, and alone once there was enough: a batch of one short text
    says little of how fast many are computed.
    """

    def __init__(self) -> None:
        self._loaded, self._any = DecayedMean(_HALF_LIFE_S), DecayedMean(_HALF_LIFE_S)

    def add(self, seconds: float, num_tokens: int, is_loaded: bool) -> None:
        for mean in (self._loaded, self._any) if is_loaded else (self._any,):
            mean.add(num_tokens, weight=seconds, age=seconds)

    @property
    def per_second(self) -> float:
        """0 if there was too little work for it to be known."""
        return next((mean.mean for mean in (self._loaded, self._any) if mean.weight >= _MIN_SPEED_S), 0.0)
