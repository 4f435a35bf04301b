"""What the private names of Celery, kombu and redis-py mean to us, tried on real objects against a real server.

Each test runs what Celery or kombu does in a worker and looks at what comes of it. One that fails after an upgrade says
which wrapper in `workers/celery_private.py` or `tasks/celery_private.py` must be written anew.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import Empty
from typing import Any

import kombu
import kombu.transport
import pytest
import redis
from celery import Celery
from kombu.transport import redis as stock

from embedq.workers import celery_private as private
from tests.consuming import OPTIONS, STOCK, Consuming, in_flight, send
from tests.layout import FILES, ROOT, module_name, parsed
from tests.running import Running
from tests.traced_jobs import CALLS, blob, run


class Noting(private.ChannelBase):
    """A channel that notes which of its methods kombu calls, and does what kombu would."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.called: list[str] = []
        super().__init__(*args, **options)

    def ask_for_jobs(self) -> None:
        self.called.append("ask")
        stock.Channel._brpop_start(self)

    def read_jobs(self) -> bool:
        self.called.append("read")
        return bool(stock.Channel._brpop_read(self))

    def publish_broadcast(
        self, publish: Callable[..., None], exchange: str, message: dict[str, Any], routing_key: str, **options: Any
    ) -> None:
        self.called.append(f"broadcast {exchange}")
        publish(exchange, message, routing_key, **options)

    def read_broadcast(self, read: Callable[[Any], Any], subscription: Any) -> Any:
        self.called.append("heard")
        return read(subscription)

    def connection_options(self, options: dict[str, Any]) -> dict[str, Any]:
        self.called.append("options")
        return options | {"protocol": 3}

    def reused_client(self, make: Callable[[], Any]) -> Any:
        self.called.append("client")
        return make()


class NotingTransport(stock.Transport):
    Channel = Noting


def noting(url: str, *queues: str) -> Consuming:
    """A consumer on a channel that notes."""
    return Consuming(url, list(queues), NotingTransport)  # type: ignore[arg-type]


def test_a_loop_asks_while_nothing_is_awaited_and_reads_when_an_answer_comes(url: str, client: redis.Redis) -> None:
    send(url, "a", 1)
    with noting(url, "a") as worker:
        channel = worker.channel
        worker.run_until(lambda: worker.got)
        calls = [call for call in channel.called if call in ("ask", "read")]
        assert calls[:2] == ["ask", "read"]
        worker.run_until(lambda: channel.is_awaiting)
        channel.called.clear()
        worker.hub.call_soon(lambda: None)
        worker.turn()
        assert "ask" not in channel.called, "a second question while an answer is awaited"


def test_a_channel_that_says_it_awaits_is_not_asked_to_ask_until_it_has_its_answer(
    url: str, client: redis.Redis
) -> None:
    with noting(url, "a") as worker:
        channel, asked = worker.channel, []
        channel.ask_for_jobs = lambda: asked.append(channel.is_awaiting)
        channel.brpop_timeout = 0  # nothing is overdue
        worker.hub.call_soon(lambda: None)
        worker.turn()
        worker.hub.call_soon(lambda: None)
        worker.turn()
        assert asked == [False, False]
        channel.awaits(channel.client.connection)
        worker.hub.call_soon(lambda: None)
        worker.turn()
        assert asked == [False, False]
        channel.has_answer()
        worker.hub.call_soon(lambda: None)
        worker.turn()
        assert asked == [False, False, False]


def test_an_overdue_answer_ends_the_connection_it_is_awaited_on(url: str, client: redis.Redis) -> None:
    with noting(url, "a") as worker:
        channel = worker.channel
        channel.ask_for_jobs = lambda: None
        worker.hub.call_soon(lambda: None)
        worker.turn()
        connection = channel.client.connection
        channel.awaits(connection)
        channel.health_check_interval, channel.brpop_timeout = 1e-9, 1e-9
        assert private.socket_of(connection) is not None
        worker.connection.transport.cycle.maybe_check_brpop_health()
        assert private.socket_of(connection) is None
        assert not channel.is_awaiting


