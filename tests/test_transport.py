"""The transport under a real Celery worker: killed, stopped, cut off, fed with rubbish."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import kombu.transport
import pytest
import redis
from kombu.transport import redis as stock

from embedq.core.errors import InvalidSettings
from embedq.workers.broker import server_check, transport
from embedq.workers.celery_private import ChannelBase
from tests.consuming import calls, context, dead_letters, in_flight
from tests.echo_worker import echo
from tests.running import Running

TIMEOUT_S = 60

#: Seconds; a killed worker's jobs must wait for it, a living one's must not lose it on a busy machine.
LEASE_S = 2


def start(url: str, **environment: str) -> Running:
    """A worker of the queue `echo`, ready."""
    running = Running(
        [sys.executable, "-m", "tests.echo_worker"],
        {"EMBEDQ_REDIS_URL": url, "EMBEDQ_LEASE_S": str(LEASE_S)} | environment,
    )
    running.wait_for("echo is ready")
    return running


def kill(running: Running) -> None:
    running.process.kill()
    running.wait()


def wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def answers(jobs: list[Any]) -> list[int]:
    return [job.get(timeout=TIMEOUT_S) for job in jobs]


def test_a_job_sent_to_a_worker_that_never_wakes_up_again_is_not_lost(url: str, client: redis.Redis) -> None:
    with start(url) as running:
        echo.delay(0).get(timeout=TIMEOUT_S)
        wait_until(lambda: not in_flight(client))
        running.process.send_signal(signal.SIGSTOP)  # it waits for jobs; a blocking pop would take the next one
        job = echo.delay(1)
        assert client.llen("echo") + client.hlen("unacked") == 1
        kill(running)
    with start(url):
        assert job.get(timeout=TIMEOUT_S) == 1


def test_no_kill_loses_a_job(url: str, client: redis.Redis) -> None:
    chance = random.Random(5)
    jobs: list[Any] = []
    killed = 0
    running = start(url, EMBEDQ_MAX_ATTEMPTS="1000")
    try:
        while killed < 5:
            jobs += [echo.delay(len(jobs) + number, 0.001) for number in range(40)]
            time.sleep(chance.uniform(0, 0.15))  # any moment may be the one
            kill(running)
            killed += 1
            running = start(url, EMBEDQ_MAX_ATTEMPTS="1000")
        assert answers(jobs) == list(range(len(jobs)))
        wait_until(lambda: not in_flight(client) and not client.llen("echo"))
        assert running.process.poll() is None
    finally:
        running.stop()


def test_a_stopping_worker_finishes_what_runs_and_gives_back_the_rest_in_order(url: str, client: redis.Redis) -> None:
    with start(url, ECHO_THREADS="4", EMBEDQ_LEASE_S="1") as running:
        jobs = [echo.delay(number, 3) for number in range(4)]
        wait_until(lambda: client.hlen("runs") == 4)
        later = [echo.delay(4 + number, 3) for number in range(3)]
        assert running.stop() == 0  # takes three leases
    assert answers(jobs) == [0, 1, 2, 3]
    ids = [json.loads(raw)["headers"]["id"] for raw in reversed(client.lrange("echo", 0, -1))]
    assert ids == [job.id for job in later]
    assert in_flight(client) == 0
    assert set(client.hvals("runs")) == {b"1"}


@pytest.mark.parametrize("killed_type", ["normal", "pubsub"])
def test_a_worker_whose_connections_are_cut_goes_on(url: str, client: redis.Redis, killed_type: str) -> None:
    with start(url) as running:
        assert echo.delay(0).get(timeout=TIMEOUT_S) == 0
        client.client_kill_filter(_type=killed_type, skipme=True)
        assert answers([echo.delay(number) for number in range(20)]) == list(range(20))
        assert running.process.poll() is None


def test_a_cut_connection_repeats_no_job_that_is_being_computed(url: str, client: redis.Redis) -> None:
    with start(url, ECHO_THREADS="2") as running:
        jobs = [echo.delay(number, 3 * LEASE_S) for number in range(2)]
        wait_until(lambda: client.hlen("runs") == 2)
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)
        running.wait_for("Connection to broker lost")
        last = echo.delay(2)
        assert answers([*jobs, last]) == [0, 1, 2]
        wait_until(lambda: not in_flight(client) and not client.llen("echo"))
        assert set(client.hvals("runs")) == {b"1"}
        assert "leases_lost" not in running.output


def envelope(**changes: Any) -> bytes:
    """A message as our producers send it, with changes: of headers, properties, or the whole."""
    headers = {"lang": "py", "task": "echo", "id": os.urandom(8).hex(), "argsrepr": "(1,)", "retries": 0}
    properties = {"delivery_tag": os.urandom(8).hex(), "body_encoding": "base64", "priority": 0,
                  "delivery_info": {"exchange": "", "routing_key": "echo"}, "correlation_id": "1"}  # fmt: skip
    message = {
        "body": base64.b64encode(json.dumps([[1], {}, {}]).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {**headers, **changes.pop("headers", {})},
        "properties": {**properties, **changes.pop("properties", {})},
    }
    return json.dumps({**message, **changes}).encode()


def as_body(value: Any) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def without(name: str) -> bytes:
    message = json.loads(envelope())
    del message["headers"][name]
    return json.dumps(message).encode()


MALFORMED = {
    "no JSON": (b"\xff\xfe no json", "not a JSON object"),
    "a list": (b"[1, 2]", "not a JSON object"),
    "nested beyond reason": (b"[" * 100_000, "not a JSON object"),
    "no properties": (b'{"body": "eA=="}', "no properties"),
    "no tag": (envelope(properties={"delivery_tag": None}), "no delivery tag"),
    "a tag that is no text": (envelope(properties={"delivery_tag": "cut"}).replace(b'"cut"', b'"\xd5c"'), "no delivery tag"),
    "a tag that is a text": (envelope(properties={"delivery_tag": "x" * 300}), "no delivery tag"),
    "a tag of two lines": (envelope(properties={"delivery_tag": "one\ntwo"}), "no delivery tag"),
    "too large": (envelope(body="x" * 3_000_000), "larger than 2162688 bytes"),
    "no base64": (envelope(body="aaaaa"), "cannot be delivered: Error"),
    "an unknown body encoding": (envelope(properties={"body_encoding": "rot13"}), "cannot be delivered: AttributeError"),
    "bytes that are no text": (envelope().replace(b'"lang": "py"', b'"lang": "\xff"'), "cannot be delivered: UnicodeDecodeError"),
    "a body of another shape": (envelope(body=as_body(7)), "cannot be delivered: TypeError"),
    "a body of two": (envelope(body=as_body([[1], {}])), "rejected"),
    "no id": (without("id"), "rejected"),
    "no task": (without("task"), "rejected"),
    "no headers": (envelope() .replace(b'"headers"', b'"heads"'), "rejected"),
    "an unknown task": (envelope(headers={"task": "nobody's"}), "rejected"),
    "pickle": (envelope(**{"content-type": "application/x-python-serialize"}), "rejected"),
    "a type nobody knows": (envelope(**{"content-type": "application/x-unknown"}), "rejected"),
    "a body that is not what it says": (envelope(body="////"), "rejected"),
    "a wrong compression": (envelope(headers={"compression": "application/x-gzip"}), "rejected"),
}  # fmt: skip


def test_rubbish_is_buried_one_by_one_and_its_neighbours_are_answered(url: str, client: redis.Redis) -> None:
    good: list[Any] = []
    for raw, _ in MALFORMED.values():
        good.append(echo.delay(len(good)))
        client.lpush("echo", raw)
    good.append(echo.delay(len(good)))
    with start(url, EMBEDQ_MAX_BYTES_PER_JOB=str(1024 * 1024)) as running:
        assert answers(good) == list(range(len(good)))
        wait_until(lambda: client.xlen("embedq:dead") == len(MALFORMED))
        by_message = {letter["message"]: letter["reason"] for letter in dead_letters(client)}
        found = {name: by_message.get(raw.decode(errors="replace")) for name, (raw, _) in MALFORMED.items()}
        found["too large"] = by_message.get("")  # not kept: it could be of any size
        assert found == {name: reason for name, (_, reason) in MALFORMED.items()}
        assert running.process.poll() is None
        assert "connection lost" not in running.output.lower()
    assert in_flight(client) == client.llen("echo") == 0


def test_a_second_message_of_a_tag_in_flight_is_buried_and_the_first_answered(url: str, client: redis.Redis) -> None:
    job = echo.delay(1, 1)
    raw = client.lindex("echo", 0)
    client.lpush("echo", raw)
    with start(url):
        assert job.get(timeout=TIMEOUT_S) == 1
    assert client.hvals("runs") == [b"1"]
    assert "second message" in dead_letters(client)[0]["reason"]


def test_a_batch_of_finished_jobs_is_acknowledged_in_few_calls(url: str, client: redis.Redis) -> None:
    jobs = [echo.delay(number) for number in range(200)]
    with start(url, ECHO_THREADS="200"):
        answers(jobs)
    assert calls(client, "zrem") < 100
    assert in_flight(client) == 0


def test_redis_urls_lead_to_this_transport_with_the_tls_their_scheme_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(kombu.transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu.transport, "_transport_cache", {})
    worker = context()
    transport.install(worker)
    for scheme, cls in [
        ("redis", transport.Transport),
        ("rediss", transport.Transport),
        ("sentinel", transport.SentinelTransport),
    ]:
        connection = kombu.Connection(f"{scheme}://127.0.0.1:1/0")
        assert isinstance(connection.transport, cls)
        assert connection.transport.Channel.context is worker
        assert connection.transport.driver_type == "redis"
        assert bool(connection.ssl) == (scheme == "rediss")
        connection.switch(f"{scheme}://127.0.0.1:2/0")
        assert isinstance(connection.transport, cls)
    assert transport.SentinelChannel.__mro__[1:4] == (transport.Channel, ChannelBase, stock.SentinelChannel)
    assert {"master_name", "max_attempts"} <= set(transport.SentinelChannel.from_transport_options)


def test_a_redis_cluster_is_refused_with_a_sentence(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server_check.refuse_cluster(kombu.Connection(url))
    monkeypatch.setattr(redis.Redis, "info", lambda *_: {"cluster_enabled": 1})
    with pytest.raises(InvalidSettings, match="part of a Redis Cluster"):
        server_check.refuse_cluster(kombu.Connection(url))
