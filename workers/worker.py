"""One worker process, born pinned to its device: load, warm up, serve, drain.

Started by the launcher, or by a supervisor of your own with the same environment. Takes no job
before its models are loaded and warm; a model that cannot load ends the process with code 1, so
that jobs stay in the queue instead of failing one after another.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from typing import Any

from celery.signals import setup_logging, worker_ready, worker_shutting_down
from celery.worker import state
from celery.worker.request import Request

import core
import tasks
from core.engine import Engine
from core.errors import EmbedqError, ServerUnavailable
from core.settings import Settings, read_settings
from tasks.models import Registry, Served
from workers import logs, transport
from workers.dead_letters import failure_writer
from workers.embedded import answers
from workers.leases import LeaseRenewal

log = logging.getLogger(__name__)

#: Exit code for what a restart cannot cure: a wrong setting, a model that cannot load.
EXIT_CANNOT_START = 1

#: How long a worker waits for its server before it gives up; longer than a server's restart.
_SERVER_TIMEOUT_S = 60.0

#: Variables that are neither settings of a worker nor of the wire.
_OTHER_VARIABLES = {"EMBEDQ_CONFIG", "EMBEDQ_DEVICE_LABEL", "EMBEDQ_LOG_LEVEL"}

#: Summaries our producers write; anything else is somebody's repr of the texts and is not shown.
_SUMMARY = re.compile(r"[\d,]+ (texts?|passages?), [\d,]+ characters")


class ShortRequest(Request):
    """A request that never shows its arguments, also when a foreign producer sent their repr."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not _SUMMARY.fullmatch(self.argsrepr or ""):
            # Both places: events and logs read the one, the tracer's messages the other.
            self._argsrepr = self._kwargsrepr = "(not shown)"
            self._request_dict |= {"argsrepr": "(not shown)", "kwargsrepr": "(not shown)"}

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What inspection shows: the summary, also where Celery would send the texts themselves."""
        shown: dict[str, Any] = super().info(safe=True)
        return shown


def main() -> int:
    """Run one worker until it is told to stop; returns the exit code."""
    logs.set_up(os.environ.get("EMBEDQ_LOG_LEVEL", "INFO"))
    try:
        settings = read_settings()
        _warn_of_misspelt_variables()
        _wait_for_server(tasks.app.conf.broker_url)
        transport.refuse_cluster(tasks.app.connection_for_read())
        started_s = time.monotonic()
        with core.load_all(settings) as engine:
            engine.warm_up()
            _log_ready(engine, settings, time.monotonic() - started_s)
            Registry(tasks.app.backend.client).announce(served(engine))
            return serve(engine, settings)
    except EmbedqError as error:  # the operator's mistake, or a device too small to warm up on
        log.error("cannot start: %s", error, extra={"action": "cannot_start"})
        return EXIT_CANNOT_START


def serve(engine: Engine, settings: Settings) -> int:
    """Take jobs until SIGTERM, then finish those taken. Returns Celery's exit code."""
    tasks.EngineTask.engine = engine
    tasks.EngineTask.Request = ShortRequest
    transport.install()
    transport.Channel.worker = f"{worker_name(engine)}/{os.getpid()}"
    transport.Channel.fail = failure_writer(tasks.app)
    transport.Channel.running = lambda: [request.id for request in tuple(state.active_requests)]
    tasks.app.steps["consumer"].add(LeaseRenewal)
    setup_logging.connect(_keep_our_logging)
    worker_ready.connect(_log_serving)
    worker_shutting_down.connect(_log_draining)
    worker = tasks.app.Worker(
        hostname=worker_name(engine),
        pool="threads",
        concurrency=settings.max_jobs,
        queues=queues(engine),
        loglevel="WARNING",
        quiet=True,
        task_events=True,
        without_gossip=True,
        without_mingle=True,
        heartbeat_interval=5,
    )
    worker.start()
    return int(worker.exitcode or 0)


def worker_name(engine: Engine) -> str:
    """`<models>.<device>@<host>`, unique on a host because the launcher numbers CPU workers too."""
    device = os.environ.get("EMBEDQ_DEVICE_LABEL") or next(iter(engine.models.values())).device.replace(":", "")
    return f"{'+'.join(engine.models)}.{device}@{socket.gethostname()}"


def queues(engine: Engine) -> list[str]:
    """Both queues of each model, so that a call it cannot serve is answered; and the default ones."""
    named = [tasks.config.queue_name(kind, alias) for alias in engine.models for kind in ("embed", "rerank")]
    defaults = {"embed": engine.default_embed, "rerank": engine.default_rerank}
    return named + [tasks.config.queue_name(kind) for kind, alias in defaults.items() if alias]


def served(engine: Engine) -> list[Served]:
    """What producers may know of this worker's models."""
    defaults = {"embed": engine.default_embed, "rerank": engine.default_rerank}
    return [
        Served(
            alias=alias,
            source=engine.settings.models[alias].path,
            kinds=["embed", "rerank"] if model.spec.is_embedder else ["rerank"],
            dimensions=model.spec.dimensions,
            max_length=model.spec.max_length,
            outputs=sorted(model.outputs),
            default_for=[kind for kind, default in defaults.items() if default == alias],
        )
        for alias, model in engine.models.items()
    ]


def _warn_of_misspelt_variables() -> None:
    """A variable nobody reads changes nothing; whoever set it thinks it does."""
    known = {f"EMBEDQ_{name.upper()}" for name in (*Settings.model_fields, *tasks.config.WIRE)} | _OTHER_VARIABLES
    for name in sorted(name for name in os.environ if name.startswith("EMBEDQ_") and name not in known):
        log.warning("a variable is set that means nothing", extra={"action": "unknown_variable", "variable": name})


def _wait_for_server(url: str) -> None:
    deadline_s = time.monotonic() + _SERVER_TIMEOUT_S
    while not answers(url):
        if time.monotonic() > deadline_s:
            raise ServerUnavailable(
                f"no server answers at {logs.without_password(url)} for {_SERVER_TIMEOUT_S:.0f} s; set EMBEDQ_REDIS_URL"
            )
        log.warning("waiting for the server", extra={"action": "server_wait", "url": logs.without_password(url)})
        time.sleep(1)


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
    limits = settings.model_dump(exclude={"models", "wire"}) | {"max_batch_tokens": engine.max_batch_tokens}
    log.info("models are warm", extra={"action": "warm", "seconds": round(seconds, 1), **limits})


def _keep_our_logging(**_: Any) -> None:
    """A receiver of this signal makes Celery leave logging alone."""


def _log_serving(sender: Any = None, **_: Any) -> None:
    log.info("ready", extra={"action": "worker_ready", "worker": sender.hostname, "pid": os.getpid()})


def _log_draining(sig: str = "", **_: Any) -> None:
    log.info("draining: no new jobs, finishing those taken", extra={"action": "draining", "signal": sig})


if __name__ == "__main__":
    sys.exit(main())
