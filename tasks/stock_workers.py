"""No worker without an engine takes embedq's jobs: it would fail each of them for good.

Three ways lead to a stock Celery worker on our queues from a process that imports `embedq.tasks`, and each is closed:

    our own application      `celery -A embedq.tasks worker`, `celery multi`, `app.worker_main`, `app.Worker`: one embedq
                             worker runs instead (`EngineWorkerStart`), or the process ends with code 1 and one line
    an application's worker  that is to consume one of our queues, by -Q, `task_queues` or `task_default_queue`:
                             ends with code 1 and one line before it connects
    the same, at run time    by remote control (`add_consumer`) or by code of its own: the queue is left alone, with an
                             error in the log and as the answer

Such workers on queues of their own are not touched. A program that consumes `embed` and never imports us, or only once its
worker runs, cannot be seen from here, nor can `celery migrate`: the server's access rules keep them out (`deploy/acl`).
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from celery.signals import worker_init
from celery.utils.nodenames import default_nodename, node_format
from kombu.utils.compat import detect_environment
from kombu.utils.imports import symbol_by_name

from embedq.core.errors import EmbedqError
from embedq.tasks.addresses import address_of, key_prefix

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)

#: The command to start workers by, instead of a stock one.
COMMAND = "embedq workers --model alias=path"

#: By name and not by import: a producer has none of what a worker needs.
_MAIN, _READ_SETTINGS = "embedq.workers.worker:main", "embedq.core.settings:read_settings"

#: Queues of `celeryconfig.queue_name`, and the names of their lists by priority (`embed:3`).
_OURS = re.compile(r"(embed|rerank)([.:].*)?|embed_parts\..*", re.DOTALL)

#: Celery's options that an embedq worker keeps to, or that hold for it anyway.
_KEPT = {"hostname", "loglevel", "logfile", "pidfile", "task_events", "without_gossip", "without_mingle"}

#: Options of the process around the worker, done with by Celery's command line; and those of mere looks.
_DONE = {"detach", "uid", "gid", "umask", "workdir", "executable", "no_color", "quiet", "app"}

#: Options without which the user would get something else than asked for, and what to do.
_REFUSED = {
    "pool": "because an embedq worker has a pool of its own",
    "pool_cls": "because an embedq worker has a pool of its own",
    "autoscale": "because whole workers are added: `embedq workers --min A --max B`",
    "include": "because an embedq worker runs embedq's tasks alone; start another worker for yours",
    "exclude_queues": "because an embedq worker takes all queues of its models",
    "purge": "because a worker deletes no jobs; `celery -A embedq.tasks purge` does",
    "beat": "because an embedq worker sends no periodic tasks; start `celery beat` beside it",
    "schedule_filename": "because an embedq worker sends no periodic tasks; start `celery beat` beside it",
    "scheduler": "because an embedq worker sends no periodic tasks; start `celery beat` beside it",
}


def is_ours(queue: str) -> bool:
    """Returns True if a queue, or the list of one of its priorities, is embedq's."""
    return _OURS.fullmatch(queue) is not None


def protect(app: Celery) -> None:
    """Keep stock workers in this process off the queues of `app`, whichever application they belong to."""

    def check(sender: Any, **_: Any) -> None:
        if not getattr(sender, "has_engine", False) and may_share_queues(sender.app, app):
            _refuse_our_queues(sender.app)
            _leave_our_queues_alone(sender.app)

    worker_init.connect(check, weak=False, dispatch_uid=f"{__name__}.protect")


class EngineWorkerStart:
    """Stands in for Celery's worker, in command lines and programs that start one of our application: runs one of ours.

    Options of `celery worker` are kept to where an embedq worker has their like, named in a warning where they have no
    effect, and refused where another worker would result than asked for. SystemExit 1, after a line that says why,
    where none can run.
    """

    app: Celery
    exitcode: int | None = None

    def __init__(self, **options: Any) -> None:
        given = _given(options)
        self._name = _asked_name(given)
        _write_to(given.get("logfile"), self._name)
        if (environment := detect_environment()) != "default":
            end(f"an embedq worker runs in threads, and {environment} has replaced them in this process")
        _check(given)
        self._main = _worker_main()
        self._options = given

    def start(self) -> None:
        """Run one embedq worker until it is told to stop; `exitcode` is its exit code."""
        os.environ.update(_environment(self._options, self._name))
        if pidfile := self._options.get("pidfile"):
            from celery.platforms import create_pidlock

            create_pidlock(node_format(pidfile, self._name or default_nodename(None)))
        self.exitcode = self._main()


def end(reason: str) -> NoReturn:
    """End the process with code 1 after one line. SystemExit, because Celery's signals swallow every other error."""
    print(f"no worker is started: {reason}. Start workers with `{COMMAND}`", file=sys.stderr, flush=True)
    raise SystemExit(1)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that somebody gave, without those that Celery's command line filled in."""
    from click import get_current_context
    from click.core import ParameterSource

    set_options = {name: value for name, value in options.items() if value not in (None, False, ())}
    context = get_current_context(silent=True)
    if context is None or context.command.name != "worker":
        return set_options
    by_user = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return {name: value for name, value in set_options.items() if context.get_parameter_source(name) in by_user}


