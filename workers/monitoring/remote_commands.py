"""The worker's remote-control commands, beside Celery's own.

celery -A embedq.tasks inspect embedq_stats       batches, tokens, padding, time on the device
celery -A embedq.tasks inspect embedq_status      its last heartbeat: state, jobs/s, tokens/s, what waits, memory
celery -A embedq.tasks control shutdown           drains, as SIGTERM does
celery -A embedq.tasks control revoke JOB_ID      as in Celery; a waiting job leaves the backlog at once
celery -A embedq.tasks control terminate TERM ID  the same for a running job; `embedq cancel` does both, and is remembered
"""

from __future__ import annotations

import logging
import os
import signal as signals
from typing import Any

from celery import Celery
from celery.worker import control
from kombu import pidbox

from embedq.workers.broker.transport import BROKEN
from embedq.workers.celery_private import ControlState
from embedq.workers.context import WorkerContext
from embedq.workers.launcher.status_table import row

log = logging.getLogger(__name__)


class Node(pidbox.Node):
    """Remote-control node that survives malformed commands.

    After an error Celery subscribes anew, and misses the commands that are sent meanwhile.
    """

    def handle_message(self, body: Any, message: Any = None) -> Any:
        """Carry out a command as kombu does; one that cannot be carried out is logged, without its words, and dropped."""
        try:
            return super().handle_message(body, message)
        except BROKEN:
            raise
        except Exception as error:
            extra = {"action": "control_command_refused", "error": type(error).__name__}
            log.warning("a remote-control command cannot be carried out", extra=extra)
            return None


@control.inspect_command(name="embedq_stats")
def embedq_stats(state: ControlState) -> dict[str, Any]:
    """The statistics of this worker's engine since it started."""
    stats: dict[str, Any] = state.consumer.pool.engine.stats()
    return stats


def install(app: Celery, context: WorkerContext) -> None:
    """Make the worker that `app` is about to build answer the commands of this file, and survive malformed ones."""
    app.control.mailbox.node_cls = Node

    @control.inspect_command(name="embedq_status")
    def embedq_status(state: ControlState) -> dict[str, Any]:
        """The last heartbeat of this worker. A launcher answers the same command for all its workers."""
        return {"workers": [row(context.last_beat())]}


@control.control_command(name="shutdown")
def shutdown(state: ControlState, msg: str = "", **_: Any) -> dict[str, str]:
    """Drain and end, exactly as on SIGTERM. Celery's command would use its message as the exit code: a crash."""
    os.kill(os.getpid(), signals.SIGTERM)
    return {"ok": "draining"}


@control.control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(state: ControlState, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> Any:
    """Revoke jobs as Celery does, and drop those that wait in the pool: Celery stops a job only before the pool has it."""
    answer = control.revoke(state, task_id, terminate, signal, **options)
    state.consumer.pool.drop_revoked()
    return answer


@control.control_command(
    name="revoke_by_stamped_headers", variadic="headers", signature="[key1=value1 [key2=value2 [... [keyN=valueN]]]]"
)
def revoke_by_stamped_headers(
    state: ControlState, headers: Any, terminate: bool = False, signal: Any = None, **options: Any
) -> Any:
    """Revoke jobs by their stamped headers as Celery does, and drop those that wait in the pool."""
    answer = control.revoke_by_stamped_headers(state, headers, terminate, signal, **options)
    state.consumer.pool.drop_revoked()
    return answer