def test_the_poller_watches_channels_and_reads_what_is_readable(url: str, client: redis.Redis) -> None:
    class Poller(private.PollerBase):
        pass

    with kombu.Connection(url, transport=NotingTransport, transport_options=OPTIONS) as connection:
        poller = connection.transport.cycle = Poller()
        channel = connection.channel()
        assert list(poller.channels) == [channel]
        got: list[Any] = []
        queue = kombu.Queue("a", routing_key="a")
        kombu.Consumer(channel, [queue], on_message=got.append, auto_declare=False).consume()
        poller.watch_queues(channel)
        assert channel.called[-1] == "ask"
        send(url, "a", 1)
        (fileno,) = poller.fds
        poller.poller.poll(5)
        poller.read(fileno)
        assert [message.payload for message in got] == [1]
        poller.read(fileno + 1000)  # not watched: nothing happens


def test_options_of_connections_and_the_client_that_publishes_come_from_the_channel(
    url: str, client: redis.Redis
) -> None:
    with kombu.Connection(url, transport=NotingTransport, transport_options=OPTIONS) as connection:
        channel = connection.channel()
        assert channel.pool.connection_kwargs["protocol"] == 3
        assert "options" in channel.called
        channel.called.clear()
        kombu.Producer(channel).publish(1, routing_key="a", serializer="json")
        assert "client" in channel.called
        assert client.llen("a") == 1


def test_broadcasts_are_published_and_read_through_the_channel(url: str, client: redis.Redis) -> None:
    heard: list[Any] = []
    exchange = kombu.Exchange("all", type="fanout", durable=False)
    with kombu.Connection(url, transport=NotingTransport, transport_options=OPTIONS) as connection:
        channel = connection.channel()
        queue = kombu.Queue("mine", exchange, auto_delete=True)
        with kombu.Consumer(channel, [queue], callbacks=[lambda body, message: heard.append(body)], no_ack=True):
            with suppress(TimeoutError):
                connection.drain_events(timeout=0.1)  # subscribes
            sender = connection.channel()
            kombu.Producer(sender, exchange).publish("a word", serializer="json")
            while not heard:
                connection.drain_events(timeout=5)
        assert "broadcast all" in sender.called
        assert "heard" in channel.called
        assert len(sender.topics("all", "")) == 1
        assert sender.topics("all", "")[0].endswith("all")


def test_a_channel_knows_its_queues_in_turn_and_their_lists(url: str, client: redis.Redis) -> None:
    with Consuming(url, ["a", "b"], queue_order_strategy="round_robin") as worker:
        assert worker.channel.queues_in_order() == ["a", "b"]
        worker.channel.note_delivery("a")
        assert worker.channel.queues_in_order() == ["b", "a"]
    with kombu.Connection(url, transport_options=OPTIONS | {"global_keyprefix": "one:"}) as connection:
        channel = connection.channel()
        producer = kombu.Producer(channel)
        for priority in (0, 4, 9):
            producer.publish(1, routing_key="a", priority=priority, serializer="json")
        lists = {private.list_key(channel, "a", step) for step in (0, 3, 9)}
        assert lists == {key.decode() for key in client.keys("one:a*")}


def test_a_delivered_message_reaches_the_consumer_of_its_queue_alone(url: str, client: redis.Redis) -> None:
    send(url, "b", 7)
    payload = json.loads(client.lpop("b"))
    with Consuming(url, ["a", "b"]) as worker:
        worker.channel.qos.taken.add(payload["properties"]["delivery_tag"], worker.channel.qos)
        worker.channel.deliver(payload, "b")
        (message,) = worker.got
        assert message.payload == 7
        assert message.delivery_info["routing_key"] == "b"


def test_a_channel_that_closes_says_so(url: str, client: redis.Redis) -> None:
    worker = Consuming(url, ["a"])
    channel = worker.channel
    assert not channel.is_closing
    assert channel.opened_qos is channel.qos
    channel.begin_closing()
    assert channel.is_closing
    worker.close()
    assert channel.closed


