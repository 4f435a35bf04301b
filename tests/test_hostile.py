"""Nothing that is read from the server is run, imported or believed beyond what it can be; whoever reads it goes on."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis
from celery import Celery
from celery.backends.base import COMPRESSED_PAYLOAD_MAGIC

from embedq import tasks
from embedq.tasks.__main__ import main
from embedq.tasks.models import KEY, Registry
from tests.consuming import Consuming, in_flight, send
from tests.echo_worker import app as echo_app
from tests.echo_worker import echo
from tests.hostile import COMMANDS, PICKLE, Trap, message
from tests.own_server import OwnServer
from tests.test_transport import TIMEOUT_S, start, wait_until
from tests.traced_jobs import run


@pytest.fixture
def url(delivery_url: str) -> str:
    return delivery_url


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url) as client:
        client.flushall()
        yield client


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path)


def test_a_worker_hears_on_after_whatever_it_was_told(url: str, client: redis.Redis, trap: Trap) -> None:
    with start(url) as running:
        wait_until(lambda: echo_app.control.ping(timeout=1, limit=1))  # "ready" comes before it listens
        pickled = {"pickle": message(trap.pickled, PICKLE), "pickle by its name": message(trap.pickled, "pickle")}
        for name, raw in (COMMANDS | pickled).items():
            assert client.publish("/0.celery.pidbox", raw) == 1, f"nobody heard {name}"
            assert echo_app.control.ping(timeout=TIMEOUT_S, limit=1), f"it answers no more after {name}"
            assert running.process.poll() is None, name
        assert echo.delay(1).get(timeout=TIMEOUT_S) == 1
        assert "connection lost" not in running.output.lower()
    assert not trap.is_sprung


@pytest.mark.usefixtures("worker")
def test_a_worker_with_models_hears_on_too(server: str) -> None:
    with redis.Redis.from_url(server) as client:
        for name in ("a list", "a body that is null"):  # one is kombu's to read, the other Celery's
            assert client.publish("/0.celery.pidbox", COMMANDS[name]) >= 1
            assert tasks.app.control.ping(timeout=TIMEOUT_S, limit=1), name
    assert tasks.embed.delay(["a text"]).get(timeout=TIMEOUT_S).dense.shape == (1, 384)


def test_an_event_that_is_a_pickle_is_passed_over(
    url: str, client: redis.Redis, trap: Trap, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []

    def hear(connection: Any) -> None:
        for raw in (message(trap.pickled, PICKLE), message(b'{"type": "worker-online", "hostname": "w"}')):
            client.publish("/0.celeryev/worker.online", raw)
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.2)  # subscribes at its first turn

    with echo_app.connection_for_read() as connection:
        receiver = echo_app.events.Receiver(connection, handlers={"*": lambda event: heard.append(event["type"])})
        with receiver.consumer_context(wakeup=False) as (own, _, _):
            wait_until(lambda: hear(own) or heard)
    assert set(heard) == {"worker-online"}
    assert "Refusing to deserialize untrusted content of type pickle" in caplog.text
    assert not trap.is_sprung


def blob(**changes: Any) -> bytes:
    meta = {"status": "SUCCESS", "result": 1, "traceback": None, "children": [], "task_id": "job"}
    packed: bytes = msgpack.packb(meta | changes)
    return packed


def failure(module: Any, name: Any, *arguments: Any) -> bytes:
    return blob(status="FAILURE", result={"exc_module": module, "exc_type": name, "exc_message": list(arguments)})


NO_RESULTS = {
    "a list": msgpack.packb([1, 2]),
    "a number": msgpack.packb(7),
    "nothing that is msgpack": b"\xc1\xff",
    "JSON": b'{"status": "SUCCESS"}',
    "nested beyond reason": b"\x91" * 100_000,
    "longer than it is": b"\xdd\xff\xff\xff\xff",
    "no status": msgpack.packb({"result": 1, "task_id": "job"}),
    "a status that is a list": blob(status=["SUCCESS"]),
    "an id that is a map": blob(task_id={}),
    "children that are a number": blob(children=7),
    "children of another shape": blob(children=[7, {"a": 1}]),
    "a traceback that is a map": blob(traceback={}),
    "an error that is a text": blob(status="FAILURE", result="os.system"),
    "an error without a class": blob(status="FAILURE", result={"exc_message": "x"}),
    "a class that is a list": failure("builtins", ["ValueError"]),
    "a class with an endless name": failure(None, "x" * 1_000_000),
    "a bomb": COMPRESSED_PAYLOAD_MAGIC + b"application/x-gzip\0" + zlib.compress(bytes(100_000_000)),
    "a malformed array": blob(result={"dtype": "|O", "shape": [1], "data": b"12345678"}),
}  # fmt: skip


def waits() -> dict[str, Callable[[Any], Any]]:
    return {
        "get": lambda job: job.get(timeout=TIMEOUT_S),
        "group": lambda job: job.app.ResultSet([job], app=job.app).join_native(timeout=TIMEOUT_S),
        "aget": lambda job: asyncio.run(tasks.aget(job, timeout=TIMEOUT_S)),
    }


@pytest.mark.parametrize("way", waits())
def test_what_is_no_result_fails_the_one_who_waits_for_it(
    own: OwnServer, producer: Celery, trap: Trap, way: str
) -> None:
    for name, raw in (NO_RESULTS | {"a pickle": trap.pickled}).items():
        job_id = f"{way} {name}"
        own.client.set(f"celery-task-meta-{job_id}", raw)
        started_s = time.monotonic()
        with pytest.raises(ValueError, match="the value stored for this job is no result"):
            waits()[way](producer.AsyncResult(job_id))
        assert time.monotonic() - started_s < 10, name
    assert not trap.is_sprung


@pytest.mark.parametrize("way", ["get", "aget"])
def test_what_is_no_result_fails_no_neighbour(own: OwnServer, app: Celery, producer: Celery, way: str) -> None:
    jobs = [producer.AsyncResult(f"{way} bad {number}") for number in range(len(NO_RESULTS))]
    good = producer.AsyncResult(f"{way} good")

    async def gather() -> list[Any]:
        return await asyncio.gather(*(tasks.aget(job, TIMEOUT_S) for job in (*jobs, good)), return_exceptions=True)

    def answer() -> None:
        wait_until(lambda: len(own.client.pubsub_channels()) == len(jobs) + 1)
        for job, raw in zip(jobs, NO_RESULTS.values(), strict=True):
            own.client.publish(f"celery-task-meta-{job.id}", raw)
        run(app, "embed_one", 1.0, job_id=good.id)

    answers = in_thread(
        answer, lambda: asyncio.run(gather()) if way == "aget" else wait_for_all(producer, [*jobs, good])
    )
    assert [type(one) for one in answers[:-1]] == [ValueError] * len(jobs)
    assert answers[-1].dense[0, 0] == 1.0


def wait_for_all(producer: Celery, jobs: list[Any]) -> list[Any]:
    """What a group gives, errors included."""
    producer.ResultSet(jobs, app=producer).join_native(timeout=TIMEOUT_S, propagate=False)
    return [job.result for job in jobs]


def in_thread(meanwhile: Callable[[], None], do: Callable[[], Any]) -> Any:
    thread = threading.Thread(target=meanwhile)
    thread.start()
    try:
        return do()
    finally:
        thread.join()


def test_a_result_is_of_the_key_where_it_lies_and_not_of_the_id_in_it(own: OwnServer, producer: Celery) -> None:
    own.client.set("celery-task-meta-one", blob(task_id="two", result="of one"))
    own.client.set("celery-task-meta-two", blob(task_id="two", result="of two"))
    jobs = [producer.AsyncResult(name) for name in ("one", "two")]
    assert producer.ResultSet(jobs, app=producer).join_native(timeout=TIMEOUT_S) == ["of one", "of two"]
    assert [job.get(timeout=TIMEOUT_S) for job in jobs] == ["of one", "of two"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "SystemExit"),
        ("builtins", "KeyboardInterrupt"),
        ("celery.exceptions", "WorkerShutdown"),
        ("builtins", "eval"),
        ("os", "path.join"),
        ("concurrent.futures", "ProcessPoolExecutor"),  # an attribute that imports a module
        ("no.such.module", "Error"),
        (7, "Error"),
    ],
)
def test_an_error_is_an_exception_and_nothing_else(own: OwnServer, producer: Celery, module: Any, name: str) -> None:
    job = producer.AsyncResult(f"{module} {name}")
    own.client.set(f"celery-task-meta-{job.id}", failure(module, name, "argument"))
    loaded = set(sys.modules)
    with pytest.raises(Exception, match="argument") as caught:
        job.get(timeout=TIMEOUT_S)
    assert (type(caught.value).__name__, type(caught.value).__module__) == (name, "celery.backends.base")
    assert set(sys.modules) - loaded == set()


def test_only_announcements_are_believed(own: OwnServer) -> None:
    own.client.flushall()
    model = {
        "alias": "good",
        "source": "s",
        "kinds": ["embed"],
        "dimensions": 8,
        "max_length": 9,
        "outputs": [],
        "default_for": [],
    }
    values = {
        "good": model,
        "newer": model | {"alias": "newer", "a_field_of_tomorrow": 1},
        "list": [1],
        "missing": {"alias": "missing"},
        "kinds": model | {"kinds": 7},
        "numbers": model | {"max_length": "9"},
        "names": model | {"default_for": [{"a": 1}]},
        "large": model | {"source": "x" * 100_000},
    }
    for alias, value in values.items():
        own.client.hset(KEY, alias, json.dumps(value))
    own.client.hset(KEY, mapping={b"\xff": "{}", "nested": b"[" * 100_000, "no JSON": b"\xff"})
    registry = Registry(own.client)
    assert registry.all().keys() == {"good", "newer"}
    registry.check("embed", "good")


def test_a_letter_is_shown_whatever_is_in_it(
    url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks.app.conf, "broker_url", url)
    escape = "\x1b]0;title\x07\r\n"
    letters = [
        {"nothing": "known"},
        {
            "reason": escape,
            "list": escape,
            "detail": escape,
            "deliveries": f"1\t2\t3\t{escape}\tlist",
            "message": b"\xff",
        },
        {"deliveries": "no\nlines\tof ours\n99999999999999999999999\t1\t1\tw\tl", "message": "[" * 100_000},
        {"message": json.dumps({"headers": {"id": escape + "x" * 10_000, "task": [1] * 10_000}})},
        {"message": json.dumps({"headers": [1]})},
        {"message": "1" * 100_000},
    ]
    for letter in letters:
        client.xadd("embedq:dead", letter)
    client.xadd("embedq:dead", {"reason": "in the year 300,000"}, id="9999999999999999-1")
    for words in (["list"], ["show", "all"]):
        assert main(["dead", *words]) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert "\r" not in shown
        assert max(map(len, shown.splitlines())) < 1000
    assert main(["dead", "drop", "all"]) == 0


def test_records_that_are_none_stop_no_worker(url: str, client: redis.Redis) -> None:
    rubbish = ["", "no record", "\xff\n\n\t\t", "1\t.\t1\tworker\ta", "x" * 1_000_000, "1\t1\t1"]
    send(url, "a", *range(len(rubbish)))
    tags = [json.loads(raw)["properties"]["delivery_tag"] for raw in client.lrange("a", 0, -1)]
    for tag, record in zip(tags, rubbish, strict=True):
        client.hset("embedq:jobs", tag, record)  # of jobs that wait
        client.hset("embedq:jobs", f"gone-{tag}", record)  # of jobs that are nowhere
    with Consuming(url, ["a"], max_attempts=1000) as worker:
        worker.run_until(lambda: len(worker.got) == len(rubbish))
        worker.channel.leases.give_back_expired()
        assert not [tag for tag in client.hkeys("embedq:jobs") if tag.startswith(b"gone")]
        for tag, record in zip(tags[:3], rubbish[:3], strict=True):
            client.hset("embedq:jobs", tag, record)  # of jobs that run
        assert set(worker.channel.leases.renew(tags)) == set(tags[:3])
        worker.channel.leases.give_back_expired()
        for held in worker.got:
            held.ack()
        worker.run_until(lambda: client.hlen("unacked") == 0)
    assert in_flight(client) == 0
