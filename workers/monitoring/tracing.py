"""Makes OpenTelemetry spans of each job and each batch, if the settings ask for it.

    apply_async/tasks.embed     in the application, by the standard Celery instrumentation
      run/tasks.embed           here, by the same: from a job's ready answer to its stored result
    batch                       here, by us: on the device; linked to the jobs whose rows it made

The wait in the queue and for the device is the time between the two spans of a job. The standard's own variables
choose the exporter: OTEL_TRACES_EXPORTER ("otlp", or "console" for a line of JSON each), OTEL_EXPORTER_OTLP_ENDPOINT, …
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from embedq.core.batching.batch_stats import Batch, Meter
from embedq.core.errors import InvalidSettings

log = logging.getLogger(__name__)

#: Links of one span: the standard's default limit.
_MAX_LINKS = 128


def start(meter: Meter, worker: str) -> None:
    """Make spans from now on. InvalidSettings if the extra is not installed, or the exporter is unknown."""
    try:
        from opentelemetry.instrumentation.celery import CeleryInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter(os.environ.get("OTEL_TRACES_EXPORTER", "otlp"))
    except ModuleNotFoundError as error:
        raise InvalidSettings(f"EMBEDQ_TRACES needs the extra embedq[otel], which is not installed: {error}") from None
    service = os.environ.get("OTEL_SERVICE_NAME", "embedq-worker")
    provider = TracerProvider(resource=Resource.create({"service.name": service, "service.instance.id": worker}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    CeleryInstrumentor().instrument(tracer_provider=provider)
    meter.on_batch = BatchSpans(provider)
    log.info("spans of jobs and batches are exported", extra={"action": "tracing", "exporter": type(exporter).__name__})


class BatchSpans:
    """Makes a span of each batch it is called with. `Job.origin` is a job's `EngineRequest`."""

    def __init__(self, provider: Any) -> None:
        self._tracer = provider.get_tracer("embedq")

    def __call__(self, batch: Batch) -> None:
        """Never raises: the batch's jobs are answered next."""
        try:
            self._make(batch)
        except Exception:
            log.exception("the span of a batch cannot be made", extra={"action": "span_failed"})

    def _make(self, batch: Batch) -> None:
        jobs = dict.fromkeys(batch.jobs)
        offset_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            "batch",
            links=_links(jobs),
            start_time=offset_ns + int(batch.started_s * 1e9),
            attributes={
                "embedq.model": batch.model,
                "embedq.sequences": batch.num_sequences,
                "embedq.tokens": batch.num_tokens,
                "embedq.jobs": len(jobs),
            },
        )
        span.end(end_time=offset_ns + int(batch.ended_s * 1e9))


def _links(jobs: dict[Any, None]) -> list[Any]:
    """Links to the spans in which the jobs were sent, as their messages name them."""
    from opentelemetry import trace
    from opentelemetry.propagate import extract

    links = []
    for job in jobs:
        headers = getattr(job.origin, "request_dict", None)
        context = trace.get_current_span(extract(headers)).get_span_context() if headers else None
        if context is not None and context.is_valid:
            links.append(trace.Link(context))
            if len(links) == _MAX_LINKS:
                break
    return links


def _exporter(name: str) -> Any:
    if name == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(formatter=lambda span: f"{span.to_json(indent=None)}\n")
    raise InvalidSettings(f'OTEL_TRACES_EXPORTER may be "otlp" or "console"; given {name!r:.40}')
