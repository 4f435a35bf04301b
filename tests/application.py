"""An application with tasks and a worker of its own, which combines them with ours.

Started by tests as `celery -A tests.application worker`. `tasks.connect` does what it takes to share a server with us.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, Task, group

from embedq import tasks

QUEUE = "application"

app = Celery(QUEUE, set_as_current=False)
app.conf.update(task_default_queue=QUEUE, broker_connection_retry_on_startup=True, worker_hijack_root_logger=False)
tasks.connect(app, share_serializer=True)


class Unsteady(Exception):
    """The first two tries of a task."""


@app.task(name="application.split")
def split(text: str) -> list[str]:
    """The sentences of `text`, which an application embeds next."""
    return text.split(". ")


@app.task(name="application.unsteady", bind=True, autoretry_for=(Unsteady,), default_retry_delay=0)
def unsteady(self: Task, texts: list[str]) -> list[str]:
    """`texts`, at the third try."""
    if self.request.retries < 2:
        raise Unsteady
    return texts


@app.task(name="application.shape")
def shape(vectors: tasks.Embeddings) -> list[int]:
    """(num_texts, dim) of the vectors that came with the message."""
    assert vectors.dense is not None
    return list(vectors.dense.shape)


@app.task(name="application.shapes")
def shapes(parts: list[tasks.Embeddings]) -> list[list[int]]:
    """(num_texts, dim) of each part, in their order."""
    return [shape(part) for part in parts]


@app.task(name="application.texts_of")
def texts_of(shape: list[int]) -> list[str]:
    """As many texts as there were vectors."""
    return ["a text"] * shape[0]


@app.task(name="application.embed_each", bind=True)
def embed_each(self: Task, texts: list[str]) -> None:
    """Replaces itself with a job of ours for each text."""
    raise self.replace(group(tasks.embed.si([text]) for text in texts))


@app.task(name="application.embed_too", bind=True)
def embed_too(self: Task, texts: list[str]) -> None:
    """Adds a job of ours to the header of the chord it is part of, and answers None."""
    self.add_to_chord(tasks.embed.si(texts))


@app.task(name="application.stamps", bind=True)
def stamps(self: Task, *_: Any) -> Any:
    """The stamps that it was sent with."""
    return self.request.stamps


@app.task(name="application.note")
def note(*what: Any) -> list[Any]:
    """The arguments it was called with."""
    return list(what)
