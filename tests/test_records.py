"""What processes of another version wrote is read: records of 0.1.0 as it left them, and its processes beside ours."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from embedq import __version__
from embedq.core import errors
from embedq.tasks.datasets.receipts import Receipt
from embedq.tasks.datasets.run_state import Record, RunState
from embedq.tasks.dead import DeadLetters
from embedq.tasks.models import Registry
from embedq.tasks.speeds import Speed, Speeds
from embedq.workers.heartbeat_line import READY, Beat
from tests import previous
from tests.chaos.fleet import Fleet
from tests.checkpoints import expected_rows
from tests.consuming import Consuming, in_flight
from tests.own_server import OwnServer
from tests.producing import Failed, Producing

#: Written by 0.1.0 with its own code.
RECORDS: dict[str, Any] = json.loads((Path(__file__).parent / "records" / "0.1.0.json").read_text())

TIMEOUT_S = 60.0


def put_results(own: OwnServer) -> None:
    for key, blob in RECORDS["results"].items():
        own.client.set(key, base64.b64decode(blob))


def test_heartbeats_of_the_previous_release_are_read() -> None:
    loading, ready = (Beat.read(line.encode()) for line in RECORDS["heartbeats"])
    assert loading == Beat(version="")
    assert (ready.state, ready.worker, ready.num_jobs, ready.waiting_tokens) == (READY, "m.cpu0@host", 3, 7)
    assert ready.version == ""


def test_announcements_speeds_and_dead_letters_of_the_previous_release_are_read(own: OwnServer) -> None:
    own.client.flushall()
    own.client.hset("embedq:models", mapping=RECORDS["announcements"])
    now_s = own.client.time()[0]
    reports = {name: json.dumps(json.loads(one) | {"told_s": now_s}) for name, one in RECORDS["reports"].items()}
    own.client.hset("embedq:workers", mapping=reports)
    own.client.hset("embedq:speeds", mapping=RECORDS["speeds"])
    own.client.xadd("embedq:dead", RECORDS["dead_letter"])
    (served,) = Registry(own.client).all().values()
    assert (served.alias, served.dimensions, served.default_for, served.version) == ("m", 3, ["embed"], "")
    (report,) = Speeds(own.client).present().values()
    assert (report.models, report.version) == ({"m": Speed(1000.0, {"embed.m": 12.5})}, "")
    assert Speeds(own.client).latest() == report.models
    (letter,) = DeadLetters(own.client).all()
    assert (letter.reason, letter.message) == ("not a JSON object", b"rubbish")


def test_receipts_and_records_of_parts_name_their_version_and_those_of_others_are_read(own: OwnServer) -> None:
    written = Receipt("written", "m", 3).to_map()
    assert written["version"] == __version__
    del written["version"]
    assert Receipt.from_map(written | {"wings": 2}) == Receipt("written", "m", 3, version="")
    assert Receipt.from_map(written | {"version": "9.0"}).version == "9.0"
    with pytest.raises(ValueError, match="malformed receipt"):
        Receipt.from_map(written | {"version": 9})
    own.client.flushall()
    state = RunState(own.client, "", "m")
    state.release(3, Record("done", "job"))
    key = "embedq:dataset:m:parts"
    told = json.loads(own.client.hget(key, "3"))
    assert told.pop("version") == __version__
    own.client.hset(key, mapping={"4": json.dumps(told | {"wings": 2}), "5": json.dumps(told | {"version": 9})})
    assert state.records() == {3: Record("done", "job"), 4: Record("done", "job", version="")}


def test_dead_letters_name_the_version_of_the_worker_that_buried_them(own: OwnServer) -> None:
    own.client.flushall()
    own.client.lpush("a", "rubbish")
    with Consuming(own.url, ["a"]) as worker:
        worker.run_until(lambda: own.client.xlen("embedq:dead"))
    own.client.xadd("embedq:dead", RECORDS["dead_letter"] | {"wings": "2"})
    assert [letter.version for letter in DeadLetters(own.client).all()] == [__version__, ""]


def test_a_newer_report_is_read_without_what_we_do_not_know(own: OwnServer) -> None:
    own.client.flushall()
    newer = {"told_s": own.client.time()[0], "models": {"m": {"colour": "red"}}, "wings": 2, "version": "9.0"}
    own.client.hset("embedq:workers", "w", json.dumps(newer))
    own.client.hset("embedq:speeds", "m", json.dumps({"tokens_per_second": 5, "colour": "red"}))
    (report,) = Speeds(own.client).present().values()
    assert (report.models, report.version) == ({"m": Speed()}, "9.0")
    assert Speeds(own.client).latest() == {"m": Speed(5.0)}


@pytest.mark.parametrize("name", ["InvalidInput", "JobTooLarge", "DeviceFailure", "Poisoned"])
def test_failures_of_the_previous_release_arrive_as_our_classes(own: OwnServer, producer: Celery, name: str) -> None:
    put_results(own)
    with pytest.raises(getattr(errors, name), match=r"recorded by 0\.1\.0"):
        producer.AsyncResult(name).get(timeout=5)


def test_only_our_own_former_classes_are_taken_for_ours(own: OwnServer, producer: Celery) -> None:
    backend = producer.backend
    found = backend.exception_to_python({"exc_module": "core.errors", "exc_type": "annotations", "exc_message": ["x"]})
    assert type(found).__module__ != errors.__name__


def test_results_of_the_previous_release_are_read(own: OwnServer, producer: Celery) -> None:
    put_results(own)
    vectors = producer.AsyncResult("embeddings").get(timeout=5)
    assert (vectors.dense.tolist(), vectors.model) == ([[0, 1, 2], [3, 4, 5]], "m")
    assert (vectors.timings.num_tokens, vectors.timings.version) == (7, "")
    assert list(producer.AsyncResult("ranking").get(timeout=5)) == [(1, 0.75), (0, 0.5)]


def test_a_job_that_a_worker_of_the_previous_release_left_in_flight_is_done_here(own: OwnServer) -> None:
    own.client.flushall()
    record = RECORDS["in_flight"]
    own.client.hset("unacked", record["tag"], record["unacked"])
    own.client.hset("embedq:jobs", record["tag"], record["jobs"])
    own.client.zadd("unacked_index", {record["tag"]: 1.0})
    with Consuming(own.url, ["a"]) as worker:
        worker.run_until(lambda: worker.got)
        assert worker.numbers() == [1]
        assert worker.got[0].headers["redelivered"]
        worker.got[0].ack()
        worker.run_until(lambda: not in_flight(own.client))


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[OwnServer]:
    """A server that our workers and producers share with those of the previous release."""
    with OwnServer(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the previous release; skipped where the history is not there."""
    directory = tmp_path_factory.mktemp("previous")
    if not previous.unpack(directory):
        pytest.skip(f"commit {previous.COMMIT[:7]} of the previous release is not in this checkout")
    return directory


