"""Leases on kombu's Redis transport: a live worker keeps its jobs, a dead one's go to another.

kombu records each job it took in the sorted set `unacked_index`, scored by the time, and gives
back what is older than `visibility_timeout`, also under a worker that is still busy with it. This
step renews those times while the worker's event loop runs, so that the timeout can be short.

    unacked         hash   delivery tag -> [message, exchange, routing key]
    unacked_index   zset   delivery tag, scored by when it was taken or last renewed
"""

from __future__ import annotations

import logging
import time
from typing import Any

from celery import bootsteps

log = logging.getLogger(__name__)

#: Renewals per lease: two may fail before a job is given away.
_RENEWALS_PER_LEASE = 3


class LeaseRenewal(bootsteps.StartStopStep):
    """Consumer step that renews the leases of everything this worker holds."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Begin renewing; called again after each reconnect, with a new channel."""
        self.stop(consumer)
        lease_s = consumer.app.conf.broker_transport_options["visibility_timeout"]
        self._timer = consumer.timer.call_repeatedly(
            lease_s / _RENEWALS_PER_LEASE, renew, (consumer.task_consumer.channel,)
        )

    def stop(self, consumer: Any) -> None:
        """Stop renewing: what is still held then is given back by the transport, or expires."""
        timer, self._timer = getattr(self, "_timer", None), None
        if timer is not None:
            timer.cancel()


def renew(channel: Any) -> int:
    """Renew every lease of `channel`; returns how many it holds.

    Leans on `qos._delivered`, kombu's table of what is not yet acknowledged. XX: a job that was
    acknowledged or given away in the meantime must not come back into the index.
    """
    tags = list(channel.qos._delivered)
    if tags:
        with channel.conn_or_acquire() as client:
            client.zadd(channel.unacked_index_key, dict.fromkeys(tags, time.time()), xx=True)
        log.debug("leases renewed", extra={"action": "leases_renewed", "num_jobs": len(tags)})
    return len(tags)
