"""Launchers with workers of a test's own: a model under a name that no other worker has, devices of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from embedq import tasks
from tests.running import Running, children_of

#: A random embedder that loads in the time that torch takes.
TINY = Path(__file__).parent / "golden" / "flagmodel_cls" / "model"

TIMEOUT_S = 60.0


@contextmanager
def environment(server: str, alias: str, model: Path, directory: Path) -> Iterator[dict[str, str]]:
    """Variables for a launcher that serves `model` as `alias` and nothing by default; its queue is emptied afterwards."""
    yield {
        "EMBEDQ_REDIS_URL": server,
        "EMBEDQ_MODELS": f"{alias}={model}",
        "EMBEDQ_DEFAULT_EMBED": "none",
        "EMBEDQ_DEFAULT_RERANK": "none",
        "EMBEDQ_LEASE_S": "2",
        "EMBEDQ_DATA_DIR": str(directory),
    }
    tasks.embed.registry.forget(alias)
    with redis.Redis.from_url(server) as client:
        client.delete(*(f"embed.{alias}{suffix}" for suffix in ("", ":3", ":6", ":9")))


def workers_of(running: Running) -> dict[str, int]:
    """Process ids of a launcher's workers by the labels of their devices (Linux)."""
    found = {}
    for pid in children_of(running.process.pid):
        environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
        labels = [part.partition("=")[2] for part in environ if part.startswith("EMBEDQ_DEVICE_LABEL=")]
        if labels:
            found[labels[0]] = pid
    return found


def capacities(running: Running) -> list[int]:
    """How many workers took jobs, after each line that says that one begins or ceases to, from the first on."""
    found = [0]
    for line in running.output.splitlines():
        if "action=worker_up" in line:
            found.append(found[-1] + 1)
        elif "action=draining" in line or "action=worker_crashed" in line:
            found.append(found[-1] - 1)
    return found[1:]


def answered(jobs: list[Any], num_rows: int) -> int:
    """How many of `jobs` have a whole result; waits for each."""
    return sum(len(job.get(timeout=TIMEOUT_S)) == num_rows for job in jobs)


def in_flight(server: str, alias: str) -> list[str]:
    """Messages of a model that are still held by somebody."""
    with redis.Redis.from_url(server) as client:
        return [tag.decode() for tag, value in client.hgetall("unacked").items() if f"embed.{alias}".encode() in value]
