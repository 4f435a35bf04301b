"""Celery applications that import embedq's tasks and have stock workers of their own.

Started by tests as `celery -A tests.stock_applications:plain worker -Q embed`, and so on.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.signals import celeryd_after_setup
from kombu import Queue

from embedq import tasks

#: Its workers' queue, where nobody says otherwise.
QUEUE = "stock"


def _application(**settings: Any) -> Celery:
    """An application of this server that knows nothing of ours but that its workers import our tasks."""
    url = tasks.config.redis_url()
    app = Celery(QUEUE, broker=url, backend=url, include=["embedq.tasks"], set_as_current=False)
    app.conf.update(
        {"task_default_queue": QUEUE, "broker_connection_retry_on_startup": True, "worker_hijack_root_logger": False}
    )
    app.conf.update(settings)
    return app


plain = _application()
by_default_queue = _application(task_default_queue="embed")
by_task_queues = _application(task_queues=[Queue(QUEUE), Queue("rerank.reranker")])
#: Has another database's `embed`, which is no queue of ours.
elsewhere = _application(broker_url=f"{tasks.config.redis_url().rpartition('/')[0]}/7", task_default_queue="embed")
#: Turns to our queue when everything was checked.
late = _application()


@plain.task(name="stock.add", shared=False)
@elsewhere.task(name="stock.add", shared=False)
@late.task(name="stock.add", shared=False)
def add(one: int, other: int) -> int:
    """A job of the application."""
    return one + other


@celeryd_after_setup.connect
def _turn(instance: Any, **_: Any) -> None:
    if instance.app is late:
        late.amqp.queues.select_add("embed")
