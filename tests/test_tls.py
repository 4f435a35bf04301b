"""`rediss://`: the whole path through TLS, and nothing at all where a certificate is not the one expected."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from embedq import tasks
from embedq.core.errors import InvalidSettings
from embedq.deploy import flower
from tests.own_server import OwnServer
from tests.producing import Failed, Producing
from tests.running import Running, start_workers
from tests.tls import Authority, TlsProxy

#: Seconds within which a refusal must be told.
REFUSAL_S = 30


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that signed nothing here."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    with OwnServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(server: OwnServer, authority: Authority) -> Iterator[TlsProxy]:
    with TlsProxy(server.port, authority) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def environment(proxy: TlsProxy, authority: Authority) -> dict[str, str]:
    return {"EMBEDQ_REDIS_URL": proxy.url(authority)}


@pytest.fixture(scope="module")
def worker(environment: dict[str, str], minilm: Path) -> Iterator[Running]:
    models = {"EMBEDQ_MODELS": f"minilm={minilm}", "EMBEDQ_LEASE_S": "2"}
    with start_workers(environment | models, "--cpu-workers", "1") as running:
        yield running


@pytest.fixture(scope="module")
def producer(environment: dict[str, str], worker: Running) -> Iterator[Producing]:
    with Producing(environment) as producing:
        yield producing


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("tasks.embed.delay(['a', 'b']).get(timeout=60).dense.shape", (2, 384)),
        ("[job.get(timeout=60).dense.shape for job in tasks.embed_many([['a']] * 20)]", [(1, 384)] * 20),
        ("asyncio.run(tasks.aget(tasks.embed.delay(['some text'] * 500), timeout=60)).dense.shape", (500, 384)),
        ("len(asyncio.run(tasks.aget(celery.group(tasks.embed.s(['c']) for _ in 'ab')(), timeout=60)))", 2),
        ("tasks.embed.delay(['a long text ' * 1000] * 900).get(timeout=60).dense.shape", (900, 384)),
        ("[list(answer.values()) for answer in app.control.ping(timeout=10, limit=1)]", [[{"ok": "pong"}]]),
        ("list(tasks.embed.registry.all())", ["minilm"]),
    ],
)  # fmt: skip
def test_the_whole_path_goes_through_tls(producer: Producing, expression: str, value: Any) -> None:
    assert producer.do(expression) == value


def test_a_lease_is_renewed_through_tls(producer: Producing, worker: Running, server: OwnServer) -> None:
    server.client.config_resetstat()
    producer.do("jobs.update(long=tasks.embed.delay(['a text of some length, repeated ' * 12] * 700))")
    assert producer.do("len(jobs['long'].get(timeout=100))") == 700
    assert "leases_lost" not in worker.output
    assert "jobs_returned" not in worker.output


@pytest.mark.timing
def test_an_idle_worker_is_told_of_a_job_through_tls(producer: Producing) -> None:
    """What TLS has decrypted already is not readable on the socket: a job must not wait there for the next look."""
    once = "(lambda sent_s: (tasks.embed.delay(['a']).get(timeout=60), time.monotonic() - sent_s)[1])(time.monotonic())"
    took_s = producer.do(f"sorted({once} for _ in range(15))")
    assert took_s[7] < 0.5  # half of the interval at which an idle worker looks by itself


def test_flower_shows_the_worker_through_tls(environment: dict[str, str], producer: Producing) -> None:
    with Running(flower.command(port=0), environment | flower.OPEN) as running:
        address = running.wait_for(flower.READY)[0].rpartition(" ")[2]
        deadline_s = time.monotonic() + 60
        while "minilm.cpu0@" not in (shown := page(f"{address}/workers?json=1")):
            assert time.monotonic() < deadline_s, shown
            time.sleep(0.1)
        assert "embed.minilm" in page(f"{address}/broker")
        running.stop(flower.STOP_TIMEOUT_S)


def page(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        return str(answer.read().decode())


def test_dead_letters_are_listed_through_tls(environment: dict[str, str], server: OwnServer, worker: Running) -> None:
    server.client.lpush("embed", "rubbish")
    worker.wait_for("action=worker_ready")
    deadline_s = time.monotonic() + 60
    while not server.client.xlen("embedq:dead"):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    with Running([sys.executable, "-m", "embedq.tasks", "dead", "list"], environment) as running:
        assert running.wait() == 0
    assert "not a JSON object" in running.output


@pytest.mark.timing
@pytest.mark.parametrize("reason", ["another authority", "another host name"])
def test_a_worker_ends_at_once_and_says_whom_it_does_not_trust(
    proxy: TlsProxy, authority: Authority, stranger: Authority, minilm: Path, reason: str
) -> None:
    url = proxy.url(stranger) if reason == "another authority" else proxy.url(authority, host="127.0.0.1")
    started_s = time.monotonic()
    with Running(
        [sys.executable, "-m", "embedq.workers", "--model", f"m={minilm}", "--cpu-workers", "1"],
        {"EMBEDQ_REDIS_URL": url},
    ) as running:
        assert running.wait() == 1
    assert "refuses this worker, or its certificate is not trusted" in running.output
    assert "certificate verify failed" in running.output
    assert "Traceback" not in running.output
    assert time.monotonic() - started_s < REFUSAL_S


@pytest.mark.timing
def test_a_producer_that_does_not_trust_the_server_says_so_and_sends_nothing(
    proxy: TlsProxy, stranger: Authority, server: OwnServer
) -> None:
    num_before = proxy.num_connections
    with Producing({"EMBEDQ_REDIS_URL": proxy.url(stranger)}) as producing:
        for expression in (
            "tasks.embed.delay(['a'])",
            "tasks.embed_many([['a'], ['b']])",
            "app.AsyncResult('some-id').get(timeout=10)",
            "asyncio.run(tasks.aget(app.AsyncResult('some-id'), timeout=10))",
        ):
            started_s = time.monotonic()
            with pytest.raises(Failed, match="certificate verify failed"):
                producing.do(expression)
            assert time.monotonic() - started_s < REFUSAL_S
    assert proxy.num_connections == num_before  # no handshake was ever finished


def test_a_server_that_asks_for_a_certificate_gets_ours(
    server: OwnServer, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.client_files(tmp_path)
    with TlsProxy(server.port, authority, asks_clients=True) as proxy:
        ours = proxy.url(authority, ssl_certfile=str(certificate), ssl_keyfile=str(key))
        with Producing({"EMBEDQ_REDIS_URL": ours}) as producing:
            assert producing.do("(app.backend.client.ping(), app.connection().default_channel.client.ping())") == (
                True,
                True,
            )
        with Producing({"EMBEDQ_REDIS_URL": proxy.url(authority)}) as producing, pytest.raises(Failed):
            producing.do("app.backend.client.ping()")


def test_only_a_url_that_says_so_verifies_nothing(proxy: TlsProxy, stranger: Authority) -> None:
    with Producing({"EMBEDQ_REDIS_URL": proxy.url(stranger, ssl_cert_reqs="none")}) as producing:
        assert producing.do("(app.backend.client.ping(), app.connection().default_channel.client.ping())") == (
            True,
            True,
        )


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://host/0", None),
        ("rediss://host/0", {"ssl_cert_reqs": "required"}),
        ("rediss://host/0?ssl_cert_reqs=CERT_OPTIONAL", {"ssl_cert_reqs": "optional"}),
        ("rediss://host/0?ssl_check_hostname=False&ssl_ca_certs=%2Fa%20b.pem",
         {"ssl_cert_reqs": "required", "ssl_check_hostname": False, "ssl_ca_certs": "/a b.pem"}),
    ],
)  # fmt: skip
def test_what_a_url_says_of_tls(url: str, options: dict[str, Any] | None) -> None:
    assert tasks.config.tls_options(url) == options


def test_a_verification_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(InvalidSettings, match="must be required, optional or none; given 'requierd'"):
        tasks.config.tls_options("rediss://host/0?ssl_cert_reqs=requierd")


def test_the_url_that_is_used_says_how_it_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.config.wire, "redis_url", f"rediss://user:pass@host:1/2?ssl_ca_certs={__file__}")
    parts = urlsplit(tasks.config.redis_url())
    assert (parts.netloc, parts.path, parts.query) == (
        "user:pass@host:1",
        "/2",
        f"ssl_ca_certs={__file__}&ssl_cert_reqs=required",
    )
