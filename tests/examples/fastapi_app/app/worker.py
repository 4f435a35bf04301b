"""The service's own Celery application and its tasks: `celery -A app.worker worker`."""

from celery import Celery

from embedq.tasks import Embeddings, connect

app = Celery("service")
app.conf.update(task_default_queue="service", broker_connection_retry_on_startup=True)
connect(app)


@app.task
def count(vectors: Embeddings) -> int:
    """The number of vectors; a service would store them."""
    return len(vectors)
