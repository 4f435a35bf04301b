"""Result backend of a producer: Celery's own on Redis, without the subscription at every call.

Keys, blobs and channels are Celery's, so that stock producers and stock workers read and write the
same. Knows nothing of queues, models or batches.
"""

from __future__ import annotations

from typing import Any

from celery.backends.redis import RedisBackend, SentinelBackend


class ResultBackend(RedisBackend):
    """Results on one server. Nothing is subscribed when a job is sent: `delay()` costs one LPUSH."""

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Celery would subscribe to the job's channel here, and stay subscribed if nobody waits."""


class SentinelResultBackend(ResultBackend, SentinelBackend):
    """Results on the server that Sentinel names."""
