"""An application with tasks and a worker of its own, whose messages and results are JSON, as Celery has it by default."""

from __future__ import annotations

from typing import Any

import numpy as np
from celery import Celery

from embedq import tasks

QUEUE = "json"

app = Celery(QUEUE, set_as_current=False)
tasks.connect(app)
app.conf.update(
    {"task_default_queue": QUEUE, "broker_connection_retry_on_startup": True, "worker_hijack_root_logger": False}
)


#: Only `celery beat` reads it.
app.conf.beat_schedule = {"note": {"task": "json.note", "schedule": 1.0, "args": ("sent by beat",)}}


@app.task(name="json.split")
def split(text: str) -> list[str]:
    """The sentences of `text`."""
    return text.split(". ")


@app.task(name="json.shape")
def shape(vectors: tasks.Embeddings) -> list[int]:
    """(num_texts, dim) of the vectors that came with the message."""
    return list(np.shape(vectors))


@app.task(name="json.shapes")
def shapes(parts: list[tasks.Embeddings]) -> list[list[int]]:
    """(num_texts, dim) of each part, in their order."""
    return [list(np.shape(part)) for part in parts]


@app.task(name="json.texts_of")
def texts_of(shape: list[int]) -> list[str]:
    """As many texts as there were vectors."""
    return ["a text"] * shape[0]


@app.task(name="json.note")
def note(*what: Any) -> list[Any]:
    """The arguments it was called with."""
    return list(what)
