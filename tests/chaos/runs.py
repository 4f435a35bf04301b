"""The runs by name. Imports nothing of ours before one is made, so that its process knows one server only."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bench.report import Figure

RUNS = ["storm", "fuzz", "poison", "threads", "forks", "upgrade", "datasets"]


def make(name: str, seed: int, is_quick: bool, num_messages: int | None, appendfsync: str) -> list[Figure]:
    """Make one run, telling how far it is; returns what was counted."""
    from tests.chaos import forks, fuzz, poison, storm, threads, upgrade

    begun_s = time.monotonic()

    def say(what: str) -> None:
        print(f"{name} {time.monotonic() - begun_s:6.1f} s  {what}", file=sys.stderr, flush=True)

    if name == "storm":
        return storm.run(storm.QUICK if is_quick else storm.Size(), seed, say, appendfsync)
    if name == "fuzz":
        return fuzz.run(num_messages or (fuzz.QUICK if is_quick else fuzz.FULL), seed, say)
    if name == "threads":
        return threads.run(threads.QUICK if is_quick else threads.FULL, seed, say)
    if name == "forks":
        return forks.run(forks.QUICK if is_quick else forks.FULL, seed, say)
    if name == "upgrade":
        return upgrade.run(upgrade.QUICK if is_quick else upgrade.FULL, seed, say)
    if name == "datasets":
        from tests.chaos import datasets

        return datasets.run(datasets.QUICK if is_quick else datasets.Size(), seed, say)
    return poison.run(poison.QUICK if is_quick else poison.FULL, seed, say)
