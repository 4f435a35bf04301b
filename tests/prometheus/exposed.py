"""An exposition with every metric of embedq, for a real Prometheus to read: two workers of one model, and the exporter.

Names, labels and values come from here, so that rules and dashboard can be tried without a model; `NAMES` is held
against the code's own list where that is there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_OF_WORKER = ("worker", "device")
_OF_MODEL = (*_OF_WORKER, "model")
_OF_BACKLOG = ("model", "kind")

#: Labels by name, of what a worker serves.
WORKER: dict[str, tuple[str, ...]] = {
    "embedq_jobs_total": (*_OF_MODEL, "kind", "outcome"),
    "embedq_sequences_total": _OF_MODEL,
    "embedq_tokens_total": _OF_MODEL,
    "embedq_padded_tokens_total": _OF_MODEL,
    "embedq_batches_total": _OF_MODEL,
    "embedq_job_seconds": (*_OF_MODEL, "stage"),
    "embedq_batch_sequences": _OF_MODEL,
    "embedq_batch_fill_ratio": _OF_MODEL,
    "embedq_padding_ratio": _OF_MODEL,
    "embedq_waiting_tokens": (*_OF_WORKER, "class"),
    "embedq_held_jobs": _OF_WORKER,
    "embedq_parts_total": (*_OF_WORKER, "outcome"),
    "embedq_part_rows_total": (*_OF_WORKER, "state"),
    "embedq_part_bytes_total": _OF_WORKER,
    "embedq_running_parts": _OF_WORKER,
    "embedq_tokens_per_second": _OF_MODEL,
    "embedq_device_busy_seconds_total": _OF_MODEL,
    "embedq_out_of_memory_splits_total": _OF_MODEL,
    "embedq_batch_splits_total": _OF_MODEL,
    "embedq_retries_total": _OF_MODEL,
    "embedq_device_memory_bytes": (*_OF_WORKER, "state"),
    "embedq_model_info": (*_OF_MODEL, "path", "revision", "family", "precision"),
    "embedq_thread_ends_total": (*_OF_WORKER, "thread"),
    "embedq_last_progress_timestamp_seconds": _OF_WORKER,
    "embedq_ready": _OF_WORKER,
    "embedq_build_info": ("version",),
}

#: The same of the exporter.
EXPORTER: dict[str, tuple[str, ...]] = {
    "embedq_queue_jobs": ("queue", "priority"),
    "embedq_in_flight_jobs": (),
    "embedq_backlog_jobs": _OF_BACKLOG,
    "embedq_backlog_tokens": _OF_BACKLOG,
    "embedq_backlog_seconds": _OF_BACKLOG,
    "embedq_oldest_job_age_seconds": ("queue",),
    "embedq_workers": ("model",),
    "embedq_dead_letters_kept": (),
    "embedq_dead_letters_total": (),
    "embedq_build_info": ("version",),
}

_HISTOGRAMS = ("embedq_job_seconds", "embedq_batch_sequences")

_SAMPLES = {
    "worker": ("minilm.cuda0@one", "minilm.cuda0@two"),
    "device": ("cuda:0",),
    "model": ("minilm",),
    "kind": ("embed", "rerank"),
    "outcome": ("succeeded", "failed"),
    "stage": ("waited", "encoded", "computed", "stored"),
    "class": ("interactive", "bulk"),
    "state": ("used", "total"),
    "queue": ("embed.minilm", "rerank.minilm"),
    "priority": ("0", "9"),
    "thread": ("encode-0", "reports"),
}


class Exposed:
    """All metrics, moved on by `tick`."""

    def __init__(self) -> None:
        self.worker, self.exporter = CollectorRegistry(), CollectorRegistry()
        self._all = [
            (name, labels, _made(name, labels, registry))
            for registry, names in ((self.worker, WORKER), (self.exporter, EXPORTER))
            for name, labels in names.items()
        ]

    def tick(self) -> None:
        """Count something, and set gauges to something."""
        for name, labels, metric in self._all:
            for number, values in enumerate(_combinations(labels)):
                one = metric.labels(**values) if values else metric
                if isinstance(one, Counter):
                    one.inc(1 + number)
                elif isinstance(one, Histogram):
                    one.observe(0.05 * (1 + number))
                else:
                    one.set(_gauge(name, number))


def _gauge(name: str, number: int) -> float:
    if name.endswith("timestamp_seconds"):
        return time.time()
    return 0.5 + 0.1 * number if name.endswith("ratio") else 1.0 + number


def _made(name: str, labels: tuple[str, ...], registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if name in _HISTOGRAMS:
        return Histogram(name, name, labels, registry=registry)
    kind = Counter if name.endswith("_total") else Gauge
    return kind(name, name, labels, registry=registry)


def _combinations(labels: tuple[str, ...]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = [{}]
    for label in labels:
        found = [{**one, label: value} for one in found for value in _SAMPLES.get(label, ("x",))]
    return found


@contextmanager
def served() -> Iterator[tuple[Exposed, int, int]]:
    """(what is exposed, the worker's port, the exporter's port), on loopback."""
    exposed = Exposed()
    exposed.tick()
    servers = [start_http_server(0, "127.0.0.1", registry) for registry in (exposed.worker, exposed.exporter)]
    try:
        yield exposed, *(server.server_port for server, _ in servers)  # type: ignore[misc]
    finally:
        for server, thread in servers:
            server.shutdown()
            server.server_close()
            thread.join()
