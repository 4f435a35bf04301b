"""One worker process, born pinned to its device: load, warm up, serve, drain.

Started by the launcher, or by a supervisor of your own with the same environment. Takes no job
before its models are loaded and warm; a model that cannot load ends the process with code 1, so
that jobs stay in the queue instead of failing one after another.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import time
from typing import Any

from celery.platforms import EX_FAILURE
from celery.signals import setup_logging, worker_ready

from embedq import __version__, core, tasks
from embedq.core.engine import Engine
from embedq.core.errors import EmbedqError
from embedq.core.settings import Settings, read_settings
from embedq.tasks.models import Served
from embedq.tasks.speeds import Speeds
from embedq.workers import heartbeat_line, logs
from embedq.workers.broker import transport
from embedq.workers.broker.dead_letters import failure_writer
from embedq.workers.broker.decompression import restrict
from embedq.workers.broker.leases import LeaseRenewal
from embedq.workers.broker.server_check import refuse_cluster, with_server
from embedq.workers.exit_codes import EXIT_BROKEN, EXIT_CANNOT_START, EXIT_DEVICE_DEAD
from embedq.workers.jobs.events import EventsInBulk, use_written_events
from embedq.workers.jobs.pool import EnginePool
from embedq.workers.jobs.rejected_messages import Refusal
from embedq.workers.jobs.request import EngineRequest
from embedq.workers.jobs.result_backend import use_batches
from embedq.workers.monitoring import heartbeat, remote_commands, tracing
from embedq.workers.monitoring.health import Readiness, health
from embedq.workers.monitoring.metrics import served as metrics_served
from embedq.workers.monitoring.speed_reports import Reports, speeds_of
from embedq.workers.queues import queues_of

log = logging.getLogger(__name__)

#: Of Python's garbage collector. A small job is some hundred objects and leaves no cycles; at Python's own 700 the
#: collector walked through all jobs a worker holds again and again, a fifth of what a job costs (docs/measurements.md).
_GC_THRESHOLDS = (50_000, 20, 50)

#: A compressed message may inflate to so many times the bytes of texts that a job may have: beside its
#: texts it carries options, and the jobs that follow it in a chain.
_INFLATED_PER_JOB = 2

#: Variables that are neither settings of a worker nor of the wire.
_OTHER_VARIABLES = {"EMBEDQ_CONFIG", "EMBEDQ_DEVICE_LABEL", "EMBEDQ_LOG_LEVEL", heartbeat_line.VARIABLE}


def main() -> int:
    """Run one worker until it is told to stop; returns the exit code."""
    logs.set_up(os.environ.get("EMBEDQ_LOG_LEVEL", "INFO"))
    logs.quiet_libraries()
    heartbeat.start()
    try:
        settings = read_settings()
        use_batches(tasks.app)
        restrict(_INFLATED_PER_JOB * tasks.config.wire["max_bytes_per_job"])
        _warn_of_misspelt_variables()
        with metrics_served(settings, health):
            return _run(settings)
    except EmbedqError as error:  # the operator's mistake, or a device too small to warm up on
        log.error("cannot start: %s", error, extra={"action": "cannot_start"})
        return EXIT_CANNOT_START
    except Exception:
        log.exception("this worker ends with an error nobody expected", extra={"action": "worker_broken"})
        return EXIT_BROKEN


def _run(settings: Settings) -> int:
    """Load, warm up and serve. Returns the exit code."""
    url = tasks.app.conf.broker_url
    with_server(url, lambda: refuse_cluster(tasks.app.connection_for_read()))
    started_s = time.monotonic()
    with _load(settings) as engine:
        engine.on_dead = _end_at_once
        if settings.traces:
            tracing.start(engine.meter, worker_name(engine))
        engine.warm_up()
        _log_ready(engine, settings, time.monotonic() - started_s)
        with_server(url, lambda: tasks.embed.registry.announce(served(engine)))
        return serve(engine, settings)


def _load(settings: Settings) -> Engine:
    """`core.load_all` without garbage collection: of all that torch's imports make nothing is garbage, and looking costs a sixth."""
    gc.disable()
    try:
        return core.load_all(settings)
    finally:
        gc.enable()


