"""Connects a Celery application of yours with embedq, so that tasks of both meet in chains, groups and chords.

app = Celery("mine", broker="redis://…")
connect(app)

chain(tasks.embed.s(["a text"]), store.s()).delay()   # `store` is a task of `app`, on workers of its own
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from celery import Celery, Signature, Task, current_task
from celery.signals import before_task_publish

from embedq.core.errors import InvalidSettings
from embedq.tasks.addresses import address_of, key_prefix
from embedq.tasks.application import app as ours
from embedq.tasks.application import config
from embedq.tasks.calls import embed, rerank
from embedq.tasks.stock_workers import is_ours

#: Our serializer, which carries arrays and results.
_SERIALIZER = "embedq"

#: Transport options by which a queue's name becomes the keys of its lists; jobs of ours must go to ours.
_OF_LISTS = ("sep", "priority_steps", "global_keyprefix")

#: Transport options that name the server at its Sentinels. An application gets no others of our connections.
_OF_SENTINELS = ("master_name", "sentinel_kwargs")

#: Result backends that read our workers' results beside the application's own, whatever its serializer.
_BACKENDS = {
    "redis": "embedq.tasks.connected_results:ConnectedBackend",
    "rediss": "embedq.tasks.connected_results:ConnectedBackend",
    "sentinel": "embedq.tasks.connected_results:ConnectedSentinelBackend",
}

#: Celery's tasks that call another for each item: they go where that one goes.
_MAPS = ("celery.map", "celery.starmap")

#: Arguments of Celery's chain, group and chord that hold signatures.
_PARTS = ("tasks", "header", "body")


def connect(app: Celery, *, share_serializer: bool = False) -> None:
    """Let tasks of `app` be combined with embedq's. What the application has set itself stays as it is.

    Call it where the application is made, before or after its configuration: one that was not read yet is completed
    when it is. Calling it again changes nothing, or completes what was set since.

        broker_url, result_backend   ours, where the application names no broker; a broker of its own must be our database
        task_routes                  ours before the application's: `tasks.embed` and `tasks.rerank` go to our queues
        accept_content,              our serializer beside the application's, so that its tasks receive `Embeddings` and
        result_accept_content          `Ranking` from our workers
        broker_transport_options     `sep` and `priority_steps`, which name the lists of a queue; records of jobs in flight of
                                       its own, so that neither's workers give back the other's jobs; how Sentinels are asked

    A task of the application that follows one of ours, as the next of a chain, a chord's body or a callback, is sent by
    our worker: its queue is written into the signature when the job is sent, as the application routes it.

    Where the application computes its tasks in the process that sends them (`task_always_eager`), our jobs are computed there
    as well.

    With `share_serializer`, the application's messages and results travel in our serializer too (`core.codec`).
    Its tasks can then return and pass on `Embeddings`, and groups and chords may mix jobs of both: Celery reads all
    results of a group by one serializer. Otherwise its own, JSON by default, is kept.

    InvalidSettings, at once or when the configuration is read: the application's broker is another server or database
    than ours, its default queue is one of ours, or its transport options name other lists. For the main thread.
    """
    ours.connected[app] = None
    if app.configured:
        _complete(app, share_serializer)
        return

    def when_read() -> dict[str, Any]:
        _complete(app, share_serializer)
        return {}

    app.add_defaults(when_read)


def route(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **rest: Any) -> dict[str, str] | None:
    """`celeryconfig.route`, but not for a task of the application that happens to have the name of ours."""
    if isinstance(task, Task) and task not in (embed, rerank) and task.name not in _MAPS:
        return None
    return config.route(name, args, kwargs, options, task, **rest)


def _complete(app: Celery, share_serializer: bool) -> None:
    conf = app.conf
    _check_default_queue(app)
    changes: dict[str, Any] = {}
    if not conf.broker_url:
        changes = {"broker_url": ours.conf.broker_url, "broker_use_ssl": ours.conf.broker_use_ssl}
        if not conf.result_backend:
            changes["result_backend"] = ours.conf.result_backend
    else:
        _check_broker(app)
    changes["broker_transport_options"] = _transport_options(app)
    changes["task_routes"] = _routes(conf.task_routes)
    changes["accept_content"] = _with_ours(conf.accept_content)
    if conf.result_accept_content:  # else it is what messages may be
        changes["result_accept_content"] = _with_ours(conf.result_accept_content)
    if share_serializer:
        changes |= {"task_serializer": _SERIALIZER, "result_serializer": _SERIALIZER}
    conf.update(changes)
    app.loader.override_backends = _BACKENDS | (app.loader.override_backends or {})


def _check_default_queue(app: Celery) -> None:
    queue = app.conf.task_default_queue
    if is_ours(queue):
        raise InvalidSettings(
            f"task_default_queue of the application {app.main!r:.40} is {queue!r:.60}, a queue of embedq's own, whose workers "
            "know none of the application's tasks; name another one"
        )


def _check_broker(app: Celery) -> None:
    """A message for our queue that is sent to another server waits there for ever."""
    own = address_of(ours.conf.broker_url)
    for url in (app.conf.broker_write_url, app.conf.broker_read_url):
        address = address_of(url)
        if address != own:
            raise InvalidSettings(
                f"the broker of the application {app.main!r:.40} is {address or 'no Redis or Valkey server'}, embedq's is "
                f"{own}; they must be one, by the same name (EMBEDQ_REDIS_URL or broker_url)"
            )


def _transport_options(app: Celery) -> dict[str, Any]:
    given = dict(app.conf.broker_transport_options)
    options = ours.conf.broker_transport_options
    lists = {name: options[name] for name in _OF_LISTS if name in options} | {"global_keyprefix": key_prefix(ours)}
    for name, value in lists.items():
        if name in given and (given[name] or "") != value:
            raise InvalidSettings(
                f"broker_transport_options of the application {app.main!r:.40} has {name} {given[name]!r:.40}, embedq has "
                f"{value!r:.40}; a queue's lists would have other names, and no worker would find the jobs"
            )
    if not lists["global_keyprefix"]:
        del lists["global_keyprefix"]
    # A stock worker gives back whatever is in flight for longer than its own timeout, also what others hold.
    in_flight = {
        f"{name}_key": f"{name}:{app.conf.task_default_queue}" for name in ("unacked", "unacked_index", "unacked_mutex")
    }
    sentinels = {name: options[name] for name in _OF_SENTINELS if name in options}
    return {**in_flight, **sentinels, **lists, **given}


def _routes(given: Any) -> tuple[Any, ...]:
    """Ours first: a pattern of the application such as `tasks.*` would match our names."""
    if given is None:
        return (route,)
    routes = tuple(given) if isinstance(given, list | tuple) else (given,)
    return routes if route in routes else (route, *routes)


def _with_ours(accepted: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*accepted, _SERIALIZER]))


def _name_queues(sender: str, body: Any = None, **_: Any) -> None:
    """Write into each signature that follows a job of ours how it is sent, which our worker knows of no other application.

    Called with each message of ours and of Celery's maps before it is sent.
    """
    if not ours.connected or not isinstance(body, tuple):
        return
    mapped = _mapped(sender, body[1])
    if sender in _MAPS and not (mapped and mapped.get("task") in (embed.name, rerank.name)):
        return
    for signature in sent_by_us(body[2]):
        if _task_of(signature):
            # Else it would follow that of this message.
            signature.setdefault("options", {}).setdefault("serializer", _SERIALIZER)
    for signature in all_signatures(list(body[2].values())):
        options = signature.setdefault("options", {})
        if {"queue", "exchange", "routing_key"}.isdisjoint(options) and (task := _task_of(signature)):
            given = {"queue": task.queue} if getattr(task, "queue", None) else {}
            call = (task.name, signature.get("args") or (), signature.get("kwargs") or {})
            options["queue"] = str(task.app.amqp.router.route(given, *call, task)["queue"].name)


for _name in (embed.name, rerank.name, *_MAPS):
    before_task_publish.connect(_name_queues, sender=_name)


def _mapped(name: str, kwargs: Any) -> Mapping[str, Any] | None:
    """The signature that one of Celery's maps calls for each item; None for any other task."""
    mapped = kwargs.get("task") if name in _MAPS and isinstance(kwargs, Mapping) else None
    return mapped if isinstance(mapped, Mapping) else None


