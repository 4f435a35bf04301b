"""One worker process, pinned to its device at launch: loads its models, warms them up, serves jobs, drains.

The launcher starts it, or a supervisor of your own with the same environment. It takes no job
before its models are loaded and warm; if a model cannot load, the process ends with code 1, so
that jobs stay in the queue instead of failing one after another.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import Celery
from celery.platforms import EX_FAILURE
from celery.signals import setup_logging, worker_ready

from embedq.core.errors import EmbedqError

try:
    from embedq import tasks
except EmbedqError as error:  # a setting that producers read as well
    if __name__ == "__main__":
        sys.exit(f"cannot start: {error}")
    raise
from embedq import __version__, core
from embedq.core.checkpoint.files import refuse_absent
from embedq.core.command_line import EXIT_INTERRUPTED
from embedq.core.engine import Engine
from embedq.core.settings import Settings, read_settings
from embedq.tasks.datasets.part_task import PartTask
from embedq.tasks.models import Served
from embedq.tasks.speeds import Speeds
from embedq.workers import logs
from embedq.workers.broker import transport
from embedq.workers.broker.dead_letters import failure_writer
from embedq.workers.broker.decompression import restrict
from embedq.workers.broker.leases import LeaseRenewal
from embedq.workers.broker.server_check import refuse_cluster, with_server
from embedq.workers.context import Lifecycle, WorkerContext
from embedq.workers.exit_codes import EXIT_BROKEN, EXIT_CANNOT_START, EXIT_DEVICE_DEAD
from embedq.workers.jobs.events import EventsInBulk, use_written_events
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.jobs.pool import pool_for
from embedq.workers.jobs.rejected_messages import Refusal
from embedq.workers.jobs.request import EngineRequest, OtherRequest
from embedq.workers.jobs.result_backend import use_batches
from embedq.workers.monitoring import remote_commands, tracing
from embedq.workers.monitoring.health import Health, readiness_for
from embedq.workers.monitoring.heartbeat import Heart, launcher_pipe
from embedq.workers.monitoring.metrics_server import metrics_served
from embedq.workers.monitoring.speed_reports import SpeedReports
from embedq.workers.parts.part_threads import telling_runs
from embedq.workers.queues import queues_of

log = logging.getLogger(__name__)

#: Thresholds of Python's garbage collector. A small job is some hundred objects and leaves no cycles; at Python's own
#: 700 the collector walked through all held jobs again and again, a fifth of a job's cost (docs/measurements.md).
_GC_THRESHOLDS = (50_000, 20, 50)

#: A compressed message may hold this many times the bytes of texts that a job may have: beside its texts it carries
#: options, and the jobs that follow it in a chain.
_INFLATED_PER_JOB = 2


def main() -> int:
    """Run one worker until SIGTERM; returns the exit code."""
    try:
        logs.set_up(os.environ.get("EMBEDQ_LOG_LEVEL", "INFO"))
    except EmbedqError as error:
        logs.set_up()
        log.error("cannot start: %s", error, extra={"action": "cannot_start"})
        return EXIT_CANNOT_START
    logs.quiet_libraries()
    lifecycle = Lifecycle()
    health, heart = Health(lifecycle), Heart(lifecycle, launcher_pipe())
    heart.start()
    try:
        settings = read_settings()
        refuse_absent(settings.models)
        use_batches(tasks.app)
        restrict(_INFLATED_PER_JOB * tasks.config.wire["max_bytes_per_job"])
        with metrics_served(settings, health, heart):
            return _run(settings, health, heart)
    except KeyboardInterrupt:  # before it takes jobs; from then on Celery drains
        log.info("interrupted", extra={"action": "interrupted"})
        return EXIT_INTERRUPTED
    except EmbedqError as error:  # the operator's mistake, or a device too small to warm up on
        log.error("cannot start: %s", error, extra={"action": "cannot_start"})
        return EXIT_CANNOT_START
    except Exception:
        log.exception("the worker ends with an unexpected error", extra={"action": "worker_broken"})
        return EXIT_BROKEN


def _run(settings: Settings, health: Health, heart: Heart) -> int:
    """Load the models, warm them up and serve. Returns the exit code."""
    url = tasks.app.conf.broker_url
    with_server(url, lambda: refuse_cluster(tasks.app.connection_for_read()))
    started_s = time.monotonic()
    with _load(settings) as engine:
        engine.on_dead = _end_at_once
        if settings.traces:
            tracing.start(engine.meter, worker_name(engine))
        engine.warm_up()
        _log_ready(engine, settings, time.monotonic() - started_s)
        with_server(url, lambda: announce(engine))
        return serve(engine, settings, health, heart)


def _load(settings: Settings) -> Engine:
    """`core.load_all` without garbage collection: of all that torch's imports make nothing is garbage, and looking costs a sixth."""
    gc.disable()
    try:
        return core.load_all(settings)
    finally:
        gc.enable()