def test_our_worker_answers_messages_and_producers_of_the_previous_release(
    shared: OwnServer, sources: Path, tmp_path: Path
) -> None:
    ours = {"EMBEDQ_REDIS_URL": shared.url, "EMBEDQ_CONFIG": ""}
    with Fleet(shared.url, tmp_path, 1) as fleet, Producing(ours) as producer:
        fleet.wait_until_serving(1)
        for key, raw in RECORDS["messages"].items():
            shared.client.lpush(key, base64.b64decode(raw))
        rows = producer.do("tasks.app.AsyncResult('recorded-embed').get(timeout=60).dense.tolist()")
        assert rows == expected_rows(["a text", "another text"]).tolist()
        assert producer.do("len(tasks.app.AsyncResult('recorded-rerank').get(timeout=60))") == 2
        assert (
            previous.produce(sources, shared.url, "tasks.embed.delay(['a']).get(timeout=50).dense.shape", TIMEOUT_S)
            == "(1, 2)"
        )
        # As docs/operating/upgrading.md says: the class has the name, and is none of theirs.
        wrong = "tasks.embed.delay(['a'], outputs=('sparse',)).get(timeout=50)"
        assert previous.produce(sources, shared.url, wrong, TIMEOUT_S).split() == [
            "celery.backends.base",
            "InvalidInput",
        ]


def test_our_producer_is_answered_by_a_worker_of_the_previous_release_and_ours_takes_over(
    shared: OwnServer, sources: Path, tmp_path: Path
) -> None:
    ours = {"EMBEDQ_REDIS_URL": shared.url, "EMBEDQ_CONFIG": ""}
    with previous.start_workers(sources, shared.url, tmp_path / "old") as old, Producing(ours) as producer:
        old.wait_for("action=worker_ready")
        rows = producer.do("tasks.embed.delay(['a text']).get(timeout=60).dense.tolist()")
        assert rows == expected_rows(["a text"]).tolist()
        with pytest.raises(Failed) as failed:
            producer.do("tasks.embed.delay(['a text'], outputs=('sparse',)).get(timeout=60)")
        assert failed.value.name == "InvalidInput"
        with Fleet(shared.url, tmp_path, 1) as fleet:
            fleet.wait_until_serving(1)
            ids = [f"upgraded-{number}" for number in range(250)]
            send = "[tasks.embed.apply_async(([one],), task_id=one).id for one in {}]"
            producer.do(send.format(ids[:200]))
            old.stop()
            producer.do(send.format(ids[200:]))
            found = producer.do(f"[tasks.app.AsyncResult(one).get(timeout=60).dense.tolist() for one in {ids}]")
            assert found == [expected_rows([one]).tolist() for one in ids]
    assert in_flight(shared.client) == 0