def test_who_reads_without_a_loop_is_known_while_it_reads(url: str, client: redis.Redis) -> None:
    seen: list[bool] = []
    send(url, "a", 1)
    with kombu.Connection(url, transport=NotingTransport, transport_options=OPTIONS) as connection:
        channel = connection.channel()
        queue = kombu.Queue("a", routing_key="a")
        consumer = kombu.Consumer(
            channel, [queue], on_message=lambda message: seen.append(channel.is_read_by_caller), auto_declare=False
        )
        with consumer:
            assert not channel.is_read_by_caller
            while not seen:
                connection.drain_events(timeout=5)
        assert seen == [True]
        assert not channel.is_read_by_caller


class CountingQoS(private.QoSBase):
    pass


class CountingChannel(stock.Channel):
    QoS = CountingQoS


class CountingTransport(stock.Transport):
    Channel = CountingChannel


def test_what_is_held_here_is_not_recorded_on_the_server_and_settled_here_alone(url: str, client: redis.Redis) -> None:
    with kombu.Connection(url, transport=CountingTransport, transport_options=OPTIONS) as connection:
        channel = connection.channel()
        message = channel.Message(
            {"body": "1", "content-type": "application/json", "content-encoding": "utf-8", "headers": {},
             "properties": {"delivery_tag": "tag", "delivery_info": {"exchange": "", "routing_key": "a"}}},
            channel=channel,
        )  # fmt: skip
        qos = channel.qos
        qos.hold(message, "tag")
        assert list(qos.delivered) == ["tag"]
        assert in_flight(client) == 0
        assert not qos.settled
        qos.settle("tag")
        assert list(qos.settled) == ["tag"]
        assert not qos.can_consume() or qos.prefetch_count == 0
        assert client.keys("*") == []


def test_once_restoring_is_finished_kombu_takes_it_for_a_mistake_that_something_is_held(
    url: str, client: redis.Redis
) -> None:
    with kombu.Connection(url, transport=CountingTransport, transport_options=OPTIONS) as connection:
        qos = connection.channel().qos
        qos.hold(object(), "tag")
        qos.finish_restoring()
        with pytest.raises(AssertionError):
            qos.restore_unacked_once()
        qos.settle("tag")
        qos.restore_unacked_once()


_ENDING = """
import kombu, sys
from embedq.workers.celery_private import QoSBase
from kombu.transport import redis
class QoS(QoSBase):
    def restore_unacked_once(self, stderr=None):
        print("restored at exit", flush=True)
class Channel(redis.Channel):
    QoS = QoS
class Transport(redis.Transport):
    Channel = Channel
connection = kombu.Connection(sys.argv[1], transport=Transport)
qos = connection.channel().qos
if sys.argv[2] == "cancelled":
    qos.cancel_restoring_at_exit()
"""


@pytest.mark.parametrize(("how", "is_restored"), [("left", True), ("cancelled", False)])
def test_a_process_that_ends_restores_unless_that_was_cancelled(url: str, how: str, is_restored: bool) -> None:
    with Running([sys.executable, "-c", _ENDING, url, how]) as ending:
        assert ending.wait() == 0
    assert ("restored at exit" in ending.output) == is_restored


def test_a_prefetch_count_is_used_up_by_what_is_held_and_not_settled(url: str, client: redis.Redis) -> None:
    with kombu.Connection(url, transport=CountingTransport, transport_options=OPTIONS) as connection:
        qos = connection.channel().qos
        qos.prefetch_count = 1
        qos.hold(object(), "tag")
        assert not qos.can_consume()
        qos.settle("tag")
        assert qos.can_consume()


