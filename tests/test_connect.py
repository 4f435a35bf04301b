"""`tasks.connect`: an application keeps what it has set, and its tasks meet ours in real workers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from celery import Celery, chain, chord, group
from kombu import Queue

from embedq import tasks
from embedq.core.errors import InvalidSettings
from embedq.tasks.connect import route
from tests import application, json_application
from tests.running import ROOT, Running
from tests.wheels import run

TIMEOUT_S = 60.0

#: Length of MiniLM's vectors.
DIM = 384

OURS = tasks.config.broker_transport_options


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> str:
    """embedq's server, to which nothing connects."""
    url = "redis://:secret@localhost:7001/2"
    for name in ("broker_url", "result_backend"):
        monkeypatch.setitem(tasks.app.conf, name, url)
    return url


def application_with(**settings: Any) -> Celery:
    app = Celery("mine", set_as_current=False)
    app.conf.update(settings)
    return app


def test_an_application_without_settings_gets_what_it_needs(url: str) -> None:
    app = application_with()
    tasks.connect(app)
    assert (app.conf.broker_url, app.conf.result_backend) == (url, url)
    assert app.conf.task_routes == (route,)
    assert app.conf.accept_content == ["json", "embedq"]
    assert app.conf.result_accept_content is None
    assert app.conf.task_serializer == app.conf.result_serializer == "json"
    assert app.conf.task_default_queue == "celery"
    assert app.conf.broker_transport_options == {
        "sep": OURS["sep"],
        "priority_steps": OURS["priority_steps"],
        "unacked_key": "unacked:celery",
        "unacked_index_key": "unacked_index:celery",
        "unacked_mutex_key": "unacked_mutex:celery",
    }


#: What an application set, and what must be left of it.
KEPT = {
    "task_default_queue": "mine",
    "task_serializer": "json",
    "result_serializer": "json",
    "result_backend": "cache+memory://",
    "broker_url": "redis://other:words@127.0.0.1:7001/2",
    "task_queues": [Queue("mine")],
    "result_expires": 7,
}


@pytest.mark.parametrize("is_read", [False, True], ids=["before the configuration is read", "after"])
def test_what_the_application_set_is_kept(url: str, is_read: bool) -> None:
    own = {"visibility_timeout": 7200, "unacked_key": "mine", "client_name": "mine"}
    app = application_with(
        **KEPT,
        broker_transport_options=own,
        task_routes={"tasks.*": "mine"},
        accept_content=["yaml"],
        result_accept_content=["json"],
    )
    if is_read:
        assert app.conf.task_default_queue == "mine"
    assert app.configured == is_read
    tasks.connect(app)
    assert {name: app.conf[name] for name in KEPT} == KEPT
    assert app.conf.broker_transport_options.items() >= own.items()
    assert app.conf.broker_transport_options["sep"] == OURS["sep"]
    assert app.conf.task_routes == (route, {"tasks.*": "mine"})
    assert app.conf.accept_content == ["yaml", "embedq"]
    assert app.conf.result_accept_content == ["json", "embedq"]


def test_settings_from_an_object_may_come_before_or_after(url: str) -> None:
    class Settings:
        CELERY_TASK_DEFAULT_QUEUE = "mine"
        CELERY_ACCEPT_CONTENT = ("json",)

    for names_settings_first in (True, False):
        app = Celery("mine", set_as_current=False)
        steps = [
            lambda app=app: app.config_from_object(Settings, namespace="CELERY"),
            lambda app=app: tasks.connect(app),
        ]
        for step in steps if names_settings_first else reversed(steps):
            step()
        assert app.conf.task_default_queue == "mine"
        assert app.conf.accept_content == ["json", "embedq"]
        assert queue_of(app, "tasks.embed") == "embed"


def test_to_connect_twice_changes_nothing(url: str) -> None:
    app = application_with(task_routes=[{"mine.*": "mine"}], accept_content=["json"])
    read(app, connect=True)
    before = dict(app.conf.changes)
    read(app, connect=True)
    assert dict(app.conf.changes) == before
    assert app.conf.task_routes == (route, {"mine.*": "mine"})


