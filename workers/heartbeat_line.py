"""A heartbeat: what a worker tells its launcher each second, one line of JSON through a pipe it was born with.

A pipe and not remote control: that is a round trip through the server, and it is the event loop that answers. A
worker whose loop hangs, whose server is gone or that is stopped must be told apart, so the sign of life may depend on
neither. The pipe also ends with the worker, and nobody else can write to it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from embedq.tasks.speeds import Speed

#: Variable that holds the number of the pipe's end that a worker writes to.
VARIABLE = "EMBEDQ_HEARTBEAT_FD"

#: Seconds between two beats; a change of state is told at once.
INTERVAL_S = 1.0

#: States, in the order in which a worker goes through them.
LOADING, READY, DRAINING = "loading", "ready", "draining"


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker at one moment."""

    state: str = LOADING
    #: `<models>.<device>@<host>`; empty while it loads.
    worker: str = ""
    #: Aliases of its models, joined by +.
    model: str = ""
    #: Its queues, and the model that answers each.
    queues: dict[str, str] = field(default_factory=dict)
    #: Since its start: jobs answered, batches formed, turns of the event loop.
    num_jobs: int = 0
    num_batches: int = 0
    num_turns: int = 0
    #: Jobs it has taken and not answered, and by model the tokens of them that wait for a batch.
    num_held: int = 0
    waiting: dict[str, int] = field(default_factory=dict)
    #: Of the last ten seconds.
    jobs_s: float = 0.0
    tokens_s: float = 0.0
    #: Of the last ten seconds, the part in which there was work.
    busy: float = 0.0
    #: By model, its measured speed and the size of its jobs, as also published for other launchers and the exporter.
    models: dict[str, Speed] = field(default_factory=dict)
    #: Of the process on a CPU, of torch on an accelerator.
    memory_bytes: int = 0

    @property
    def waiting_tokens(self) -> int:
        """Of all models."""
        return sum(self.waiting.values())

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
        fields = json.loads(line)
        return cls(**fields | {"models": {alias: Speed(**speed) for alias, speed in fields["models"].items()}})
