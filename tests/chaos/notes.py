"""What workers did, as they noted it themselves: one file per process, which nothing but they can change.

A line is `<what> <time> <tag or text> <job>`, written in one append, so that a killed worker leaves
whole lines. Times are `time.time()` of the one machine that all of this runs on, which is also the
clock of the server.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_RECEIVED, _COMPUTED = "received", "computed"


class Notes:
    """The notes of this process."""

    def __init__(self, directory: Path, slot: int) -> None:
        file = directory / f"{slot}.{os.getpid()}"
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def received(self, tag: str, job_id: str) -> None:
        """The transport has delivered a job."""
        self._write(f"{_RECEIVED} {time.time():.6f} {tag} {job_id}\n")

    def computed(self, texts: list[str]) -> None:
        """A pass of the model over these texts begins."""
        now = f"{time.time():.6f}"
        self._write("".join(f"{_COMPUTED} {now} {text} -\n" for text in texts))

    def _write(self, lines: str) -> None:
        os.write(self._file, lines.encode(errors="replace"))


@dataclass
class Done:
    """The notes of all workers."""

    #: How often each text was computed.
    num_computed: Counter[str] = field(default_factory=Counter)
    #: Deliveries by tag: (when, process id), in order.
    deliveries: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    #: Tags under which each job was delivered.
    tags: dict[str, set[str]] = field(default_factory=dict)

    @property
    def num_repeated(self) -> int:
        """Computations beyond the first of each text."""
        return sum(self.num_computed.values()) - len(self.num_computed)


def read(directory: Path) -> Done:
    """All notes in `directory`."""
    done = Done()
    for pid, what, when_s, name, job_id in _lines(directory):
        if what == _COMPUTED:
            done.num_computed[name] += 1
        else:
            done.deliveries.setdefault(name, []).append((when_s, pid))
            done.tags.setdefault(job_id, set()).add(name)
    for deliveries in done.deliveries.values():
        deliveries.sort()
    return done


def _lines(directory: Path) -> Iterator[tuple[int, str, float, str, str]]:
    for file in directory.iterdir():
        pid = int(file.suffix[1:])
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.count(" ") == 3:
                what, when, name, job_id = line.split(" ")
                yield pid, what, float(when), name, job_id
