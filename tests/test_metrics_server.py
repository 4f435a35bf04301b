"""A worker's metrics and health: a real worker, scraped over HTTP."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis

from embedq import __version__, tasks
from embedq.core.errors import InvalidInput, InvalidSettings
from embedq.core.settings import read_settings
from embedq.tasks.metrics import OUTCOMES, STAGES, WORKER
from embedq.tasks.speeds import Report, Speeds
from embedq.workers.monitoring.metrics_server import port_of
from tests.own_server import OwnServer
from tests.pools import in_flight
from tests.running import Running, start_workers
from tests.scraping import TIMEOUT_S, Scrape, get, wait_until
from tests.traced_jobs import application

NAME = f"seen.cpu0@{socket.gethostname()}"


#: How a job comes to the worker under test, and to no other of the run.
SEEN: dict[str, Any] = {"model": "seen"}


@pytest.fixture(scope="module")
def running(server: str, minilm: Path) -> Iterator[Running]:
    """A worker that only the jobs of this file are sent to."""
    with start_workers(environment(server, minilm), "--cpu-workers", "1") as running:
        yield running
    tasks.embed.registry.forget("seen")


def environment(url: str, minilm: Path) -> dict[str, str]:
    return {
        "EMBEDQ_REDIS_URL": url,
        "EMBEDQ_MODELS": f"seen={minilm}",
        "EMBEDQ_DEFAULT_EMBED": "none",
        "EMBEDQ_DEFAULT_RERANK": "none",
        "EMBEDQ_METRICS_PORT": "0",
        "EMBEDQ_LEASE_S": "2",
    }


@pytest.fixture(scope="module")
def address(running: Running) -> str:
    """Where it serves."""
    return address_of(running)


def address_of(running: Running) -> str:
    line = running.wait_for("action=metrics_served")[0]
    host, port = (line.partition(f"{name}=")[2].split()[0] for name in ("host", "port"))
    return f"http://{host}:{port}"


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server) as client:
        yield client


def test_what_a_worker_did_is_counted(address: str) -> None:
    before = time.time()
    jobs = [tasks.embed.delay([f"the text number {number}", "another one"], **SEEN) for number in range(20)]
    jobs.append(tasks.rerank.delay("a question", ["a passage"] * 3, **SEEN))
    for job in jobs:
        job.get(timeout=TIMEOUT_S)
    with pytest.raises(InvalidInput):
        tasks.embed.delay(["x"], dimensions=9999, **SEEN).get(timeout=TIMEOUT_S)
    wait_until(lambda: Scrape(address).value("embedq_jobs_total") == 22)
    scrape = Scrape(address)
    assert scrape.value("embedq_jobs_total", model="seen", kind="embed", outcome="succeeded") == 20
    assert scrape.value("embedq_jobs_total", model="seen", kind="rerank", outcome="succeeded") == 1
    assert scrape.value("embedq_jobs_total", kind="embed", outcome="failed") == 1
    # Equal texts of jobs in flight are one sequence, so there may be less than all texts, never less than all different.
    assert 20 + 3 <= scrape.value("embedq_sequences_total", worker=NAME, device="cpu", model="seen") <= 40 + 2
    tokens = scrape.value("embedq_tokens_total", model="seen")
    padded = scrape.value("embedq_padded_tokens_total", model="seen")
    assert 20 * 4 < tokens <= padded
    assert scrape.value("embedq_batch_sequences_count") == scrape.value("embedq_batches_total") >= 1
    assert scrape.value("embedq_batch_sequences_sum") == scrape.value("embedq_sequences_total")
    assert 0 < scrape.value("embedq_batch_fill_ratio") <= 1
    assert 0 <= scrape.value("embedq_padding_ratio") < 1
    assert scrape.value("embedq_held_jobs") == scrape.value("embedq_waiting_tokens") == 0
    assert before <= scrape.value("embedq_last_progress_timestamp_seconds") <= time.time()
    assert 0 < scrape.value("embedq_device_busy_seconds_total") < time.time() - before + 60
    for thread in ("answers", "completion", "encode-0", "heartbeat", "lease renewal", "reports"):
        assert scrape.value("embedq_thread_ends_total", worker=NAME, thread=thread) == 0


def test_each_answered_job_is_in_each_stage_once(address: str) -> None:
    before, begun_s = Scrape(address), time.monotonic()
    tasks.embed.delay(["how long does this take"], **SEEN).get(timeout=TIMEOUT_S)
    wait_until(lambda: Scrape(address).value("embedq_jobs_total") > before.value("embedq_jobs_total"))
    after, took_s = Scrape(address), time.monotonic() - begun_s
    spent_s = 0.0
    for stage in STAGES:
        name, labels = "embedq_job_seconds", {"stage": stage, "model": "seen"}
        assert after.value(f"{name}_count", **labels) - before.value(f"{name}_count", **labels) == 1
        assert after.value(f"{name}_bucket", **labels, le="+Inf") == after.value(f"{name}_count", **labels)
        spent_s += after.value(f"{name}_sum", **labels) - before.value(f"{name}_sum", **labels)
    assert 0 < spent_s < took_s


def test_a_revoked_job_is_counted_once_it_is_dropped(address: str) -> None:
    job = tasks.embed.apply_async((["never"],), SEEN, countdown=3)
    wait_until(lambda: tasks.app.control.inspect([NAME], timeout=5).scheduled()[NAME])
    tasks.app.control.revoke(job.id)
    assert job.get(timeout=TIMEOUT_S, propagate=False).__class__.__name__ == "TaskRevokedError"
    wait_until(lambda: Scrape(address).value("embedq_jobs_total", kind="embed", outcome="revoked"))
    assert Scrape(address).value("embedq_jobs_total", outcome="revoked") == 1


def test_a_cancelled_job_is_counted_as_revoked(address: str) -> None:
    before = Scrape(address).value("embedq_jobs_total", outcome="revoked")
    job = tasks.embed.apply_async((["never"],), SEEN, countdown=60)
    assert tasks.cancel(job) == {job.id: "waiting"}
    wait_until(lambda: Scrape(address).value("embedq_jobs_total", outcome="revoked") == before + 1)


def reports(client: redis.Redis) -> list[Report]:
    """What the worker under test last told."""
    return [report for name, report in Speeds(client).present().items() if name == NAME]


def test_every_name_is_served_with_its_kind_and_labels_and_no_other_of_ours(address: str) -> None:
    scrape = Scrape(address)
    ours = {name: family for name, family in scrape.families.items() if name.startswith("embedq_")}
    assert set(ours) == {name.removesuffix("_total") for name in WORKER}
    for name, metric in WORKER.items():
        family = ours[name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.what)
        for sample in {one.name for one in family.samples}:
            assert scrape.labels(sample) - {"le"} == set(metric.labels)
        assert family.samples, name
    assert {one.labels["outcome"] for one in ours["embedq_jobs"].samples} <= set(OUTCOMES)


def test_model_and_device_are_told(address: str, minilm: Path) -> None:
    scrape = Scrape(address)
    assert scrape.value("embedq_model_info", model="seen", path=str(minilm), family="encoder", device="cpu") == 1
    used, total = (scrape.value("embedq_device_memory_bytes", state=state) for state in ("used", "total"))
    assert 2**27 < used < total
    assert scrape.value("process_resident_memory_bytes") == pytest.approx(used, rel=0.1)


def test_the_version_is_in_log_announcement_metrics_and_timings(address: str, running: Running) -> None:
    for action in ("launching", "worker_ready"):
        assert f"version={__version__}" in running.wait_for(f"action={action}")[0].split()
    assert tasks.embed.registry.all()["seen"].version == __version__
    assert Scrape(address).value("embedq_build_info", version=__version__) == 1
    assert tasks.embed.delay(["a text"], timings=True, **SEEN).get(timeout=TIMEOUT_S).timings.version == __version__


def test_the_worker_reports_its_speed_and_what_its_jobs_hold(address: str, client: redis.Redis) -> None:
    num_sent = 0
    while not Scrape(address).value("embedq_tokens_per_second"):  # unknown before half a second of work
        texts = [[f"words number {num_sent + number}", "and more"] for number in range(200)]
        for job in tasks.embed_many(texts, **SEEN):
            job.get(timeout=TIMEOUT_S)
        num_sent += 200
    tasks.embed.delay(["a few words more"] * 5, **SEEN).get(timeout=TIMEOUT_S)
    report = wait_until(lambda: next((one for one in reports(client) if one.models["seen"].tokens_per_second), None))
    assert 1 < report.models["seen"].tokens_per_job["embed.seen"] < 100
    assert wait_until(lambda: Speeds(client).latest().get("seen")).tokens_per_second > 0


def test_metrics_and_report_state_the_same_speed(address: str, client: redis.Redis) -> None:
    def speeds() -> tuple[float, float]:
        (report,) = reports(client)
        return Scrape(address).value("embedq_tokens_per_second"), report.models["seen"].tokens_per_second

    wait_until(lambda: speeds()[0] == speeds()[1] > 0)  # nothing is computed now: both stay as they are


def test_timings_come_with_the_result_of_a_job_that_asks(address: str, client: redis.Redis) -> None:
    begun_s = time.monotonic()
    job = tasks.embed.delay(["one text", "two texts"], timings=True, **SEEN)
    timings = job.get(timeout=TIMEOUT_S).timings
    took_s = time.monotonic() - begun_s
    assert timings.encoded_s > 0
    assert timings.computed_s > 0
    assert timings.waited_s >= 0
    assert timings.waited_s + timings.encoded_s + timings.computed_s < took_s
    assert (timings.batch_size, timings.num_tokens) == (2, 8)
    blob = msgpack.unpackb(client.get(f"celery-task-meta-{job.id}"))
    assert blob["result"]["timings"]["batch_size"] == 2
    assert tasks.rerank.delay("a", ["b"], timings=True, **SEEN).get(timeout=TIMEOUT_S).timings.computed_s > 0
    plain = tasks.embed.delay(["a text"], **SEEN)
    assert plain.get(timeout=TIMEOUT_S).timings is None
    assert b"timings" not in client.get(f"celery-task-meta-{plain.id}")


def test_a_worker_is_ready_while_it_takes_jobs_and_says_where_its_pages_are(address: str) -> None:
    assert get(f"{address}/healthz/live") == (200, "ready\n")
    assert get(f"{address}/healthz/ready") == (200, "ready\n")
    assert Scrape(address).value("embedq_ready", worker=NAME) == 1
    assert get(f"{address}/metric") == (404, "the pages are /metrics, /healthz/live, /healthz/ready\n")


def test_a_worker_whose_server_is_away_lives_and_is_not_ready(own: OwnServer, minilm: Path) -> None:
    own.client.flushall()
    with start_workers(environment(own.url, minilm), "--cpu-workers", "1") as running:
        address = address_of(running)
        own.kill()
        try:
            wait_until(lambda: get(f"{address}/healthz/ready") == (503, "waiting for the server\n"))
            assert get(f"{address}/healthz/live")[0] == 200
            assert Scrape(address).value("embedq_ready") == 0
        finally:
            own.start()
        wait_until(lambda: get(f"{address}/healthz/ready")[0] == 200)
        with application(own.url, is_worker=False) as app:
            job = app.send_task("tasks.embed", args=[["back again"]], kwargs=SEEN, queue="embed.seen")
            assert len(job.get(timeout=TIMEOUT_S)) == 1


def test_a_worker_that_drains_is_not_ready_and_takes_its_report_back(
    running: Running, address: str, server: str, client: redis.Redis
) -> None:
    each = [[f"{number}: {word} " * 200 for word in range(64)] for number in range(6)]  # a second each, no text twice
    jobs = [tasks.embed.apply_async((texts,), SEEN, priority=9) for texts in each]
    wait_until(lambda: Scrape(address).value("embedq_held_jobs") > 1)
    assert in_flight(server, "seen")
    running.process.terminate()
    # Both at once: it may end soon, and then answers nobody.
    pages = wait_until(
        lambda: (ready := get(f"{address}/healthz/ready"))[0] == 503 and (ready, get(f"{address}/healthz/live"))
    )
    assert pages == ((503, "draining\n"), (200, "draining\n"))
    assert running.wait(TIMEOUT_S) == 0
    assert NAME not in Speeds(client).present()
    num_stored = client.exists(*(f"celery-task-meta-{job.id}" for job in jobs))
    assert num_stored + client.llen("embed.seen:9") == len(jobs)  # what was not finished is back in its queue
    assert not in_flight(server, "seen")  # other tests' jobs may be: with a countdown, or a worker that was killed


@pytest.mark.parametrize(
    ("port", "label", "expected"),
    [
        (None, "cuda3", None),
        (0, "cuda3", 0),
        (9100, "cuda3", 9103),
        (9100, "cpu11", 9111),
        (9100, "cuda1-2", 9201),
        (9100, "", 9100),
    ],
)
def test_workers_of_one_host_take_neighbouring_ports(port: int | None, label: str, expected: int | None) -> None:
    assert port_of(port, label) == expected


def test_a_port_that_is_none_or_taken_stops_the_worker_with_a_clear_message(own: OwnServer, minilm: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"the worker on cuda9 would take 65544"):
        port_of(65_535, "cuda9")
    with pytest.raises(InvalidSettings, match="metrics_port"):
        read_settings(metrics_port=70_000)
    wrong = environment(own.url, minilm) | {"EMBEDQ_METRICS_PORT": str(own.port)}
    with Running([sys.executable, "-m", "embedq.workers.worker"], wrong) as worker:
        assert worker.wait() == 1
        assert f"metrics cannot be served at 127.0.0.1 port {own.port}" in worker.output
