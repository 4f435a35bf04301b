"""A plain Celery application: its own transport, pools and result backend, and a task that costs nothing.

Started as `celery -A tests.bench.stock worker`. What it shares with ours is what is not measured:
the serializer, the result, events, late acknowledgement.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from celery import Celery
from celery.signals import worker_ready

from embedq import tasks
from embedq.core.results import Embeddings

DIMENSIONS = 384

_VECTOR = np.linspace(1, 2, DIMENSIONS, dtype=np.float32)
_VECTOR /= np.linalg.norm(_VECTOR)

#: What every job gives.
_RESULT = Embeddings(dense=_VECTOR[np.newaxis], model="costless")

QUEUE, TASK = "stock", "stock.embed"

_URL = os.environ.get("EMBEDQ_REDIS_URL") or tasks.config.redis_url()

app = Celery("stock", broker=_URL, backend=_URL, set_as_current=False)
app.conf.update(
    task_default_queue=QUEUE,
    task_serializer="embedq",
    result_serializer="embedq",
    accept_content=["embedq"],
    result_accept_content=["embedq"],
    task_acks_late=os.environ.get("STOCK_ACKS", "late") == "late",
    worker_send_task_events=True,
    broker_connection_retry_on_startup=True,
    worker_redirect_stdouts=False,
)


@app.task(name=TASK)
def embed(texts: list[str], **options: Any) -> Embeddings:
    """The same result whatever the texts."""
    return _RESULT


@worker_ready.connect(weak=False)
def _say(**_: Any) -> None:
    print("stock worker is ready", flush=True)
