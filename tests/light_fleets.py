"""Workers over a model that costs nothing, beside whatever else the test server serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedq import tasks
from tests.chaos.fleet import Fleet
from tests.chaos.light_worker import ALIAS


@contextmanager
def light_fleet(url: str, directory: Path, num_workers: int, **environment: str) -> Iterator[Fleet]:
    """They serve `ALIAS` by name and nothing by default; nobody knows of them afterwards."""
    nothing_by_default = {"EMBEDQ_DEFAULT_EMBED": "none", "EMBEDQ_DEFAULT_RERANK": "none"}
    with Fleet(url, directory, num_workers, **nothing_by_default, **environment) as fleet:
        fleet.wait_until_serving(num_workers)
        yield fleet
    tasks.embed.registry.forget(ALIAS)
