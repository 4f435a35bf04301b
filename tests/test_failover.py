"""Behind Sentinel: workers, producers and tools find the server, and go on when another takes its place."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedq import tasks
from embedq.core.errors import InvalidSettings
from embedq.workers import embedded, logs
from tests.failover import MASTER, PASSWORD, SENTINEL_PASSWORD, Failover
from tests.producing import Producing
from tests.running import Running, start_workers

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def failover(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failover]:
    with Failover(tmp_path_factory.mktemp("failover")) as failover:
        yield failover


@pytest.fixture(scope="module")
def worker(failover: Failover, minilm: Path) -> Iterator[Running]:
    environment = failover.environment | {"EMBEDQ_MODELS": f"minilm={minilm}", "EMBEDQ_LEASE_S": "4"}
    with start_workers(environment, "--cpu-workers", "1") as running:
        yield running


@pytest.fixture(scope="module")
def producer(failover: Failover, worker: Running) -> Iterator[Producing]:
    with Producing(failover.environment) as producing:
        yield producing


def test_the_whole_path_goes_where_sentinel_says(failover: Failover, producer: Producing, worker: Running) -> None:
    assert producer.do("tasks.embed.delay(['a', 'b']).get(timeout=60).dense.shape") == (2, 384)
    assert producer.do("asyncio.run(tasks.aget(tasks.embed.delay(['some text'] * 300), timeout=60)).dense.shape") == (
        300,
        384,
    )
    assert producer.do("[len(job.get(timeout=60)) for job in tasks.embed_many([['a'], ['b', 'c']])]") == [1, 2]
    assert producer.do("[list(answer.values()) for answer in app.control.ping(timeout=10, limit=1)]") == [
        [{"ok": "pong"}]
    ]
    with Running([sys.executable, "-m", "embedq.tasks", "models"], failover.environment) as running:
        assert running.wait() == 0
    assert "minilm  embed" in running.output
    with failover.client() as client:
        client.lpush("embed", "rubbish")
        deadline_s = time.monotonic() + 60
        while not client.xlen("embedq:dead"):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    with Running([sys.executable, "-m", "embedq.tasks", "dead", "drop", "all"], failover.environment) as running:
        assert running.wait() == 0
    assert "dropped" in running.output
    shown = worker.output + running.output
    assert PASSWORD not in shown
    assert SENTINEL_PASSWORD not in shown


def test_jobs_sent_before_and_after_a_failover_are_answered(
    failover: Failover, producer: Producing, worker: Running
) -> None:
    for _ in range(2):  # to the second server, and back to the first
        before = "jobs.update(before=tasks.embed_many([['a text, repeated ' * 40] * 40 for _ in range(40)]))"
        producer.do(before)
        producer.do("jobs.update(first=jobs['before'][0].get(timeout=60))")  # the worker is in the midst of them
        with failover.client() as client:
            assert client.hlen("unacked") > 0
        dead = failover.kill_master()
        producer.do("jobs.update(after=[tasks.embed.delay(['a', str(number)]) for number in range(20)])")
        assert producer.do("{len(job.get(timeout=120)) for job in jobs['before']}") == {40}
        assert producer.do("{len(job.get(timeout=120)) for job in jobs['after']}") == {2}
        assert len(worker.wait_for("action=worker_ready")) == 1  # it was never started again
        failover.start_again(dead)


def test_a_worker_that_no_sentinel_answers_waits_and_says_for_what() -> None:
    url = "sentinel://:secret@127.0.0.1:1/0;sentinel://:secret@127.0.0.1:2/0"
    environment = {"EMBEDQ_REDIS_URL": url, "EMBEDQ_SENTINEL_MASTER": MASTER, "EMBEDQ_MODELS": "m=/"}
    with Running([sys.executable, "-m", "embedq.workers.worker"], environment) as running:
        line = running.wait_for("action=server_wait")[0]
        assert "url=sentinel://***@127.0.0.1:1/0;sentinel://***@127.0.0.1:2/0" in line
        assert f"No master found for '{MASTER}'" in line
        running.stop()
    assert "secret" not in running.output


def test_a_sentinel_url_without_the_masters_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match="needs EMBEDQ_SENTINEL_MASTER"):
        tasks.config._sentinel_options("sentinel://one:26379/0")
    monkeypatch.setitem(tasks.config.wire, "sentinel_master", MASTER)
    assert tasks.config._sentinel_options("sentinel://one:26379/0")["master_name"] == MASTER
    assert tasks.config._sentinel_options("redis://one:6379/0") == {}


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://:secret@one:26379/0?ssl_ca_certs=/a.pem;sentinel://two:26379/0",
        "sentinel://:secret@one:26379/0;rediss://two:26379/0",
        "sentinel://:secret@one:26379/0;sentinel://two:26379/0?ssl_cert_reqs=none",
    ],
)
@pytest.mark.parametrize("command", [["embedq.workers.worker"], ["tasks", "models"]])
def test_sentinels_with_tls_are_refused_at_once_and_the_password_stays_untold(url: str, command: list[str]) -> None:
    environment = {"EMBEDQ_REDIS_URL": url, "EMBEDQ_SENTINEL_MASTER": MASTER, "EMBEDQ_MODELS": "m=/"}
    with Running([sys.executable, "-m", *command], environment) as running:
        assert running.wait() == 1
    assert "Sentinels and their server are reached without TLS" in running.output
    assert "secret" not in running.output


def test_several_urls_are_logged_without_their_passwords() -> None:
    assert (
        logs.without_password("sentinel://:a@one/0;sentinel://u:b@two/0") == "sentinel://***@one/0;sentinel://***@two/0"
    )
    assert (
        logs.without_password("rediss://:a@h/0?ssl_keyfile=k&ssl_password=b")
        == "rediss://***@h/0?ssl_keyfile=k&ssl_password=***"
    )


def test_nobody_answers_where_nobody_is() -> None:
    assert not embedded.answers("redis://127.0.0.1:1/0")
