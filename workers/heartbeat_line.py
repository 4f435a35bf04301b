"""A heartbeat: the state that a worker reports to its launcher each second, one line of JSON through an inherited pipe.

It is a pipe and not remote control, which needs the server and the worker's event loop: a launcher must distinguish a
hung loop, a server that is away and a stopped process, so the heartbeat may depend on none of them. The pipe also
closes with the worker, and nobody else can write to it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from embedq import __version__

if TYPE_CHECKING:
    from embedq.tasks.speeds import Speed

#: Environment variable with the file descriptor of the pipe that a worker writes to.
VARIABLE = "EMBEDQ_HEARTBEAT_FD"

#: Seconds between two heartbeats; a change of state is reported at once.
INTERVAL_S = 1.0

#: States, in the order in which a worker goes through them.
LOADING, READY, DRAINING = "loading", "ready", "draining"


@dataclass(frozen=True, slots=True)
class Beat:
    """The state of a worker at one moment."""

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
    #: Of embedq, in the worker; empty for workers before 0.2.0.
    version: str = __version__

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait for a batch, of all models."""
        return sum(self.waiting.values())

    @property
    def work_done(self) -> tuple[int, int]:
        """Changes whenever the worker makes progress."""
        return self.num_jobs, self.num_batches

    def line(self) -> bytes:
        """The heartbeat as one line for the pipe."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Beat:
        """The heartbeat of one line. ValueError if it is none.

        Launcher and worker may be of two versions, while one replaces the other: fields we do not know, or of another
        type than ours, are left out, and missing ones have their defaults.
        """
        from embedq.tasks.speeds import known_speeds  # loads Celery, which whoever only writes heartbeats need not

        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("a heartbeat is no map")
        known = {one.name: fields[one.name] for one in dataclasses.fields(cls) if _is_like(one.name, fields)}
        return cls(**{"version": ""} | known | {"models": known_speeds(fields.get("models"))})


def _is_like(name: str, fields: dict[str, Any]) -> bool:
    """Returns True if a field is there and of the type of its default; whole numbers count as fractions, too."""
    default, given = getattr(_DEFAULTS, name), fields.get(name)
    return isinstance(given, int | float if isinstance(default, float) else type(default))


_DEFAULTS = Beat()
