"""A heartbeat: what a worker tells its launcher each second, one line of JSON through a pipe it was born with.

A pipe and not remote control: that is a round trip through the server, and it is the event loop that answers. A
worker whose loop hangs, whose server is gone or that is stopped must be told apart, so the sign of life may depend on
neither. The pipe also ends with the worker, and nobody else can write to it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from dataclasses import dataclass, field

#: Variable that holds the number of the pipe's end that a worker writes to.
VARIABLE = "EMBEDQ_HEARTBEAT_FD"

#: Seconds between two beats; a change of state is told at once.
INTERVAL_S = 1.0

#: States, in the order in which a worker goes through them.
LOADING, READY, DRAINING = "loading", "ready", "draining"

#: Rates are those of the last so many seconds.
_RATE_S = 10.0

#: A speed is that of the last so many seconds in which there was work, and unknown below so many.
_SPEED_S, _MIN_SPEED_S = 10.0, 0.5


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker at one moment."""

    state: str = LOADING
    #: `<models>.<device>@<host>`; empty while it loads.
    worker: str = ""
    #: Aliases of its models, joined by +.
    model: str = ""
    queues: list[str] = field(default_factory=list)
    #: Since its start: jobs answered, batches formed, turns of the event loop.
    num_jobs: int = 0
    num_batches: int = 0
    num_turns: int = 0
    #: Jobs it has taken and not answered, and the tokens of them that wait for a batch.
    num_held: int = 0
    waiting_tokens: int = 0
    #: Of the last ten seconds.
    jobs_s: float = 0.0
    tokens_s: float = 0.0
    #: Tokens per second of the time in which there was work; 0 if too little is known.
    speed: float = 0.0
    #: By queue, of the jobs answered lately.
    tokens_per_job: dict[str, float] = field(default_factory=dict)
    #: Of the process on a CPU, of torch on an accelerator.
    memory_bytes: int = 0

    @property
    def work_done(self) -> tuple[int, int]:
        """Changes whenever the worker gets on."""
        return self.num_jobs, self.num_batches

    def line(self) -> bytes:
        """As it goes through the pipe."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Beat:
        """The beat of one line."""
        return cls(**json.loads(line))


class Rates:
    """Counts at moments -> what was done per second, and per second of work."""

    def __init__(self) -> None:
        #: (moment, jobs, tokens), and (seconds of work, tokens).
        self._lately: deque[tuple[float, int, int]] = deque()
        self._busy: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, busy_s: float, num_jobs: int, num_tokens: int) -> None:
        """Counts since the start, at `now_s`."""
        self._lately.append((now_s, num_jobs, num_tokens))
        while now_s - self._lately[0][0] > _RATE_S:
            self._lately.popleft()
        if not self._busy or busy_s > self._busy[-1][0]:
            self._busy.append((busy_s, num_tokens))
        while len(self._busy) > 2 and busy_s - self._busy[1][0] >= _SPEED_S:
            self._busy.popleft()

    @property
    def per_second(self) -> tuple[float, float]:
        """Jobs and tokens per second."""
        (first_s, *first), (last_s, *last) = self._lately[0], self._lately[-1]
        seconds = last_s - first_s
        if seconds <= 0:
            return 0.0, 0.0
        return (last[0] - first[0]) / seconds, (last[1] - first[1]) / seconds

    @property
    def speed(self) -> float:
        """Tokens per second of work; 0 if there was too little of it to tell."""
        (first_s, first), (last_s, last) = self._busy[0], self._busy[-1]
        return (last - first) / (last_s - first_s) if last_s - first_s >= _MIN_SPEED_S else 0.0
