"""What is measured: a real server, a real worker, and the producer's hands on both."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from embedq import tasks
from embedq.workers import embedded
from tests.bench.real_texts import MAX_TOKENS
from tests.running import start_workers

#: The measured model's name.
ALIAS = "bench"

#: Priority of everything bulk, and where the server keeps such jobs.
BULK_PRIORITY, BULK_QUEUE = 9, "embed:9"

#: Seconds that the worker's answer to a command may take while it computes.
_CONTROL_TIMEOUT_S = 30.0

#: Between two looks at the server: two commands that cost it and us a tenth of a millisecond.
POLL_S = 0.01


@dataclass(frozen=True)
class Subject:
    """The model, and what its worker is told beside its defaults."""

    model: Path
    device: str = "cpu"
    precision: str = "auto"
    #: Settings of the worker by their names ("max_batch_tokens").
    settings: dict[str, str] = field(default_factory=dict)
    #: Tokens that a sequence is cut to.
    max_length: int = MAX_TOKENS

    def environment(self, url: str, **more: str) -> dict[str, str]:
        """Variables of one worker."""
        model = {"path": str(self.model), "precision": self.precision, "max_length": self.max_length}
        settings = {f"EMBEDQ_{name.upper()}": value for name, value in (self.settings | more).items()}
        defaults = {"EMBEDQ_DEFAULT_EMBED": ALIAS, "EMBEDQ_DEFAULT_RERANK": ALIAS}
        return {"EMBEDQ_REDIS_URL": url, "EMBEDQ_MODELS": json.dumps({ALIAS: model}), **defaults, **settings}


@contextmanager
def server() -> Iterator[str]:
    """A server of this run, with the producer side of this process pointed at it; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="embedq-bench-") as directory:
        tasks.config.wire["data_dir"] = directory
        with embedded.server() as url:
            tasks.app.conf.update(broker_url=url, result_backend=url)
            yield url
            tasks.app.close()


class Worker:
    """One worker, as a producer sees and steers it."""

    def __init__(self, url: str, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        self.client = redis.Redis.from_url(url)
        # A producer that keeps no results: with a result backend it would subscribe to thousands of
        # channels, and the server would send it every vector while we measure.
        self._sender = Celery("bench", broker=url, backend="disabled://", set_as_current=False)
        self._sender.conf.update(
            broker_transport_options=tasks.config.broker_transport_options,
            task_serializer="embedq",
            task_routes=(tasks.config.route,),
        )

    @property
    def model_line(self) -> str:
        """The worker's line on its model: device, precision and why."""
        return next((line for line in self.log if "action=model_loaded" in line), "").partition("action=")[2]

    @cached_property
    def pid(self) -> int:
        """Of its process."""
        found: Any = tasks.app.control.inspect([self.name], timeout=_CONTROL_TIMEOUT_S, limit=1).stats()
        return int(found[self.name]["pid"])

    def send(self, jobs: list[list[str]]) -> list[str]:
        """Send bulk jobs; returns their ids."""
        with self._sender.producer_pool.acquire(block=True) as producer:
            return [self._send(texts, producer) for texts in jobs]

    def pause(self) -> None:
        """Let the worker finish, and take nothing more from the queue of embed jobs."""
        self._control("cancel_consumer", "embed")
        self._wait_for_queues(lambda names: "embed" not in names)
        # It may still be waiting for one job of that queue: give it one, which is then out of the way.
        self.send([["a text"]])
        self.client.delete(BULK_QUEUE)
        while self.client.hlen("unacked"):
            time.sleep(POLL_S)

    def resume(self) -> None:
        """Let it take jobs again."""
        self._control("add_consumer", "embed")

    def num_waiting(self) -> tuple[int, int]:
        """Bulk jobs in the queue, and jobs of any kind that the worker holds."""
        with self.client.pipeline(transaction=False) as both:
            queued, held = both.llen(BULK_QUEUE).hlen("unacked").execute()
        return int(queued), int(held)

    def num_done(self, ids: list[str]) -> int:
        """How many of these jobs have a result."""
        return int(self.client.exists(*map(_key, ids)))

    def forget(self, ids: list[str]) -> None:
        """Drop results. RuntimeError if one of some looked at is not a success."""
        for job_id in ids[:: max(1, len(ids) // 50)]:
            state = tasks.app.AsyncResult(job_id).state
            if state != "SUCCESS":
                raise RuntimeError(f"job {job_id} is {state}; the worker's log ends:\n" + "\n".join(self.log[-15:]))
        self.drop(ids)

    def drop(self, ids: list[str]) -> None:
        """Drop results, whatever they are."""
        self.client.unlink(*map(_key, ids))

    def stats(self) -> dict[str, float]:
        """What the worker counts since its start (`inspect embedq_stats`); empty if it does not know that."""
        answers = tasks.app.control.broadcast(
            "embedq_stats", destination=[self.name], reply=True, timeout=_CONTROL_TIMEOUT_S, limit=1
        )
        answer = answers[0][self.name] if answers else {}
        return {} if "error" in answer else dict(answer)

    def close(self) -> None:
        self._sender.close()
        self.client.close()

    def _send(self, texts: list[str], producer: Any) -> str:
        shown = f"{len(texts):,} texts, {sum(map(len, texts)):,} characters"
        options = {"priority": BULK_PRIORITY, "argsrepr": shown, "kwargsrepr": "{}"}
        return str(self._sender.send_task("tasks.embed", args=[texts], producer=producer, **options).id)

    def _control(self, command: str, *args: Any) -> None:
        options = {"destination": [self.name], "reply": True, "timeout": _CONTROL_TIMEOUT_S, "limit": 1}
        (answer,) = getattr(tasks.app.control, command)(*args, **options)
        if "ok" not in answer[self.name]:
            raise RuntimeError(f"the worker answered {answer[self.name]} to {command}")

    def _wait_for_queues(self, is_right: Any) -> None:
        inspect = tasks.app.control.inspect(destination=[self.name], timeout=_CONTROL_TIMEOUT_S, limit=1)
        while not is_right({queue["name"] for queue in inspect.active_queues()[self.name]}):
            time.sleep(POLL_S)


@contextmanager
def worker(subject: Subject, url: str, **settings: str) -> Iterator[Worker]:
    """One worker with these settings added to the subject's, ready and warm."""
    where = ("--cpu-workers", "1") if subject.device == "cpu" else ("--devices", subject.device)
    with start_workers(subject.environment(url, **settings), *where) as running:
        name = running.wait_for("action=worker_ready")[0].partition("worker=")[2].split()[0]
        started = Worker(url, name, running.lines)
        try:
            yield started
        finally:
            started.close()


def _key(job_id: str) -> str:
    return f"celery-task-meta-{job_id}"