def _asked_name(given: Mapping[str, Any]) -> str:
    """The worker's name as `-n` has it, "" where nobody named it."""
    name = default_nodename(given.get("hostname"))
    return "" if name == default_nodename(None) else name


def _write_to(logfile: Any, name: str) -> None:
    """Append what this process prints and logs to a file, as `celery multi` has it of a worker without a terminal."""
    if isinstance(logfile, str):
        file = os.open(
            node_format(logfile, name or default_nodename(None)), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640
        )
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)


def _check(given: Mapping[str, Any]) -> None:
    """End for an option that must not be passed over; warn of each other that has no effect."""
    for name, value in given.items():
        if name in _REFUSED and not _is_prefork(name, value):
            end(f"{_option(name)} cannot be kept to, {_REFUSED[name]}")
        if name == "queues":
            _check_queues(value)
        if name not in _KEPT | _DONE | _REFUSED.keys():
            print(f"{_option(name)} has no effect on an embedq worker", file=sys.stderr, flush=True)


def _is_prefork(name: str, value: Any) -> bool:
    """Returns True for Celery's default pool, which whoever names it need not have meant."""
    text = value if isinstance(value, str) else f"{value.__module__}" if isinstance(value, type) else ""
    return name.startswith("pool") and text.rpartition(".")[2] in ("prefork", "processes")


def _check_queues(asked: Any) -> None:
    names = asked.split(",") if isinstance(asked, str) else [getattr(one, "name", one) for one in asked]
    foreign = [name for name in names if not is_ours(name)]
    if foreign:
        end(f"-Q names {foreign[0]!r:.60}, which is no queue of embedq; another worker must take it")


def _option(name: str) -> str:
    short = {"queues": "-Q", "concurrency": "-c", "pool": "-P", "include": "-I", "beat": "-B", "exclude_queues": "-X"}
    return short.get(name) or f"--{name.replace('_', '-')}"


def _worker_main() -> Callable[[], int]:
    """Returns the function that runs a worker. Ends the process if its packages are missing or no model is configured."""
    try:
        main, read_settings = symbol_by_name(_MAIN), symbol_by_name(_READ_SETTINGS)
    except ModuleNotFoundError as error:
        end(f"a worker needs the extra embedq[worker]: {error}")
    try:
        models = read_settings().models
    except EmbedqError as error:
        end(str(error))
    if not models:
        end("no model is configured in EMBEDQ_MODELS, nor under [models.alias] in embedq.toml")
    return main  # type: ignore[no-any-return]


def _environment(given: Mapping[str, Any], name: str) -> dict[str, str]:
    """Returns the environment variables by which the worker reads the options given."""
    level = given.get("loglevel")
    found = {"EMBEDQ_LOG_LEVEL": level if isinstance(level, str) else logging.getLevelName(level)} if level else {}
    return found | ({"EMBEDQ_WORKER_NAME": name} if name else {})


def may_share_queues(app: Celery, ours: Celery) -> bool:
    """Returns False if no queue of one can be a queue of the other's, and True if one may be.

    A server has many names, so that different hosts prove nothing; another kind of broker, another number of the
    database or another prefix of the keys do.
    """
    if app is ours:
        return True
    address, own = address_of(app.conf.broker_read_url), address_of(ours.conf.broker_url)
    if address is None or own is None:
        return False
    return address.database == own.database and key_prefix(app) == key_prefix(ours)


def _refuse_our_queues(app: Celery) -> None:
    taken = [queue.name for queue in app.amqp.queues.consume_from.values() if is_ours(queue.name)]
    if taken:
        end(
            f"it would take jobs from embedq's queue {taken[0]!r:.60} and fail them, because it has no engine; leave the "
            "queue out of -Q, task_queues and task_default_queue"
        )


def _leave_our_queues_alone(app: Celery) -> None:
    """Keep this worker off our queues also if it is told later to consume from one."""
    from celery.worker.control import Panel, nok

    class OtherQueues(app.amqp.Consumer):
        """The application's consumer, of all queues but ours."""

        def consume(self, no_ack: bool | None = None) -> None:
            for name in [queue.name for queue in self.queues if is_ours(queue.name)]:
                self.cancel_by_queue(name)
                log.error("this worker has no engine and leaves embedq's queue alone: %s", name, extra={"queue": name})
            super().consume(no_ack)

    app.amqp.Consumer = OtherQueues
    stock = Panel.data["add_consumer"]
    if getattr(stock, "leaves_our_queues_alone", False):
        return

    def add_consumer(state: Any, queue: str, *args: Any, **options: Any) -> Any:
        if is_ours(queue):
            return nok(f"{queue} is a queue of embedq, and this worker has no engine; start workers with `{COMMAND}`")
        return stock(state, queue, *args, **options)

    add_consumer.leaves_our_queues_alone = True  # type: ignore[attr-defined]
    Panel.data["add_consumer"] = add_consumer
