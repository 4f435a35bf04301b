"""Jobs run as a worker's pool runs them, with Celery's own tracer, against a server of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import msgpack
import numpy as np
from celery import Celery
from celery.app.trace import build_tracer
from celery.backends.redis import RedisBackend

from embedq import tasks
from embedq.core.errors import InvalidInput
from embedq.core.results import Embeddings
from embedq.workers.jobs.result_backend import use_batches
from tests.own_server import OwnServer


@contextmanager
def application(url: str, is_worker: bool = True, **settings: Any) -> Iterator[Celery]:
    """An application with our configuration, a worker's or a producer's backend, and tasks that need no engine."""
    CALLS.clear()
    app, backends = make_app(url, is_worker, **settings), []
    make_backend = app._get_backend
    app._get_backend = lambda: backends.append(make_backend()) or backends[-1]  # one for each thread
    try:
        yield app
    finally:
        for one in backends:
            close(one)
        app.close()


def close(one: RedisBackend) -> None:
    one.result_consumer.stop()
    one.result_consumer._pubsub = None  # results that are collected later would connect it again
    one.client.close()
    one.client.connection_pool.disconnect()


def make_app(url: str, is_worker: bool = True, **settings: Any) -> Celery:
    app = Celery("tests", set_as_current=False, fixups=[])
    app.config_from_object(
        {name: value for name, value in vars(tasks.config).items() if not name.startswith("_") and name != "wire"}
        | {"broker_url": url, "result_backend": url, "redis_socket_timeout": 1}
        | settings
    )
    if is_worker:
        use_batches(app)

    @app.task(name="embed_one", shared=False)
    def embed_one(value: float = 0.0) -> Embeddings:
        return Embeddings(dense=np.full((1, 384), value, np.float32), model="minilm")

    @app.task(name="fail", shared=False)
    def fail() -> None:
        raise InvalidInput("number 3 is int")

    @app.task(name="call", shared=False)
    def call(index: int) -> Any:
        return CALLS[index]()

    @app.task(name="sink", shared=False)
    def sink(*args: Any) -> None: ...

    return app


#: Bodies of the task `call`: what a test wants to happen within a job.
CALLS: list[Callable[[], Any]] = []


def run(app: Celery, name: str, *args: Any, job_id: str | None = None, **request: Any) -> str:
    """Run a job as a pool does: Celery's tracer, on this thread. Returns the job's id."""
    job_id = job_id or str(uuid4())
    tracer = build_tracer(name, app.tasks[name], app=app)
    tracer(job_id, list(args), {}, {"id": job_id, "task": name, "delivery_info": {}, "headers": None} | request)
    return job_id


def blob(own: OwnServer, job_id: str) -> dict[str, Any]:
    return msgpack.unpackb(own.client.get(f"celery-task-meta-{job_id}"))
