"""A child process of the measurement: an `Asked` as JSON in its argument, figures as JSON lines on standard output."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from tests.bench.accelerator import asked as asking
from tests.bench.report import Figure


def main() -> None:
    """Measure every step asked for; ends in order when told to, so that servers and workers end with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    asked = asking.from_json(sys.argv[1])
    for name in asked.steps:
        for figure in _step(name)(asked):
            print(json.dumps(asdict(figure)), flush=True)


def _step(name: str) -> Callable[[asking.Asked], Iterator[Figure]]:
    measure: Any
    if name == "save":
        return _save
    if name == "tokenizing":
        from tests.bench.accelerator.tokenizing import measure
    elif name == "forward":
        from tests.bench.accelerator.forward import measure
    elif name == "engine":
        from tests.bench.accelerator.inside import measure
    else:
        from tests.bench.accelerator.queued import measure
    return measure


def _save(asked: asking.Asked) -> Iterator[Figure]:
    asking.save(asked)
    yield from ()


if __name__ == "__main__":
    main()
