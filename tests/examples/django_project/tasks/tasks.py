"""The project's Celery tasks, found by `autodiscover_tasks`."""

from celery import shared_task

from core.models import Document
from embedq.tasks import Embeddings


@shared_task
def store(vectors: Embeddings, ids: list[int]) -> int:
    """Keep the vectors of documents; returns of how many."""
    for number, vector in zip(ids, vectors.dense, strict=True):
        Document.objects.filter(pk=number).update(vector=vector.tobytes())
    return len(ids)
