"""Spans: of the producer, of the batch and of the result, in memory and from a real worker process."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embedq.core.batching.batch_stats import Batch
from embedq.core.engine import Engine
from embedq.core.errors import InvalidSettings
from embedq.workers.monitoring import tracing
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.engines import busy
from tests.loops import job_of
from tests.own_server import OwnServer
from tests.running import Running, require, start_workers
from tests.scraping import TIMEOUT_S

#: What sends with the standard instrumentation, as an application does.
PRODUCER = """
import sys, tasks
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=lambda one: one.to_json(indent=None) + "\\n")))
CeleryInstrumentor().instrument(tracer_provider=provider)
with provider.get_tracer("application").start_as_current_span("request"):
    jobs = [tasks.embed.delay(["a private sentence"]), *tasks.embed_many([["two"], ["three"]])]
for job in jobs:
    job.get(timeout=60)
"""


@pytest.fixture(autouse=True)
def _packages() -> None:
    require(importlib.util.find_spec("opentelemetry") is not None, "the extra embedq[otel] is not installed")


@pytest.fixture
def finished() -> Iterator[Any]:
    """A provider that keeps its spans."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    memory, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    yield SimpleNamespace(provider=provider, spans=memory.get_finished_spans)
    provider.shutdown()


def request_of(number: int) -> Any:
    """What of a job's request is looked at: its message's headers."""
    return SimpleNamespace(request_dict={"traceparent": f"00-{number:032x}-{number:016x}-01"})


def test_a_batch_is_a_span_with_links_to_its_jobs(engine: Engine, model: FakeModel, finished: Any) -> None:
    engine.meter.on_batch = tracing.BatchSpans(finished.provider)
    with busy(engine, model):
        jobs = [
            engine.submit(
                lambda text=f"text {number}": engine.calls.embed([text, text, "and one more"]),  # type: ignore[misc]
                origin=request_of(number),
            )
            for number in (1, 2)
        ]
        engine.submit(lambda: engine.calls.embed(["of nobody"]))  # without headers
    for job in jobs:
        job.answer.result(PATIENCE_S)
    spans = [span for span in finished.spans() if span.links]
    linked = {link.context.span_id for span in spans for link in span.links}
    assert linked == {1, 2}
    assert all(span.name == "batch" and span.end_time > span.start_time for span in spans)
    assert {span.attributes["embedq.model"] for span in spans} == {"fake"}
    assert sum(span.attributes["embedq.sequences"] for span in finished.spans()) == 1 + 3 + 1


def test_a_batch_of_very_many_jobs_has_a_bounded_number_of_links(finished: Any) -> None:
    jobs = [job_of(FakeModel(), 1, origin=request_of(number)) for number in range(1, 1000)]
    tracing.BatchSpans(finished.provider)(Batch("fake", 999, 5000, 1.0, 2.0, jobs))
    (span,) = finished.spans()
    assert len(span.links) == 128
    assert span.attributes["embedq.jobs"] == 999


def test_a_span_that_cannot_be_made_does_not_keep_jobs_from_their_answers(engine: Engine) -> None:
    provider: Any = SimpleNamespace(get_tracer=lambda name: None)
    engine.meter.on_batch = tracing.BatchSpans(provider)
    assert len(engine.embed(["a text"])) == 1


def test_without_the_setting_nothing_is_loaded(engine: Engine) -> None:
    assert engine.meter.on_batch is None
    assert not engine.settings.traces


def test_an_unknown_exporter_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(InvalidSettings, match='may be "otlp" or "console"; given \'zipkin\''):
        tracing.start(engine.meter, "worker")


def test_a_job_is_one_trace_from_producer_to_result_and_its_batch_is_linked(own: OwnServer, minilm: Path) -> None:
    own.client.flushall()
    environment = {"EMBEDQ_REDIS_URL": own.url, "OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    models = {"EMBEDQ_MODELS": f"minilm={minilm}", "EMBEDQ_TRACES": "1"}
    with start_workers(environment | models, "--cpu-workers", "1") as worker:
        with Running([sys.executable, "-c", PRODUCER], environment) as producer:
            assert producer.wait(TIMEOUT_S) == 0
        worker.wait_for('"run/tasks.embed"', count=3)
        worker.stop()
    sent, done = spans_of(producer), spans_of(worker)
    (request,) = [one for one in sent if one["name"] == "request"]
    published = {one["context"]["span_id"]: one for one in sent if one["name"] == "apply_async/tasks.embed"}
    assert len(published) == 3
    assert all(one["parent_id"] == request["context"]["span_id"] for one in published.values())
    runs = [one for one in done if one["name"] == "run/tasks.embed"]
    assert {one["parent_id"] for one in runs} == set(published)
    assert {one["context"]["trace_id"] for one in runs} == {request["context"]["trace_id"]}
    linked = [link["context"]["span_id"] for one in done if one["name"] == "batch" for link in one["links"]]
    assert sorted(linked) == sorted(published)
    assert "private sentence" not in worker.output + producer.output
    assert {one["resource"]["attributes"]["service.name"] for one in done} == {"embedq-worker"}


def spans_of(running: Running) -> list[dict[str, Any]]:
    """What a process printed as spans."""
    return [json.loads(line) for line in running.output.splitlines() if line.startswith('{"name": ')]
