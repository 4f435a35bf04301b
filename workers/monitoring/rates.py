"""Counts at moments become rates: jobs and tokens per second, and the speed of each model. Pure: time is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

#: Rates are those of the last so many seconds.
_RATE_S = 10.0

#: A model's speed is that of the last so many seconds in which there was work for it, and unknown below so many.
_SPEED_S, _MIN_SPEED_S = 10.0, 0.5

#: Seconds of work that are remembered as one: what bounds how much is remembered.
_GRAIN_S = 0.1


class Rates:
    """Counts at moments -> what was done per second, and per second of work for each model.

    The time in which there was work is divided among the models as the device's time was. What it spends around
    the passes is then part of each speed, and the speeds of several models add up: what waits for each, divided by
    its speed, is together the time the worker will need.
    """

    def __init__(self) -> None:
        #: (moment, seconds of work, jobs, tokens)
        self._lately: deque[tuple[float, float, int, int]] = deque()
        #: Seconds of work, and by model (seconds of the device, tokens), up to which time is divided.
        self._busy_s = 0.0
        self._passes: dict[str, tuple[float, int]] = {}
        self._speeds: dict[str, _Speed] = {}

    def add(self, now_s: float, busy_s: float, num_jobs: int, passes: Mapping[str, tuple[float, int]]) -> None:
        """Counts since the start, at `now_s`; `passes` are by model (seconds of the device, tokens)."""
        num_tokens = sum(tokens for _, tokens in passes.values())
        self._lately.append((now_s, busy_s, num_jobs, num_tokens))
        while now_s - self._lately[0][0] > _RATE_S:
            self._lately.popleft()
        self._divide(busy_s, passes)

    def _divide(self, busy_s: float, passes: Mapping[str, tuple[float, int]]) -> None:
        """Give the time since the last division to the models; a pass that has not ended yet waits for the next."""
        nothing = 0.0, 0
        spent_s = {alias: seconds - self._passes.get(alias, nothing)[0] for alias, (seconds, _) in passes.items()}
        all_s, work_s = sum(spent_s.values()), busy_s - self._busy_s
        if all_s <= 0 or work_s <= 0:
            return
        for alias, seconds in spent_s.items():
            num_tokens = passes[alias][1] - self._passes.get(alias, nothing)[1]
            self._speeds.setdefault(alias, _Speed()).add(work_s * seconds / all_s, num_tokens)
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
        """By model, tokens per second of its work; without those of which there was too little to tell."""
        found = {alias: speed.per_second for alias, speed in self._speeds.items()}
        return {alias: speed for alias, speed in found.items() if speed}


class _Speed:
    """Tokens over the seconds of the last work for one model; kept while there is none."""

    def __init__(self) -> None:
        #: (seconds of work, tokens), both since the start.
        self._sums: deque[tuple[float, int]] = deque([(0.0, 0)])

    def add(self, seconds: float, num_tokens: int) -> None:
        before_s, tokens_before = self._sums[-1]
        if len(self._sums) > 1 and before_s - self._sums[-2][0] < _GRAIN_S:
            self._sums.pop()  # a short text now and then would leave an entry for each, for hours
        self._sums.append((before_s + seconds, tokens_before + num_tokens))
        while len(self._sums) > 2 and self._sums[-1][0] - self._sums[1][0] >= _SPEED_S:
            self._sums.popleft()

    @property
    def per_second(self) -> float:
        """0 if there was too little work to tell."""
        (first_s, first), (last_s, last) = self._sums[0], self._sums[-1]
        return (last - first) / (last_s - first_s) if last_s - first_s >= _MIN_SPEED_S else 0.0
