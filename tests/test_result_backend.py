"""What a batch stores: one write, Celery's own blobs, a success never overwritten. Real server, Celery's tracer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from uuid import uuid4

import numpy as np
import pytest
from celery import Celery
from celery.app.task import Context
from celery.backends.redis import RedisBackend

from embedq.core.errors import InvalidInput, InvalidSettings, JobTooLarge
from embedq.core.results import Embeddings
from embedq.workers.jobs import result_backend
from embedq.workers.jobs.result_backend import BatchBackend
from tests.own_server import OwnServer
from tests.traced_jobs import CALLS, application, blob, close, make_app, run

#: Celery's own backend, which ours is compared with, uses a command that its client library advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")


@pytest.fixture
def stock(app: Celery, own: OwnServer) -> Iterator[RedisBackend]:
    """Celery's own backend on the same server."""
    one = RedisBackend(app=app, url=own.url)
    yield one
    close(one)


def test_a_batch_of_results_is_one_call_of_the_server(app: Celery, own: OwnServer) -> None:
    run(app, "embed_one")  # loads the script
    commands = ("evalsha", "set", "publish", "get", "mget", "multi", "exec", "setex")
    before = {name: own.count(name) for name in commands}
    with app.backend.batch():
        jobs = [run(app, "embed_one", index) for index in range(100)]
        assert own.client.dbsize() == 1
    made = {name: own.count(name) - before[name] for name in commands}
    assert made == dict.fromkeys(commands, 0) | {"evalsha": 1, "set": 100, "publish": 100}
    assert [app.AsyncResult(job).get().dense[0, 0] for job in jobs] == list(range(100))


def test_the_blob_has_the_fields_types_and_life_that_celery_gives_it(
    app: Celery, own: OwnServer, stock: RedisBackend
) -> None:
    for state, value in (("SUCCESS", {"a": 1}), ("FAILURE", InvalidInput("bad")), ("RETRY", InvalidInput("again"))):
        context = Context(id="stock", group="g", parent_id="p")
        stock.store_result("stock", value, state, traceback="tb", request=context)
        app.backend.store_result("ours", value, state, traceback="tb", request=context)
        theirs, mine = blob(own, "stock"), blob(own, "ours")
        assert list(theirs) == list(mine)
        for changing in ("task_id", "date_done"):
            assert type(theirs.pop(changing)) is type(mine.pop(changing))
        assert theirs == mine
        assert own.client.ttl("celery-task-meta-ours") == own.client.ttl("celery-task-meta-stock") > 0
        own.client.flushall()


def test_a_job_without_a_wanted_result_stores_nothing(app: Celery, own: OwnServer) -> None:
    with app.backend.batch():
        run(app, "embed_one", ignore_result=True)
        run(app, "fail", ignore_result=True)
    assert own.client.dbsize() == 0


@pytest.mark.parametrize("is_batch", [True, False])
def test_a_stored_success_is_never_overwritten(app: Celery, own: OwnServer, is_batch: bool) -> None:
    job = run(app, "embed_one", 1.0)
    with own.client.pubsub() as heard:
        heard.subscribe(f"celery-task-meta-{job}")
        heard.get_message(timeout=5)
        if is_batch:
            with app.backend.batch():
                run(app, "embed_one", 2.0, job_id=job)
                run(app, "fail", job_id=job)
        else:
            run(app, "fail", job_id=job)
        app.backend.client.publish(f"celery-task-meta-{job}", "end")
        message = heard.get_message(timeout=5)
    assert message["data"] == b"end"  # nothing was published before it
    assert app.AsyncResult(job).get().dense[0, 0] == 1.0


def test_a_success_that_a_stock_worker_stored_as_json_is_final_too(
    app: Celery, own: OwnServer, stock: RedisBackend
) -> None:
    stock.serializer = "json"
    stock.store_result("job", {"dense": 1}, "SUCCESS")
    run(app, "fail", job_id="job")
    assert b'"SUCCESS"' in own.client.get("celery-task-meta-job")