def test_a_body_is_read_through_the_message_once() -> None:
    read_: list[Any] = []

    class Message(private.MessageBase):
        def read_body(self, read: Callable[[], Any]) -> Any:
            read_.append(read())
            return read_[-1]

    with kombu.Connection("memory://") as connection:
        message = Message(
            {"body": "[1]", "content-type": "application/json", "content-encoding": "utf-8", "headers": {},
             "properties": {"delivery_tag": "tag", "delivery_info": {}}},
            channel=connection.channel(), accept={"application/json"},
        )  # fmt: skip
    assert message.payload == message.payload == [1]
    assert read_ == [[1]]


def message_of(app: Celery, **headers: Any) -> kombu.Message:
    """A job's message, as a consumer gets it."""
    content_type, encoding, body = kombu.serialization.dumps([["a"], {}, {"chain": None}], "json")
    return kombu.Message(
        body=body,
        headers={"task": "sink", "id": "the job", "argsrepr": "('a',)", "kwargsrepr": "{}"} | headers,
        content_type=content_type,
        content_encoding=encoding,
        accept={content_type},
        delivery_info={"exchange": "", "routing_key": "q"},
        properties={},
    )


def test_fields_of_a_request_are_what_its_task_sees(app: Celery) -> None:
    message = message_of(app)
    request = private.RequestBase(message, app=app, task=app.tasks["sink"])
    request.fields["retries"] = 7
    request.show_arguments_as("hidden", "hidden too")
    seen: list[Any] = []
    CALLS.append(lambda: seen.append((app.current_task.request.retries, app.current_task.request.argsrepr)))
    run(app, "call", 0, **{**request.fields, "id": "the job", "task": "call", "reply_to": None})
    assert seen == [(7, "hidden")]
    assert (request.argsrepr, request.info(safe=True)["args"]) == ("hidden", "hidden")
    assert request.fields["kwargsrepr"] == "hidden too"


def test_a_messages_context_names_its_job_and_what_follows_it(app: Celery) -> None:
    context = private.context_of(message_of(app, root_id="the root", group="the group"), app)
    assert (context.id, context.root_id, context.group) == ("the job", "the root", "the group")
    with pytest.raises(KeyError):
        private.context_of(kombu.Message(body=b"", headers={}, accept=None), app)


def test_a_job_is_known_while_it_runs_and_can_be_run_again(app: Celery) -> None:
    found: list[Any] = []
    assert private.running_job() is None
    CALLS.append(lambda: found.append(private.running_job()))
    run(app, "call", 0, job_id="the job")
    task, context = found[0]
    assert (task.name, context.id) == ("call", "the job")
    assert private.running_job() is None
    with private.running_again(task, context):
        assert private.running_job() == (task, context)
        job = app.send_task("sink", queue="elsewhere")
        sent = app.backend.client.lindex("elsewhere", 0)
    assert job.id.encode() in sent
    assert b'"parent_id": "the job"' in sent
    assert private.running_job() is None


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's own
def test_a_backend_makes_the_map_of_every_result_and_is_called_before_errbacks(app: Celery, own: Any) -> None:
    order: list[str] = []

    class Backend(private.StoringBackend):
        def result_map(self, make: Callable[[], Any], result: Any, state: str, traceback: Any, request: Any) -> Any:
            order.append(f"map {state}")
            return make() | {"extra": request.id if request else None}

        def before_errbacks(self) -> None:
            order.append("errbacks")

    backend = Backend(app=app, url=own.url)
    backend.store_result("one", 1, "SUCCESS")
    assert blob(own, "one")["extra"] is None
    assert blob(own, "one")["result"] == 1
    context = private.context_of(message_of(app), app)
    context.errbacks = [app.tasks["sink"].si()]
    backend.mark_as_failure("two", ValueError("wrong"), request=context)
    assert order == ["map SUCCESS", "map FAILURE", "errbacks"]
    backend.result_consumer.stop()
    backend.client.close()


def test_a_pools_statistics_are_what_inspection_shows() -> None:
    class Pool(private.PoolBase):
        def inspected(self) -> dict[str, Any]:
            return {"jobs": 3}

    assert Pool(limit=1).info == {"jobs": 3}


