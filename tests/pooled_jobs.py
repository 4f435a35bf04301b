"""Jobs as Celery hands them to the pool: real requests of real messages, whose callbacks note what the pool reports."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kombu.message import Message
from kombu.serialization import dumps

from embedq import tasks
from embedq.workers.jobs.held_job import HeldJob
from embedq.workers.jobs.pool import EnginePool
from embedq.workers.jobs.request import EngineRequest
from tests.checkpoints import PATIENCE_S


class Noted(EngineRequest):
    """A request that notes what it is told, instead of publishing and acknowledging it."""

    #: What was reported, in order: "accepted", "answered", "failed", "soft limit", "limit", "given back", "revoked".
    notes: list[str]

    @property
    def reported(self) -> threading.Condition:
        found: threading.Condition = self.__dict__.setdefault("_reported", threading.Condition())
        return found

    def note(self, what: str) -> None:
        with self.reported:
            self.__dict__.setdefault("notes", []).append(what)
            self.reported.notify_all()

    def wait_for(self, *notes: str) -> list[str]:
        """Wait until these were noted, in any order among others; returns all notes."""
        with self.reported:
            noted: list[str] = self.__dict__.setdefault("notes", [])
            assert self.reported.wait_for(lambda: set(notes) <= set(noted), PATIENCE_S), (notes, noted)
            return list(noted)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        self.note("accepted")

    def on_success(self, failed__retval__runtime: Any, **kwargs: Any) -> None:
        self.__dict__["outcome"] = failed__retval__runtime
        self.note("answered")

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> None:
        self.note("failed")

    def on_timeout(self, soft: bool, timeout: float | None) -> None:
        self.note("soft limit" if soft else "limit")

    def reject(self, requeue: bool = False) -> None:
        self.note("given back" if requeue else "buried")

    def revoked(self) -> bool:
        if self.__dict__.get("is_unwanted"):
            self.note("revoked")
        return bool(self.__dict__.get("is_unwanted"))


def request_of(texts: list[str], job_id: str = "job", priority: int = 0, **headers: Any) -> Noted:
    """A job that embeds `texts`."""
    content_type, encoding, body = dumps([[texts], {}, {}], "embedq")
    message = Message(
        body=body,
        headers={"task": "tasks.embed", "id": job_id, "root_id": job_id, "parent_id": None} | headers,
        content_type=content_type,
        content_encoding=encoding,
        accept={content_type},
        delivery_info={"exchange": "", "routing_key": "embed"},
        properties={"priority": priority},
    )
    return Noted(message, app=tasks.app, task=tasks.embed, body=message.body, headers=message.headers, decoded=False)


def answer_of(*_: Any) -> tuple[bool, Any, float]:
    """In place of Celery's tracer: what the task returns or raises, as the tracer reports it."""
    answer = tasks.engine_task.current_answer()
    assert answer is not None
    error = answer.exception()
    return error is not None, error or answer.result(), 0.0


def apply(pool: EnginePool, request: Noted, target: Callable[..., Any] = answer_of, **limits: Any) -> HeldJob:
    """Hand a job to the pool as Celery's request does."""
    arguments = ("tasks.embed", request.id, request.request_dict, request._body, None, None)
    return pool.on_apply(
        target,
        arguments,
        {},
        accept_callback=request.on_accepted,
        callback=request.on_success,
        error_callback=request.on_failure,
        timeout_callback=request.on_timeout,
        **limits,
    )
