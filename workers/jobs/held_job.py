"""A job in a worker's hands: what Celery wants to be told of it, and what the engine makes of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from embedq.core.batching.job import Call, Job
from embedq.core.engine import Engine
from embedq.workers.jobs.answer_thread import Timer


class HeldJob:
    """A job between `on_apply` and its acknowledgement."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.target = target
        self.args = args
        self.on_accepted = options["accept_callback"]
        self.on_success = options["callback"]
        self.on_failure = options["error_callback"]
        self.on_timeout = options["timeout_callback"]
        self.soft_timeout_s: float | None = options.get("soft_timeout")
        self.timeout_s: float | None = options.get("timeout")
        #: Celery's bookkeeping of it, which the callbacks are methods of.
        self.request: Any = self.on_accepted.__self__
        #: None for tasks that are not the engine's, Celery's own for example.
        self.job: Job | None = None
        #: Raised as the task's own error instead of the engine's answer.
        self.error: Exception | None = None
        self.is_accepted = False
        self.timers: list[Timer] = []

    @property
    def waits(self) -> bool:
        """Whether nothing of it is computed yet."""
        return self.job is not None and not self.job.is_over and not self.is_accepted

    @property
    def queue(self) -> str:
        """The queue it came through."""
        return str((self.request.delivery_info or {}).get("routing_key") or "")

    def terminate(self, signal: Any = None) -> None:
        """Called by Celery for a job that is to stop. A batch under way is not interrupted, its rows are dropped."""
        if self.job:
            self.job.answer.cancel()

    def open_call(self, engine: Engine) -> Call:
        """The message's call. Runs on an encode thread; what it raises is the job's answer."""
        args, kwargs, _ = self.args[3]
        call: Call = self.request.task.open_call(engine, args, kwargs)
        return call

    def answer(self) -> Future[Any] | None:
        """What its task gives or raises; None for a task that computes it itself."""
        if self.error is None:
            return self.job.answer if self.job else None
        failed: Future[Any] = Future()
        failed.set_exception(self.error)
        return failed