def test_buffered_events_are_published_by_the_dispatcher_and_from_its_buffer(app: Celery) -> None:
    published: list[Any] = []

    class Dispatcher(private.DispatcherBase):
        def publish_events(
            self, publish: Callable[..., Any], events: Any, producer: Any, *rest: Any, **options: Any
        ) -> Any:
            published.append(list(events))
            return publish(events, producer, *rest, **options)

    with app.connection_for_write() as connection:
        dispatcher = Dispatcher(connection, app=app, buffer_group={"task"}, on_send_buffered=lambda: None)
        dispatcher.send("task-received", uuid="one")
        assert [event["uuid"] for event in dispatcher.buffer_of("task")] == ["one"]
        dispatcher.buffer_of("task").append({"type": "task-sent", "uuid": "two"})
        dispatcher.flush()
        assert [[event["uuid"] for event in events] for events in published] == [["one", "two"]]
        assert not dispatcher.buffer_of("task")


def test_a_scheme_is_served_by_the_transport_that_was_named_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(kombu.transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu.transport, "_transport_cache", {})
    assert type(kombu.Connection("redis://127.0.0.1:1").transport) is stock.Transport
    private.use_transport("redis", NotingTransport)
    assert type(kombu.Connection("redis://127.0.0.1:1").transport) is NotingTransport
    private.use_transport("redis", CountingTransport)
    assert type(kombu.Connection("redis://127.0.0.1:1").transport) is CountingTransport


def test_an_invalidation_is_handled_and_read_in_place_of_an_answer(url: str, client: redis.Redis) -> None:
    marker, told = object(), []

    def handle(message: Any) -> object:
        told.append(message)
        return marker

    with redis.Redis.from_url(url, protocol=3) as other:
        connection = other.connection_pool.get_connection()
        assert private.socket_of(connection) is not None
        private.on_invalidation(connection, handle)
        connection.send_command("CLIENT", "TRACKING", "ON", "NOLOOP")
        connection.read_response()
        connection.send_command("EXISTS", "a")
        connection.read_response()
        client.lpush("a", 1)
        assert connection.read_response(push_request=True) is marker
        assert b"a" in told[0][1]
        connection.disconnect()
        assert private.socket_of(connection) is None


def test_a_stock_channel_and_ours_leave_no_answer_unread(url: str, client: redis.Redis) -> None:
    with noting(url, "a") as worker:
        worker.run_until(lambda: worker.channel.is_awaiting)
        with suppress(Empty):  # the question ends by itself after a second
            worker.channel.read_jobs()
        assert not worker.channel.is_awaiting
        worker.channel.renew_credentials()  # has nothing to send, and may be called now
    with Consuming(url, ["a"], STOCK) as stock_worker:
        stock_worker.turn()


#: The files that may use private names of others.
_OF_PRIVATE_NAMES = {"embedq.workers.celery_private", "embedq.tasks.celery_private"}

#: Names of the standard library that are documented in spite of their underscore.
_PUBLIC = {"_replace", "_exit"}


def test_no_other_file_uses_a_private_name_of_celery_kombu_or_redis() -> None:
    found = {
        f"{module_name(path)}: {name}"
        for path in FILES
        if module_name(path).startswith(("embedq.workers", "embedq.tasks"))
        and module_name(path) not in _OF_PRIVATE_NAMES
        for name in _private_names_of_others(path)
    }
    assert found == set()


def _private_names_of_others(path: Path) -> set[str]:
    """Names with an underscore that a file takes from objects or modules and that nothing of ours has."""
    tree = parsed(path)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return {name for name in used if name.startswith("_") and not name.startswith("__")} - _names_of_ours() - _PUBLIC


@cache
def _names_of_ours() -> set[str]:
    """Names that our functions, classes, variables and attributes have, outside the files of private names."""
    names: set[str] = set()
    for path in FILES:
        if module_name(path) in _OF_PRIVATE_NAMES or module_name(path).startswith("tests"):
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_files_with_private_names_exist() -> None:
    assert {module_name(path) for path in FILES} >= _OF_PRIVATE_NAMES, ROOT