def test_the_serializer_is_shared_where_the_application_asks_for_it(url: str) -> None:
    app = application_with(task_serializer="json")
    tasks.connect(app, share_serializer=True)
    assert app.conf.task_serializer == app.conf.result_serializer == "embedq"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_default_queue": "embed"}, "task_default_queue of the application 'mine' is 'embed'"),
        ({"task_default_queue": "rerank.minilm"}, "is 'rerank.minilm', a queue of embedq's own"),
        ({"broker_url": "redis://:mine@localhost:7001/3"}, "is localhost:7001, database 3, embedq's is localhost:7001"),
        ({"broker_url": "redis://:mine@other/2"}, "is other:6379, database 2, embedq's is localhost:7001, database 2"),
        ({"broker_url": "amqp://me:mine@localhost"}, "is no Redis or Valkey server"),
        ({"broker_url": "redis://:mine@localhost:port/2"}, "is no Redis or Valkey server"),
        ({"broker_transport_options": {"sep": "|"}}, "has sep '|', embedq has ':'"),
        ({"broker_transport_options": {"priority_steps": [0, 9]}}, "has priority_steps [0, 9]"),
        ({"broker_transport_options": {"global_keyprefix": "mine:"}}, "has global_keyprefix 'mine:', embedq has ''"),
    ],
)
@pytest.mark.parametrize("is_read", [False, True], ids=["before the configuration is read", "after"])
def test_what_cannot_work_is_refused(url: str, settings: dict[str, Any], message: str, is_read: bool) -> None:
    app = application_with(**settings)
    if is_read:
        read(app)
    with pytest.raises(InvalidSettings) as caught:
        read(app, connect=True)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert ":mine@" not in str(caught.value)


def read(app: Celery, connect: bool = False) -> None:
    """Have Celery read the application's settings."""
    if connect:
        tasks.connect(app)
    assert app.conf.result_expires


def test_our_jobs_go_to_our_queues_and_the_applications_own_stay_with_it(url: str) -> None:
    app = application_with(task_default_queue="mine", task_routes={"tasks.*": "slow"})

    @app.task(name="tasks.rerank")
    def rerank() -> None:
        """Of a module `tasks.py`, as every tutorial has one."""

    tasks.connect(app)
    assert queue_of(app, "tasks.embed", model="minilm") == "embed.minilm"
    assert queue_of(app, "tasks.embed") == "embed"
    assert queue_of(app, "tasks.rerank") == "rerank"
    assert app.amqp.router.route({}, "tasks.rerank", (), {}, app.tasks["tasks.rerank"])["queue"].name == "slow"
    assert queue_of(app, "tasks.other") == "slow"
    assert queue_of(app, "other") == "mine"


def test_a_task_with_our_name_stays_the_applications_and_ours_stays_ours() -> None:
    code = """
from celery import Celery
mine = Celery("mine")
@mine.task(name="tasks.embed")
def embed(number): return number
from embedq import tasks
mine.finalize()
tasks.app.finalize()
assert mine.tasks["tasks.embed"](3) == 3
assert isinstance(tasks.app.tasks["tasks.embed"], tasks.EngineTask)
"""
    run([sys.executable, "-W", "error", "-c", code], ROOT)


def queue_of(app: Celery, name: str, **kwargs: Any) -> str:
    """The queue to which the application sends a job by name."""
    return str(app.amqp.router.route({}, name, (), kwargs)["queue"].name)


@pytest.fixture(scope="module", params=["application", "json_application"])
def app(request: pytest.FixtureRequest, worker: dict[str, str]) -> Iterator[Any]:
    """An application with a running worker of its own: with our serializer, and with JSON."""
    command = [sys.executable, "-m", "celery", "-A", f"tests.{request.param}", "worker", "--pool", "solo"]
    with Running([*command, "--loglevel", "INFO", "-n", f"{request.param}@%h"], worker) as running:
        running.wait_for(" ready.")
        yield application if request.param == "application" else json_application