def serve(engine: Engine, settings: Settings, health: Health, heart: Heart) -> int:
    """Take jobs until SIGTERM, then finish those taken. Returns Celery's exit code."""
    held = HeldJobs(engine, f"{worker_name(engine)}/{os.getpid()}")
    context = WorkerContext(
        name=worker_name(engine),
        process=f"{worker_name(engine)}/{os.getpid()}",
        lifecycle=health.lifecycle,
        room=held.room,
        max_bulk_wait_s=settings.max_bulk_wait_s,
        running=held.running,
        is_alive=lambda: held.is_alive,
        cancel=held.cancel,
        fail=telling_runs(failure_writer(tasks.app)),
        end=partial(_end_at_once, code=EXIT_BROKEN),
        last_beat=lambda: heart.last,
    )
    put_into(tasks.app, context)
    tasks.app.has_engine = True
    tasks.EngineTask.engine, tasks.EngineTask.Request = engine, EngineRequest
    tasks.app.Task.Request = OtherRequest
    PartTask.Request = EngineRequest
    setup_logging.connect(_keep_our_logging)
    on_ready = _ready(heart, held)
    worker_ready.connect(on_ready)
    worker = tasks.app.EngineWorker(
        hostname=context.name,
        pool=pool_for(context, held),
        concurrency=settings.max_jobs,
        prefetch_multiplier=0,  # `HeldJobs.room` bounds how much is fetched, in tokens
        queues=list(queues_of(engine)),
        loglevel="WARNING",
        quiet=True,
        task_events=True,
        without_gossip=True,
        without_mingle=True,
        heartbeat_interval=5,
    )
    spare_the_garbage_collector()
    engine.backlog.on_room = transport.wake
    health.serves(context.name, held)
    speeds = Speeds(tasks.app.backend.client, tasks.key_prefix(tasks.app))
    renew = partial(tasks.embed.registry.renew, announcements(engine), context.name, settings.replace_revision)
    with SpeedReports(speeds, context.name, health, lambda: heart.last.models, renew, held.load):
        worker.start()
    return EXIT_BROKEN if worker.exitcode == EX_FAILURE else int(worker.exitcode or 0)


def put_into(app: Celery, context: WorkerContext) -> None:
    """Make the worker that `app` is about to build one of ours: its transport, steps, events and remote control."""
    transport.install(context)
    remote_commands.install(app, context)
    use_written_events(app)
    app.steps["consumer"].update((LeaseRenewal, Refusal, EventsInBulk, readiness_for(context)))


def spare_the_garbage_collector() -> None:
    """Collect seldom, and never look at what stays for the life of the process: models, libraries, settings."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def worker_name(engine: Engine) -> str:
    """`<models>.<device>@<host>`, unique on a host because the launcher numbers CPU workers too; or as `celery -n` names it."""
    if name := os.environ.get("EMBEDQ_WORKER_NAME"):
        return name
    device = os.environ.get("EMBEDQ_DEVICE_LABEL") or next(iter(engine.models.values())).device.replace(":", "")
    return f"{'+'.join(engine.models)}.{device}@{socket.gethostname()}"


def announce(engine: Engine) -> None:
    """Announce to producers what this worker serves. InvalidSettings if it contradicts what another announced."""
    name, may_replace = worker_name(engine), engine.settings.replace_revision
    tasks.embed.registry.announce(announcements(engine), name, may_replace)


def announcements(engine: Engine) -> list[Served]:
    """Returns one announcement for each model, for producers."""
    defaults = {"embed": engine.calls.default_embed, "rerank": engine.calls.default_rerank}
    return [
        Served(
            alias=alias,
            source=engine.settings.models[alias].path,
            kinds=["embed", "rerank"] if model.spec.is_embedder else ["rerank"],
            dimensions=model.spec.dimensions,
            max_length=model.spec.max_length,
            outputs=sorted(model.outputs),
            default_for=[kind for kind, default in defaults.items() if default == alias],
            version=__version__,
            revision=engine.settings.models[alias].revision or "",
            content=model.spec.revision.partition(".")[0],
            reading=model.spec.revision.partition(".")[2],
            precision=model.precision,
            is_auto=engine.settings.models[alias].precision == "auto",
        )
        for alias, model in engine.models.items()
    ]


def _end_at_once(reason: str, code: int = EXIT_DEVICE_DEAD) -> None:
    """End the process at once: a thread that hangs in a driver cannot be stopped, and other workers can do its jobs."""
    is_device = code == EXIT_DEVICE_DEAD
    log.critical(
        "%s failed, the worker ends and its jobs go to other workers: %s",
        "the device" if is_device else "a thread",
        reason,
        extra={"action": "worker_device_dead" if is_device else "worker_broken", "code": code},
    )
    logging.shutdown()
    os._exit(code)


def _log_ready(engine: Engine, settings: Settings, seconds: float) -> None:
    """Log every choice, with the reason for each automatic one."""
    for alias, model in engine.models.items():
        log.info(
            "model loaded",
            extra={
                "action": "model_loaded",
                "model": alias,
                "path": settings.models[alias].path,
                "family": model.spec.family,
                "pooling": model.spec.pooling,
                "max_length": model.spec.max_length,
                "device": model.device,
                "precision": f"{model.precision} ({model.reason})",
            },
        )
    limits = settings.model_dump(exclude={"models", "wire"}) | {"max_batch_tokens": engine.stats()["max_batch_tokens"]}
    log.info("models are warm", extra={"action": "warm", "seconds": round(seconds, 1), **limits})


def _keep_our_logging(**_: Any) -> None:
    """Do nothing: if this signal has a receiver, Celery leaves logging alone."""


def _ready(heart: Heart, held: HeldJobs) -> Callable[..., None]:
    """The receiver of Celery's signal that the worker takes jobs."""

    def ready(sender: Any = None, **_: Any) -> None:
        heart.serves(sender.hostname, held)
        # Logged once the event loop has turned: Celery signals before it has subscribed to remote control.
        sender.hub.call_soon(lambda: sender.hub.call_soon(log_ready, sender.hostname))

    def log_ready(worker: str) -> None:
        fields = {"worker": worker, "pid": os.getpid(), "version": __version__}
        log.info("ready", extra={"action": "worker_ready", **fields})

    return ready


if __name__ == "__main__":
    sys.exit(main())