@pytest.mark.parametrize("state", ["FAILURE", "RETRY", "STARTED", "REVOKED"])
def test_what_is_not_a_success_gives_way_to_one(app: Celery, own: OwnServer, state: str) -> None:
    app.backend.store_result("job", InvalidInput("SUCCESS") if state != "STARTED" else {"pid": 1}, state)
    run(app, "embed_one", job_id="job")
    assert blob(own, "job")["status"] == "SUCCESS"


def test_of_two_workers_that_race_one_result_is_stored_and_published(app: Celery, own: OwnServer) -> None:
    jobs = [str(uuid4()) for _ in range(200)]
    begin = threading.Barrier(2)

    def work(value: float) -> None:
        with app.backend.batch():  # of this thread
            for job in jobs:
                run(app, "embed_one", value, job_id=job)
            begin.wait(10)

    with own.client.pubsub() as heard:
        heard.psubscribe("celery-task-meta-*")
        heard.get_message(timeout=5)
        threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        own.client.publish("celery-task-meta-end", "end")
        published = {}
        while (message := heard.get_message(timeout=5))["data"] != b"end":
            assert message["channel"] not in published
            published[message["channel"]] = message["data"]
    assert published == {f"celery-task-meta-{job}".encode(): own.client.get(f"celery-task-meta-{job}") for job in jobs}


def test_a_list_at_a_jobs_key_does_not_keep_its_neighbours_from_being_stored(app: Celery, own: OwnServer) -> None:
    own.client.rpush("celery-task-meta-odd", "x")
    with app.backend.batch():
        jobs = [run(app, "embed_one", job_id=name) for name in ("one", "odd", "two")]
    assert [blob(own, job)["status"] for job in jobs] == ["SUCCESS"] * 3


def test_a_result_above_the_limit_fails_its_job_alone_and_says_what_to_do(
    app: Celery, own: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_backend, "MAX_RESULT_BYTES", 10_000)
    CALLS.append(lambda: Embeddings(dense=np.zeros((10, 384), np.float32), model="minilm"))
    with app.backend.batch():
        large, small = run(app, "call", 0), run(app, "embed_one")
    with pytest.raises(JobTooLarge, match=r"may have 10,000 bytes; this one has 15,\d+. Send fewer texts"):
        app.AsyncResult(large).get(timeout=5)
    stored = blob(own, large)["result"]
    assert (stored["exc_module"], stored["exc_type"]) == ("embedq.core.errors", "JobTooLarge")  # what a producer knows
    assert blob(own, small)["status"] == "SUCCESS"


def test_settings_that_would_hide_the_status_are_refused(own: OwnServer) -> None:
    app = make_app(own.url, result_compression="gzip")
    with pytest.raises(InvalidSettings, match="result_compression"):
        _ = app.backend


def test_extended_results_keep_celerys_fields(own: OwnServer) -> None:
    with application(own.url, result_extended=True) as app:
        with app.backend.batch():
            job = run(app, "embed_one", retries=2)
        assert {"name", "args", "kwargs", "worker", "retries", "queue"} <= blob(own, job).keys()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://h/0", "BatchBackend"),
        ("rediss://h/0?ssl_cert_reqs=required", "BatchBackend"),
        ("sentinel://h:26379/0", "SentinelBatchBackend"),
    ],
)
def test_a_worker_stores_in_batches_whatever_kind_of_server_it_has(url: str, name: str) -> None:
    app = make_app(url, result_backend_transport_options={"master_name": "main"})
    assert isinstance(app.backend, BatchBackend)
    assert type(app.backend).__name__ == name


def test_a_result_costs_a_third_of_what_it_costs_with_celerys_backend(
    app: Celery, own: OwnServer, stock: RedisBackend
) -> None:
    value = Embeddings(dense=np.ones((1, 384), np.float32), model="minilm")

    def seconds(store: Callable[[], None]) -> float:
        begun_s = time.process_time()
        store()
        return time.process_time() - begun_s

    def alone() -> None:
        for index in range(256):
            stock.mark_as_done(f"stock-{index}", value, Context(id="x"))

    def together() -> None:
        with app.backend.batch():
            for index in range(256):
                app.backend.mark_as_done(f"ours-{index}", value, Context(id="x"))

    together()
    own.client.flushall()
    tries = [(seconds(alone), seconds(together)) for _ in range(3)]
    assert min(mine for _, mine in tries) < min(theirs for theirs, _ in tries) / 3
