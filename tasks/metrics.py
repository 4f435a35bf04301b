"""Every metric's name, kind, labels and meaning, in one place; what serves them is elsewhere.

Workers serve those of `WORKER` themselves, one exporter for the installation those of `EXPORTER`.
Units are in the names. Knows no engine, queue or server.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from embedq import __version__


class Metric(NamedTuple):
    """One name."""

    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    what: str


class Counted(Protocol):
    """Values counted by size, as `core.batching.batch_stats` does."""

    bounds: tuple[float, ...]
    total: float

    def up_to(self) -> list[int]:
        """The number of values up to each bound, and at the end the number of all."""
        ...


_OF_WORKER = ("worker", "device")
_OF_MODEL = (*_OF_WORKER, "model")

#: Served by workers and exporter alike.
BUILD: dict[str, Metric] = {
    "embedq_build_info": Metric("gauge", ("version",), "always 1; the version of embedq that runs here"),
}

#: Served by each worker.
WORKER: dict[str, Metric] = {
    **BUILD,
    "embedq_jobs_total": Metric("counter", (*_OF_MODEL, "kind", "outcome"), "jobs that this worker ended"),
    "embedq_sequences_total": Metric("counter", _OF_MODEL, "sequences put into batches"),
    "embedq_tokens_total": Metric("counter", _OF_MODEL, "their tokens, without padding"),
    "embedq_padded_tokens_total": Metric("counter", _OF_MODEL, "their tokens, with padding where the model pads"),
    "embedq_batches_total": Metric("counter", _OF_MODEL, "batches"),
    "embedq_job_seconds": Metric("histogram", (*_OF_MODEL, "stage"), "seconds of answered jobs in each stage"),
    "embedq_batch_sequences": Metric("histogram", _OF_MODEL, "sequences of a batch"),
    "embedq_batch_fill_ratio": Metric("gauge", _OF_MODEL, "part of their token budget that the last batches used"),
    "embedq_padding_ratio": Metric("gauge", _OF_MODEL, "part of the last batches' tokens that was padding"),
    "embedq_waiting_tokens": Metric("gauge", (*_OF_WORKER, "class"), "tokens taken that wait for a batch"),
    "embedq_held_jobs": Metric("gauge", _OF_WORKER, "jobs taken and not yet answered"),
    "embedq_tokens_per_second": Metric(
        "gauge", _OF_MODEL, "measured speed: tokens without padding in a second of work"
    ),
    "embedq_device_busy_seconds_total": Metric("counter", _OF_MODEL, "seconds in which batches were on the device"),
    "embedq_out_of_memory_splits_total": Metric("counter", _OF_MODEL, "batches halved because memory was too small"),
    "embedq_batch_splits_total": Metric("counter", _OF_MODEL, "batches halved because they failed, memory included"),
    "embedq_retries_total": Metric("counter", _OF_MODEL, "jobs sent again because this worker failed them"),
    "embedq_device_memory_bytes": Metric("gauge", (*_OF_WORKER, "state"), "memory of the device, or of a CPU's host"),
    "embedq_model_info": Metric(
        "gauge", (*_OF_MODEL, "path", "revision", "family", "precision"), "always 1; what is served"
    ),
    "embedq_parts_total": Metric("counter", (*_OF_WORKER, "outcome"), "parts of datasets that this worker ended"),
    "embedq_part_rows_total": Metric("counter", (*_OF_WORKER, "state"), "rows of parts, computed and failed"),
    "embedq_part_bytes_total": Metric("counter", _OF_WORKER, "bytes of the parts that this worker wrote"),
    "embedq_running_parts": Metric("gauge", _OF_WORKER, "parts that this worker holds"),
    "embedq_thread_ends_total": Metric(
        "counter", (*_OF_WORKER, "thread"), "unexpected ends of a thread; it was restarted, or the worker ended"
    ),
    "embedq_last_progress_timestamp_seconds": Metric("gauge", _OF_WORKER, "when a batch last ended, in Unix time"),
    "embedq_ready": Metric("gauge", _OF_WORKER, "1 while it takes jobs; 0 before it does, and once it drains"),
}

#: Served by the exporter.
EXPORTER: dict[str, Metric] = {
    **BUILD,
    "embedq_queue_jobs": Metric("gauge", ("queue", "priority"), "jobs in the queue's list of this priority"),
    "embedq_in_flight_jobs": Metric("gauge", (), "jobs that workers hold, of all queues"),
    "embedq_backlog_jobs": Metric("gauge", ("model", "kind"), "jobs that wait in queues"),
    "embedq_backlog_tokens": Metric("gauge", ("model", "kind"), "their tokens, as far as earlier jobs tell"),
    "embedq_backlog_seconds": Metric("gauge", ("model", "kind"), "time that the workers present need for them"),
    "embedq_oldest_job_age_seconds": Metric("gauge", ("queue",), "time since the next job was sent; 0 if none waits"),
    "embedq_workers": Metric("gauge", ("model",), "workers that serve the model now"),
    # Not "embedq_dead_letters": OpenMetrics takes that for the name of the counter below, and no name twice.
    "embedq_dead_letters_kept": Metric("gauge", (), "dead letters that can still be looked at and sent again"),
    "embedq_dead_letters_total": Metric("counter", (), "dead letters there have ever been"),
}

#: Outcomes of a job: the values of `outcome`.
OUTCOMES = ("succeeded", "failed", "revoked", "retried")

#: Outcomes of a part: the values of its `outcome`. See `tasks.datasets.receipts`.
PART_OUTCOMES = ("written", "found", "rewritten", "failed", "cancelled", "superseded", "duplicate", "dropped")

#: Stages of a job in a worker: the values of `stage`.
STAGES = ("waited", "encoded", "computed", "stored")

_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


class Families:
    """The metrics of one scrape, filled in any order."""

    def __init__(self, metrics: dict[str, Metric]) -> None:
        self._metrics = metrics
        self._families: dict[str, Any] = {
            name: _FAMILIES[metric.kind](name, metric.what, labels=metric.labels) for name, metric in metrics.items()
        }

    def add(self, name: str, value: float, **labels: str) -> None:
        """Set the value of a counter or a gauge; `labels` are exactly those of the metric."""
        self._families[name].add_metric(self._values(name, labels), value)

    def add_build(self) -> None:
        """Add the version of embedq that this process runs."""
        self.add("embedq_build_info", 1, version=__version__)

    def add_histogram(self, name: str, counted: Counted, **labels: str) -> None:
        """Set the counts of a histogram."""
        up_to = counted.up_to()
        buckets = list(zip((*(str(float(bound)) for bound in counted.bounds), "+Inf"), up_to, strict=True))
        self._families[name].add_metric(self._values(name, labels), buckets, counted.total)

    def all(self) -> list[Any]:
        """Every family, also without a sample: the help of all names is there from the first scrape."""
        return list(self._families.values())

    def _values(self, name: str, labels: dict[str, str]) -> list[str]:
        wanted = self._metrics[name].labels
        assert set(labels) == set(wanted), f"{name} has the labels {wanted}"
        return [labels[label] for label in wanted]
