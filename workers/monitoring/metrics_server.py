"""Serves one worker's metrics and health over HTTP: the engine's and the pool's own counters, read at each scrape.

Only the outcome of each job is counted for metrics alone (`workers.monitoring.job_counters`). `tasks.metrics` defines
the names.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector

from embedq.core.batching.device_memory import memory_bytes
from embedq.core.engine import Engine
from embedq.core.errors import InvalidSettings
from embedq.core.guarded_thread import num_ends
from embedq.core.settings import Settings
from embedq.tasks.metrics import PART_OUTCOMES, STAGES, WORKER, Families
from embedq.tasks.scraping import Scraping
from embedq.tasks.speeds import Speed
from embedq.workers.monitoring.health import Health
from embedq.workers.monitoring.heartbeat import Heart
from embedq.workers.monitoring.job_counters import JobCounts
from embedq.workers.parts.part_threads import PartThreads

log = logging.getLogger(__name__)

_MAX_PORT = 65535

#: Ports between the first worker of a device and the second one: one of `--per-device 2`, or the successor that a
#: launcher starts beside a worker it replaces. More than a host has devices.
_PORTS_PER_ROUND = 100


class WorkerCollector:
    """Collects for one worker. Before its models are loaded it has a version and nothing else."""

    def __init__(self, health: Health, heart: Heart) -> None:
        self._health, self._heart = health, heart

    def describe(self) -> list[Any]:
        """The metrics without samples; a registry asks for them at registration."""
        return Families(WORKER).all()

    def collect(self) -> list[Any]:
        """The metrics with their present values."""
        families, jobs = Families(WORKER), self._health.jobs
        families.add_build()
        if jobs is not None:
            engine, measured = jobs.engine, self._heart.last.models
            device = next(iter(engine.models.values())).device
            of_worker = {"worker": self._health.worker, "device": device}
            _of_worker(families, engine, of_worker)
            families.add("embedq_ready", float(self._health.ready()[0]), **of_worker)
            families.add("embedq_held_jobs", len(jobs), **of_worker)
            for alias in engine.models:
                of_model = {**of_worker, "model": alias}
                families.add("embedq_tokens_per_second", measured.get(alias, Speed()).tokens_per_second, **of_model)
                _of_model(families, engine, alias, of_model)
            _of_jobs(families, jobs.job_counts, of_worker)
            _of_parts(families, jobs.parts, of_worker)
        return families.all()


def _of_worker(families: Families, engine: Engine, labels: dict[str, str]) -> None:
    for name, is_bulk in (("interactive", False), ("bulk", True)):
        families.add("embedq_waiting_tokens", engine.waiting_tokens(is_bulk), **labels, **{"class": name})
    progressed_s = time.time() - (time.monotonic() - engine.meter.progressed_s)
    families.add("embedq_last_progress_timestamp_seconds", progressed_s, **labels)
    used_bytes, total_bytes = memory_bytes(labels["device"])
    families.add("embedq_device_memory_bytes", used_bytes, **labels, state="used")
    families.add("embedq_device_memory_bytes", total_bytes, **labels, state="total")
    for thread, number in tuple(num_ends.items()):
        families.add("embedq_thread_ends_total", number, **labels, thread=thread)


def _of_model(families: Families, engine: Engine, alias: str, labels: dict[str, str]) -> None:
    totals, passes = engine.backlog.totals_by_model[alias], engine.meter.passes[alias]
    families.add("embedq_sequences_total", totals.num_sequences, **labels)
    families.add("embedq_tokens_total", totals.num_tokens, **labels)
    families.add("embedq_padded_tokens_total", totals.num_padded_tokens, **labels)
    families.add("embedq_batches_total", totals.num_batches, **labels)
    families.add("embedq_batch_fill_ratio", totals.late_fill, **labels)
    families.add("embedq_padding_ratio", totals.late_padding_share, **labels)
    families.add_histogram("embedq_batch_sequences", totals.sizes, **labels)
    families.add("embedq_device_busy_seconds_total", passes.seconds, **labels)
    families.add("embedq_out_of_memory_splits_total", passes.num_memory_splits, **labels)
    families.add("embedq_batch_splits_total", passes.num_splits, **labels)
    model, chosen = engine.models[alias], engine.settings.models[alias]
    info = {"path": chosen.path, "revision": chosen.revision or "", "family": model.spec.family}
    families.add("embedq_model_info", 1, **labels, **info, precision=model.precision)


def _of_jobs(families: Families, counts: JobCounts, labels: dict[str, str]) -> None:
    retries = dict.fromkeys(counts.stages, 0)
    for (model, kind, outcome), number in tuple(counts.outcomes.items()):
        families.add("embedq_jobs_total", number, **labels, model=model, kind=kind, outcome=outcome)
        if outcome == "retried":
            retries[model] = retries.get(model, 0) + number
    for model, number in retries.items():
        families.add("embedq_retries_total", number, **labels, model=model)
    for model, stages in counts.stages.items():
        for stage, seconds in zip(STAGES, stages, strict=True):
            families.add_histogram("embedq_job_seconds", seconds, **labels, model=model, stage=stage)


def _of_parts(families: Families, parts: PartThreads, labels: dict[str, str]) -> None:
    for outcome in PART_OUTCOMES:
        families.add("embedq_parts_total", parts.parts.get(outcome, 0), **labels, outcome=outcome)
    for state, number in tuple(parts.rows.items()):
        families.add("embedq_part_rows_total", number, **labels, state=state)
    families.add("embedq_part_bytes_total", parts.num_bytes, **labels)
    families.add("embedq_running_parts", parts.num_held, **labels)


@contextmanager
def metrics_served(settings: Settings, health: Health, heart: Heart) -> Iterator[None]:
    """Serve metrics and health of this process over HTTP meanwhile, where the settings ask for it."""
    port = port_of(settings.metrics_port, os.environ.get("EMBEDQ_DEVICE_LABEL", ""))
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(WorkerCollector(health, heart))
    ProcessCollector(registry=registry)
    pages = {"/healthz/live": health.live, "/healthz/ready": health.ready}
    with Scraping(settings.metrics_host, port, registry, pages) as scraping:
        log.info(
            "the worker serves metrics",
            extra={"action": "metrics_served", "host": settings.metrics_host, "port": scraping.port},
        )
        yield


def port_of(port: int | None, label: str) -> int | None:
    """The port of the worker of this label: `port` and the device's number, and for "cuda1-2" 100 more.

    None for no server, 0 for any free port. InvalidSettings if the port would be above 65535.
    """
    numbers = re.search(r"(\d+)(?:-(\d+))?$", label)
    if not port or not numbers:
        return port
    chosen = port + int(numbers[1]) + _PORTS_PER_ROUND * (int(numbers[2] or 1) - 1)
    if chosen > _MAX_PORT:
        raise InvalidSettings(f"EMBEDQ_METRICS_PORT is {port}, and the worker on {label} would take {chosen}")
    return chosen
