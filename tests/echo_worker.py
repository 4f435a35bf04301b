"""A real Celery worker on our transport, without a model: starts in a second, dies on request.

`python -m tests.echo_worker` serves the queue `echo` of the server in EMBEDQ_REDIS_URL.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Collection
from typing import Any

from celery import Celery
from celery.signals import worker_ready
from celery.worker import state

from embedq import tasks
from embedq.workers import logs
from embedq.workers.broker import transport
from embedq.workers.broker.dead_letters import failure_writer
from embedq.workers.broker.leases import LeaseRenewal
from embedq.workers.context import Lifecycle, Room, WorkerContext
from embedq.workers.exit_codes import EXIT_BROKEN
from embedq.workers.heartbeat_line import Beat
from embedq.workers.jobs.request import EngineRequest
from embedq.workers.monitoring import remote_commands

app = Celery("echo", set_as_current=False)
app.config_from_object({name: value for name, value in vars(tasks.config).items() if name != "wire"})
app.conf.task_routes = None
app.conf.task_default_queue = "echo"


@app.task(name="echo", bind=True)
def echo(self: Any, number: int, seconds: float = 0.0) -> int:
    """Its argument, after a while. Each run is counted in the key `runs`."""
    self.backend.client.hincrby("runs", self.request.id, 1)
    time.sleep(seconds)
    return number


@app.task(name="die")
def die() -> None:
    """What a segmentation fault in a model does."""
    os.kill(os.getpid(), signal.SIGKILL)


def cancel(ids: Collection[str]) -> dict[str, str]:
    """Let Celery drop those that arrive."""
    state.revoked.update(ids)
    return {}


def main() -> None:
    logs.set_up("INFO")
    context = WorkerContext(
        name=f"echo-{os.getpid()}@test",
        process=f"echo/{os.getpid()}",
        lifecycle=Lifecycle(),
        room=Room,
        max_bulk_wait_s=2.0,
        running=lambda: [request.id for request in tuple(state.active_requests)],
        is_alive=lambda: True,
        cancel=cancel,
        fail=failure_writer(app),
        end=lambda reason: os._exit(EXIT_BROKEN),
        last_beat=Beat,
    )
    transport.install(context)
    echo.Request = die.Request = EngineRequest
    remote_commands.install(app, context)
    app.steps["consumer"].add(LeaseRenewal)
    worker_ready.connect(lambda **_: print("echo is ready", flush=True), weak=False)
    worker = app.Worker(
        hostname=context.name, pool="threads", concurrency=int(os.environ.get("ECHO_THREADS", "4")),
        loglevel="WARNING", quiet=True, without_gossip=True, without_mingle=True, without_heartbeat=True,
    )  # fmt: skip
    worker.start()
    sys.exit(worker.exitcode or 0)


if __name__ == "__main__":
    main()
