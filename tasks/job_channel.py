"""The producer's channel: puts jobs into their queues, through one client, and none where a queue has no room for it.

kombu makes a client for each message that it publishes, which took a fifth of what it costs to send a job.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import redis

from embedq.tasks.celery_private import PublishingChannel, transport_with
from embedq.tasks.queue_cap import QueueCap, put_within

#: Priorities up to this one are interactive; see `core.batching.job`.
MAX_INTERACTIVE_PRIORITY = 4


@cache
def job_transport(scheme: str, cap: QueueCap | None) -> type:
    """kombu's transport for URLs of a scheme, but its channels put jobs as this module says, within `cap`."""
    return transport_with(scheme, lambda base: type("JobChannel", (_JobChannel, base), {"cap": cap}))


class _JobChannel(PublishingChannel):
    """A channel of a producer."""

    cap: ClassVar[QueueCap | None]
    _client: Any = None

    def takes(self, queue: str) -> bool:
        """Returns True for queues of jobs; parts of datasets are bounded by their runs."""
        return queue.partition(".")[0] in ("embed", "rerank")

    def put(self, messages: Sequence[tuple[str, int, str]]) -> None:
        """Put messages in their order. With a cap, those of one queue and class are put at once, or as QueueFull none."""
        if self._client is None or self._client.connection_pool is not self.pool:
            self._client = redis.Redis(
                connection_pool=self.pool
            )  # kombu's would prefix the first key of a script alone
        if self.cap is None:
            self._put_all(messages)
            return
        classes: dict[tuple[str, bool], list[tuple[int, str]]] = {}
        for queue, step, message in messages:
            classes.setdefault((queue, step > MAX_INTERACTIVE_PRIORITY), []).append((step, message))
        for (queue, is_bulk), some in classes.items():
            steps = [step for step in self.priority_steps if (step > MAX_INTERACTIVE_PRIORITY) == is_bulk]
            lists = {step: self.list_key(queue, step) for step in steps}
            put_within(self.cap, self._client, self.global_keyprefix, queue, lists, some)

    def _put_all(self, messages: Sequence[tuple[str, int, str]]) -> None:
        if len(messages) == 1:
            queue, step, message = messages[0]
            self._client.lpush(self.list_key(queue, step), message)
            return
        with self._client.pipeline(transaction=False) as pipe:
            for queue, step, message in messages:
                pipe.lpush(self.list_key(queue, step), message)
            pipe.execute()