def all_signatures(parts: Any) -> Iterator[Any]:
    """Every signature within a list of them, of lists, or one: also those they lead to."""
    if isinstance(parts, list | tuple):
        for part in parts:
            yield from all_signatures(part)
    elif isinstance(parts, Mapping) and "task" in parts:
        yield parts
        options, kwargs = _map(parts.get("options")), _map(parts.get("kwargs"))
        yield from all_signatures([options.get(name) for name in ("link", "link_error", "chord", "chain")])
        if parts.get("subtask_type"):
            yield from all_signatures([kwargs.get(name) for name in _PARTS])


def sent_by_us(follows: Mapping[str, Any]) -> Iterator[Any]:
    """The signatures of other applications' tasks that our workers send, of all that follows a job.

    What comes after such a task is sent by whoever runs it.
    """
    for parts in (follows.get("callbacks"), follows.get("errbacks"), [follows.get("chord")]):
        for part in parts or ():
            yield from _first_of_others([part])
    yield from _first_of_others(reversed(follows.get("chain") or ()))  # Celery has the next one last


def _first_of_others(line: Iterable[Any]) -> Iterator[Any]:
    """The first tasks of other applications among signatures that run one after another."""
    for signature in line:
        if not isinstance(signature, Mapping) or not isinstance(signature.get("task"), str):
            return
        kwargs, options = _map(signature.get("kwargs")), _map(signature.get("options"))
        if kind := signature.get("subtask_type"):
            held = [one if isinstance(one, list | tuple) else [one] for name in _PARTS if (one := kwargs.get(name))]
            for part in held if kind == "chain" else [[one] for parts in held for one in parts]:
                yield from _first_of_others(part)
            return
        if signature["task"] not in (embed.name, rerank.name) and not signature["task"].startswith("celery."):
            yield signature
            return
        for linked in (options.get("link"), options.get("link_error")):
            for one in linked if isinstance(linked, list | tuple) else ():
                yield from _first_of_others([one])


def _map(value: Any) -> Mapping[str, Any]:
    """The map that was given; an empty one for anything else, which a message may hold."""
    return value if isinstance(value, Mapping) else {}


def _task_of(signature: Mapping[str, Any]) -> Any:
    """The task of a connected application that a signature means; None for one of ours, of Celery's, or of nobody.

    Celery copies each task into every other application of the process: the original's is the one that knows its queue.
    """
    name = signature["task"]
    if (mapped := _mapped(name, signature.get("kwargs"))) and "task" in mapped:
        return _task_of(mapped)
    if name.startswith("celery.") or name in (embed.name, rerank.name):
        return None
    if isinstance(signature, Signature) and (original := _made_from(signature)):
        return original
    # This worker's own first.
    apps = sorted(ours.connected, key=lambda app: not current_task or current_task.app is not app)
    return next((app.tasks[name] for app in apps if name in app.tasks), None)


def _made_from(signature: Signature) -> Any:
    """The task from which a program made a signature, as `store.s()`; None for one by name or out of a message."""
    try:
        task = signature.type
    except KeyError:
        return None
    return task if task.app in ours.connected else None