def test_a_chain_leads_to_the_application_and_back(app: Any) -> None:
    steps = chain(app.split.s("One. Two. Three"), tasks.embed.s(), app.shape.s(), app.texts_of.s(), tasks.embed.s())
    vectors = steps.delay().get(timeout=TIMEOUT_S)
    assert isinstance(vectors, tasks.Embeddings)
    assert np.shape(vectors) == (3, DIM)


def test_a_chain_begins_and_ends_with_the_application(app: Any) -> None:
    assert chain(tasks.embed.s(["a", "b"]), app.shape.s()).delay().get(timeout=TIMEOUT_S) == [2, DIM]
    assert chain(app.split.s("One. Two"), tasks.embed.s(), app.shape.s()).delay().get(timeout=TIMEOUT_S) == [2, DIM]


def test_a_chord_of_ours_ends_in_a_task_of_the_application(app: Any) -> None:
    header = [tasks.embed.s([f"text {index}"] * index) for index in range(1, 5)]
    assert chord(header)(app.shapes.s()).get(timeout=TIMEOUT_S) == [[index, DIM] for index in range(1, 5)]
    after = chain(app.split.s("One. Two"), group(tasks.embed.s(), tasks.embed.s(dimensions=8)), app.shapes.s())
    assert after.delay().get(timeout=TIMEOUT_S) == [[2, DIM], [2, 8]]


def test_a_chord_of_the_application_ends_in_one_of_ours(app: Any) -> None:
    vectors = chord([app.note.si("one"), app.note.si("two")])(tasks.embed.si(["three"])).get(timeout=TIMEOUT_S)
    assert vectors.dense.shape == (1, DIM)


def test_a_chain_leads_from_a_map_of_ours_to_the_application(app: Any) -> None:
    steps = chain(tasks.embed.starmap([(["a"],), (["b", "c"],)]), app.shapes.s())
    assert steps.delay().get(timeout=TIMEOUT_S) == [[1, DIM], [2, DIM]]


def test_a_chain_leads_from_ours_to_a_map_of_the_application(app: Any) -> None:
    steps = chain(tasks.embed.si(["a"]), app.note.starmap([("b",), ("c", "d")]))
    assert steps.delay().get(timeout=TIMEOUT_S) == [["b"], ["c", "d"]]


def test_the_application_reads_our_results_whatever_its_serializer(app: Any) -> None:
    job = tasks.embed.delay(["one", "two"])
    assert np.shape(app.app.AsyncResult(job.id).get(timeout=TIMEOUT_S)) == (2, DIM)


def test_a_callback_is_called_on_the_applications_worker(app: Any) -> None:
    called = app.shape.s().set(task_id=f"called-{app.QUEUE}")
    tasks.embed.apply_async((["one", "two"],), link=called)
    assert app.app.AsyncResult(f"called-{app.QUEUE}").get(timeout=TIMEOUT_S) == [2, DIM]


def test_the_application_sends_our_jobs_by_name_and_by_priority(app: Any) -> None:
    job = app.app.send_task("tasks.embed", args=[["a", "b"]], priority=9)
    assert tasks.app.AsyncResult(job.id).get(timeout=TIMEOUT_S).dense.shape == (2, DIM)


def test_jobs_of_both_are_mixed_in_a_group_where_the_serializer_is_shared(worker: dict[str, str], app: Any) -> None:
    if app is json_application:
        pytest.skip("Celery reads all results of a group by one serializer")
    mixed = group(tasks.embed.s(["a"]), application.note.s("b"))
    vectors, note = mixed.delay().get(timeout=TIMEOUT_S)
    assert vectors.dense.shape == (1, DIM)
    assert note == ["b"]
    np.testing.assert_array_equal(vectors.dense, tasks.embed.delay(["a"]).get(timeout=TIMEOUT_S).dense)