def serve(engine: Engine, settings: Settings) -> int:
    """Take jobs until SIGTERM, then finish those taken. Returns Celery's exit code."""
    tasks.app.control.mailbox.node_cls = remote_commands.Node
    tasks.EngineTask.engine = EnginePool.engine = engine
    tasks.EngineTask.Request = EngineRequest
    transport.install()
    transport.Channel.worker = f"{worker_name(engine)}/{os.getpid()}"
    LeaseRenewal.is_alive = lambda: engine.is_alive
    transport.Channel.fail = failure_writer(tasks.app)
    use_written_events(tasks.app)
    tasks.app.steps["consumer"].update((LeaseRenewal, Refusal, EventsInBulk, Readiness))
    setup_logging.connect(_keep_our_logging)
    worker_ready.connect(_log_serving)
    worker = tasks.app.Worker(
        hostname=worker_name(engine),
        pool=EnginePool,
        concurrency=settings.max_jobs,
        prefetch_multiplier=0,  # the pool says how much is fetched, in tokens
        queues=list(queues_of(engine)),
        loglevel="WARNING",
        quiet=True,
        task_events=True,
        without_gossip=True,
        without_mingle=True,
        heartbeat_interval=5,
    )
    spare_the_garbage_collector()
    transport.Channel.room, transport.Channel.running = worker.pool.room, worker.pool.running
    engine.backlog.on_room = transport.wake
    health.worker, health.pool = worker_name(engine), worker.pool
    speeds = Speeds(tasks.app.backend.client, tasks.key_prefix(tasks.app))
    with Reports(speeds, health.worker, health, lambda: speeds_of(engine, worker.pool.counts)):
        worker.start()
    return EXIT_BROKEN if worker.exitcode == EX_FAILURE else int(worker.exitcode or 0)


def spare_the_garbage_collector() -> None:
    """Let it look seldom, and never at what stays for the life of the process: models, libraries, settings."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def worker_name(engine: Engine) -> str:
    """`<models>.<device>@<host>`, unique on a host because the launcher numbers CPU workers too."""
    device = os.environ.get("EMBEDQ_DEVICE_LABEL") or next(iter(engine.models.values())).device.replace(":", "")
    return f"{'+'.join(engine.models)}.{device}@{socket.gethostname()}"


def served(engine: Engine) -> list[Served]:
    """What producers may know of this worker's models."""
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
        )
        for alias, model in engine.models.items()
    ]


def _end_at_once(reason: str) -> None:
    """Leave without answering: a thread that hangs in a driver cannot be ended, and other workers can do the jobs."""
    log.critical(
        "this worker ends, its jobs go to other workers: %s",
        reason,
        extra={"action": "worker_device_dead", "code": EXIT_DEVICE_DEAD},
    )
    logging.shutdown()
    os._exit(EXIT_DEVICE_DEAD)


def _warn_of_misspelt_variables() -> None:
    """A variable nobody reads changes nothing; whoever set it thinks it does."""
    known = {f"EMBEDQ_{name.upper()}" for name in (*Settings.model_fields, *tasks.config.WIRE)} | _OTHER_VARIABLES
    for name in sorted(name for name in os.environ if name.startswith("EMBEDQ_") and name not in known):
        log.warning("a variable is set that means nothing", extra={"action": "unknown_variable", "variable": name})


def _log_ready(engine: Engine, settings: Settings, seconds: float) -> None:
    """All that was chosen, in one line, with the reason for every automatic choice."""
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
    """A receiver of this signal makes Celery leave logging alone."""


def _log_serving(sender: Any = None, **_: Any) -> None:
    """Say so once the event loop has turned: Celery signals before it has subscribed to remote control."""

    def say() -> None:
        told = {"worker": sender.hostname, "pid": os.getpid(), "version": __version__}
        log.info("ready", extra={"action": "worker_ready", **told})

    sender.hub.call_soon(lambda: sender.hub.call_soon(say))


if __name__ == "__main__":
    sys.exit(main())
