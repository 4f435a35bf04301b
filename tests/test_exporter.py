"""The exporter: a real process, scraped over HTTP, in front of a server with known queues."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from celery import Celery
from prometheus_client import CollectorRegistry

from embedq import __version__
from embedq.tasks.exporter import UNMEASURED, QueueCollector, backlog
from embedq.tasks.metrics import EXPORTER
from embedq.tasks.models import Registry, Served, queues_of
from embedq.tasks.speeds import SPEEDS_KEY, WORKERS_KEY, Report, Speed, Speeds
from tests.own_server import OwnServer
from tests.running import Running
from tests.scraping import Scrape, get, wait_until
from tests.traced_jobs import application

MINILM = Served("minilm", "/models/minilm", ["embed", "rerank"], 384, 256, ["dense"], ["embed"])
RANKER = Served("ranker", "/models/ranker", ["rerank"], 1, 512, ["score"], ["rerank"])


@pytest.fixture
def app(own: OwnServer) -> Iterator[Celery]:
    """A producer on an empty server where two models are served."""
    own.client.flushall()
    Registry(own.client).announce([MINILM, RANKER])
    with application(own.url, is_worker=False) as made:
        yield made


@pytest.fixture(scope="module")
def address(own: OwnServer) -> Iterator[str]:
    """A real exporter; it is here before the models are, as in any installation."""
    with Running(
        [sys.executable, "-m", "embedq.tasks", "exporter", "--port", "0"], {"EMBEDQ_REDIS_URL": own.url}
    ) as running:
        yield running.wait_for("metrics of the queues at ")[0].rpartition(" ")[2].removesuffix("/metrics")
        assert running.stop() == 0


def send(app: Celery, queue: str, **sending: object) -> None:
    app.send_task("tasks.embed", args=[["a text"]], queue=queue, **sending)


def test_jobs_are_counted_by_queue_priority_model_and_kind(app: Celery, address: str) -> None:
    for queue, priority, number in [("embed", 0, 3), ("embed", 9, 2), ("embed.minilm", 5, 4), ("rerank", 3, 1)]:
        for _ in range(number):
            send(app, queue, priority=priority)
    scrape = Scrape(address)
    assert scrape.value("embedq_queue_jobs", queue="embed", priority="0") == 3
    assert scrape.value("embedq_queue_jobs", queue="embed", priority="9") == 2
    assert scrape.value("embedq_queue_jobs", queue="embed.minilm", priority="3") == 4  # kombu's step below 5
    assert scrape.value("embedq_queue_jobs") == 10
    assert scrape.value("embedq_backlog_jobs", model="minilm", kind="embed") == 9
    assert scrape.value("embedq_backlog_jobs", model="ranker", kind="rerank") == 1
    assert scrape.value("embedq_backlog_jobs") == 10
    assert scrape.value("embedq_in_flight_jobs") == 0


def test_every_name_is_served_with_its_labels_and_no_other_of_ours(app: Celery, address: str) -> None:
    scrape = Scrape(address)
    ours = {name: family for name, family in scrape.families.items() if name.startswith("embedq_")}
    assert set(ours) == {name.removesuffix("_total") for name in EXPORTER}
    for name, metric in EXPORTER.items():
        assert scrape.labels(name) == set(metric.labels), name
    assert scrape.value("embedq_build_info", version=__version__) == 1


def test_a_backlog_in_seconds_is_its_tokens_by_the_speed_of_the_workers_present(
    app: Celery, address: str, own: OwnServer
) -> None:
    for _ in range(8):
        send(app, "embed.minilm")
    speeds = Speeds(own.client)
    speeds.publish("one", {"minilm": Speed(100.0, {"embed.minilm": 30.0})})
    speeds.publish("two", {"minilm": Speed(300.0, {"embed.minilm": 50.0}), "ranker": Speed()})
    scrape = Scrape(address)
    assert scrape.value("embedq_workers", model="minilm") == 2
    assert scrape.value("embedq_workers", model="ranker") == 1
    labels = {"model": "minilm", "kind": "embed"}
    assert scrape.value("embedq_backlog_tokens", **labels) == 8 * 40
    assert scrape.value("embedq_backlog_seconds", **labels) == pytest.approx(8 * 40 / 400)
    speeds.withdraw("one")
    speeds.withdraw("two")
    # At zero workers: what one would take, at the speed of whoever measured last.
    scrape = Scrape(address)
    assert scrape.value("embedq_workers") == 0
    assert scrape.value("embedq_backlog_seconds", **labels) == pytest.approx(8 * 50 / 300)


def test_a_backlog_that_nobody_ever_measured_is_finite_and_above_nothing(app: Celery, address: str) -> None:
    send(app, "rerank.ranker")
    seconds = Scrape(address).value("embedq_backlog_seconds", model="ranker", kind="rerank")
    assert seconds == UNMEASURED.tokens_per_job["any"] / UNMEASURED.tokens_per_second > 0
    assert backlog({"rerank.ranker": 0}, "ranker", [], Speed()) == (0, 0)


def test_a_worker_that_has_measured_nothing_counts_as_fast_as_the_others() -> None:
    reports = [Report(0.0, {"a": Speed(200.0, {"embed": 10.0})}), Report(0.0, {"a": Speed()})]
    assert backlog({"embed": 30, "embed.a": 10}, "a", reports, Speed(7.0, {"embed.a": 20.0})) == (500, 1.25)


def test_seconds_of_models_that_share_workers_add_up_to_the_time_they_need() -> None:
    both = {"fast": Speed(1000.0, {"embed.fast": 100.0}), "slow": Speed(10.0, {"rerank.slow": 100.0})}
    reports = [Report(0.0, both), Report(0.0, both)]
    fast_s = backlog({"embed.fast": 40}, "fast", reports, Speed())[1]
    slow_s = backlog({"rerank.slow": 4}, "slow", reports, Speed())[1]
    assert (fast_s, slow_s) == (40 * 100 / 1000 / 2, 4 * 100 / 10 / 2)


@pytest.mark.parametrize("prefix", ["one:", "two:"])
def test_two_installations_on_one_server_do_not_see_each_other(own: OwnServer, prefix: str) -> None:
    own.client.flushall()
    for other, alias, served in (("one:", "first", MINILM), ("two:", "second", RANKER)):
        Registry(own.client, other).announce([replace(served, alias=alias)])
        Speeds(own.client, other).publish(f"worker of {alias}", {alias: Speed(10.0)})
        own.client.lpush(f"{other}embed.{alias}", "a job")
    alias = {"one:": "first", "two:": "second"}[prefix]
    registry = CollectorRegistry()
    registry.register(QueueCollector(own.client, prefix, [0, 3, 6, 9], ":"))
    samples = [sample for family in registry.collect() for sample in family.samples]
    assert {sample.labels["model"] for sample in samples if "model" in sample.labels} == {alias, "unknown"}
    assert [sample.value for sample in samples if sample.name == "embedq_workers"] == [1]
    assert sum(sample.value for sample in samples if sample.name == "embedq_queue_jobs") == 1
    assert list(Speeds(own.client, prefix).latest()) == [alias]
    assert not own.client.exists("embedq:models", "embedq:workers", "embedq:speeds")


def test_a_producer_knows_the_models_of_its_own_installation_only(own: OwnServer) -> None:
    own.client.flushall()
    for prefix, alias in (("one:", "first"), ("two:", "second")):
        Registry(own.client, prefix).announce([replace(MINILM, alias=alias)])
    script = (
        "import tasks; options = tasks.app.conf.broker_transport_options; options['global_keyprefix'] = 'two:'\n"
        "tasks.embed.delay(['x'], model='second')\n"
        "try: tasks.embed.delay(['x'], model='first')\n"
        "except Exception as error: print('refused:', error)"
    )
    with Running([sys.executable, "-c", script], {"EMBEDQ_REDIS_URL": own.url}) as running:
        assert running.wait() == 0
    assert "refused: unknown model 'first'; workers have announced second." in running.output
    assert (own.client.llen("two:embed.second"), own.client.keys("*first*")) == (1, [])


def test_a_job_says_when_it_was_sent_and_the_oldest_of_a_queue_counts(
    app: Celery, address: str, own: OwnServer
) -> None:
    send(app, "embed", timestamp=time.time() - 100)
    send(app, "embed", timestamp=time.time() - 50)
    send(app, "embed", priority=9, timestamp=time.time() - 300)
    send(app, "rerank", timestamp=int(time.time() + 50))  # of a producer whose clock is wrong
    scrape = Scrape(address)
    assert scrape.value("embedq_oldest_job_age_seconds", queue="embed") == pytest.approx(300, abs=30)
    assert scrape.value("embedq_oldest_job_age_seconds", queue="rerank") == 0
    assert scrape.value("embedq_oldest_job_age_seconds", queue="embed.minilm") == 0


def test_a_job_of_ours_carries_the_time_it_was_sent(app: Celery, address: str, own: OwnServer) -> None:
    begun_s = int(time.time())
    script = "import tasks; tasks.embed.delay(['x']); tasks.embed_many([['y'], ['z']], model='minilm')"
    with Running([sys.executable, "-c", script], {"EMBEDQ_REDIS_URL": own.url}) as running:
        assert running.wait() == 0
    for queue, number in (("embed", 1), ("embed.minilm", 2)):
        messages = own.client.lrange(queue, 0, -1)
        assert len(messages) == number
        assert all(begun_s <= json.loads(one)["properties"]["timestamp"] <= time.time() for one in messages)
    assert Scrape(address).value("embedq_oldest_job_age_seconds", queue="embed") < 60


def test_a_job_that_does_not_say_is_as_old_as_it_has_been_the_next(app: Celery, address: str, own: OwnServer) -> None:
    send(app, "embed.ranker")
    first = Scrape(address).value("embedq_oldest_job_age_seconds", queue="embed.ranker")
    assert first < 1
    wait_until(lambda: Scrape(address).value("embedq_oldest_job_age_seconds", queue="embed.ranker") > first)
    own.client.delete("embed.ranker")
    send(app, "embed.ranker")
    assert Scrape(address).value("embedq_oldest_job_age_seconds", queue="embed.ranker") == 0


def test_dead_letters_are_counted_and_dropped_ones_stay_in_the_total(app: Celery, address: str, own: OwnServer) -> None:
    scrape = Scrape(address)
    assert scrape.value("embedq_dead_letters_kept") == scrape.value("embedq_dead_letters_total") == 0
    ids = [own.client.xadd("embedq:dead", {"reason": "x"}) for _ in range(3)]
    own.client.xdel("embedq:dead", ids[0])
    scrape = Scrape(address)
    assert scrape.value("embedq_dead_letters_kept") == 2
    assert scrape.value("embedq_dead_letters_total") == 3


def test_a_scrape_reads_a_bounded_number_of_bytes_and_never_all_keys(app: Celery, address: str, own: OwnServer) -> None:
    send(app, "embed", argsrepr="x" * 1000)
    own.client.lpush("rerank", b"x" * 20_000_000)
    for number in range(1000):
        own.client.set(f"celery-task-meta-{number}", "x")
    own.client.config_resetstat()
    Scrape(address)
    stats = own.client.info("commandstats")
    assert not {name for name in stats if name.split("_")[1] in ("keys", "scan", "hscan", "lrange", "dbsize")}
    assert own.client.info("stats")["total_net_output_bytes"] < 100_000
    # 8 queues of 4 lists in one script, 4 keys and the time: nothing that grows with jobs or results.
    assert sum(stats[name]["calls"] for name in stats) < 2 * 8 * 4 + 20


def test_what_is_no_report_is_passed_over(app: Celery, address: str, own: OwnServer) -> None:
    now_s = own.client.time()[0]
    good = {"told_s": now_s, "models": {"minilm": {"tokens_per_second": 5, "tokens_per_job": {}}}}
    for name, value in {
        "good": json.dumps(good),
        "old": json.dumps(good | {"told_s": now_s - 60}),
        "list": "[1]",
        "deep": "[" * 100_000,
        "no number": json.dumps({"told_s": "x", "models": {}}),
        "no models": json.dumps({"told_s": now_s, "models": [1]}),
        "too large a number": json.dumps(good | {"told_s": 10**400}),
        "never": json.dumps(good | {"told_s": float("inf")}),
        "no speed": json.dumps(good | {"models": {"minilm": {"tokens_per_second": float("nan")}}}),
        "bytes": b"\xff\xfe",
    }.items():
        own.client.hset(WORKERS_KEY, name, value)
    own.client.hset(SPEEDS_KEY, "minilm", "{}")
    assert Scrape(address).value("embedq_workers", model="minilm") == 1
    Speeds(own.client).tidy()
    assert own.client.hkeys(WORKERS_KEY) == [b"good"]


def test_reports_go_when_nobody_renews_them(own: OwnServer) -> None:
    own.client.flushall()
    Speeds(own.client).publish("one", {"minilm": Speed()})
    assert 0 < own.client.ttl(WORKERS_KEY) <= 3600
    assert Speeds(own.client).latest() == {}


def test_queues_of_defaults_nobody_announced_are_watched_too() -> None:
    assert queues_of({}) == {"embed": ("unknown", "embed"), "rerank": ("unknown", "rerank")}
    queues = queues_of({"minilm": MINILM})
    assert queues == {
        "embed": ("minilm", "embed"),
        "embed.minilm": ("minilm", "embed"),
        "rerank.minilm": ("minilm", "rerank"),
        "embed_parts.minilm": ("minilm", "part"),
        "rerank": ("unknown", "rerank"),
    }


def test_a_server_that_is_away_fails_the_scrape_and_it_goes_on_afterwards(address: str, own: OwnServer) -> None:
    assert get(f"{address}/healthz/ready")[0] == 200
    own.kill()
    try:
        assert get(f"{address}/metrics")[0] == 500
        assert get(f"{address}/healthz/ready")[0] == 503
        assert get(f"{address}/healthz/live")[0] == 200
    finally:
        own.start()
    assert get(f"{address}/metrics")[0] == 200
    assert get(f"{address}/healthz/ready")[0] == 200


def test_a_wrong_port_ends_the_command_with_one_line(own: OwnServer) -> None:
    command = [sys.executable, "-m", "embedq.tasks", "exporter", "--port", str(own.port)]
    with Running(command, {"EMBEDQ_REDIS_URL": own.url}) as running:
        assert running.wait() == 1
    assert f"metrics cannot be served at 127.0.0.1 port {own.port}" in running.output
    assert "Traceback" not in running.output
