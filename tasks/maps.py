"""`map`, `starmap` and `chunks` of our tasks: a job whose items become rows of one call of the engine.

    tasks.embed.chunks([(texts,) for texts in lists], 10)()     # jobs of ten lists each, as Celery sends them
    tasks.rerank.starmap([(query, passages), ...]).delay()      # one job; its result is a list, an item's result each

Celery runs the items of such a job one after another in the process that takes it. Here they are checked where the job
is sent, summarised as any job is, and computed together. Other tasks are mapped as Celery does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import Celery, Task, signature

from embedq.core.errors import InvalidInput, JobTooLarge
from embedq.tasks.application import app, config
from embedq.tasks.engine_task import EngineTask, current_answer, sending_of
from embedq.tasks.queue_cap import waiting_for_room
from embedq.tasks.sending import checked_sending

if TYPE_CHECKING:
    from embedq.core.batching.job import Call
    from embedq.core.engine import Engine

#: The arguments of one item's call.
Item = tuple[tuple[Any, ...], dict[str, Any]]


class MapTask(EngineTask):
    """`celery.map` and `celery.starmap`."""

    abstract = True
    #: Makes an item of `it` the positional arguments of a call. Set by `task`.
    arguments_of: Callable[[Any], tuple[Any, ...]]

    def apply_async(self, args: Any = None, kwargs: Any = None, task_id: Any = None, *rest: Any, **sending: Any) -> Any:
        """Check the items and how the job is sent, then send it. ProducerError, before anything is sent, if one is wrong."""
        app.follow_eager()
        mapped: Any = (kwargs or {}).get("task")
        sending = checked_sending(sending)
        task_id = checked_sending({"task_id": task_id})["task_id"]
        if isinstance(task := self.mapped(mapped), EngineTask):
            items = self.items(mapped, (kwargs or {}).get("it"))
            num_bytes = sum(task.checked(*item).num_bytes for item in items)
            texts = check_total(task, items, num_bytes)
            task.check_model((mapped.get("kwargs") or {}).get("model"))
            sending = sending_of(task.summary_of(texts), "{}", num_bytes) | sending
        block_s = sending.pop("block_s", None)
        return waiting_for_room(partial(Task.apply_async, self, args, kwargs, task_id, *rest, **sending), block_s)

    def mapped(self, given: Any) -> Any:
        """The task that a signature means; None if this process does not know it."""
        name = given.get("task") if isinstance(given, Mapping) else None
        return self.app.tasks.get(name) if isinstance(name, str) else None

    def items(self, mapped: Mapping[str, Any], it: Any) -> list[Item]:
        """The calls that the items mean. InvalidInput for items that mean none."""
        kwargs = mapped.get("kwargs") or {}
        if not isinstance(it, list | tuple) or not isinstance(kwargs, Mapping):
            raise InvalidInput(f"the items of a {self.name} must be a list; given {type(it).__name__}")
        return [(self._arguments(one), dict(kwargs)) for one in it]

    def is_engines(self, kwargs: Any) -> bool:
        """Returns True if the engine computes a job with these arguments."""
        return isinstance(kwargs, Mapping) and isinstance(self.mapped(kwargs.get("task")), EngineTask)

    def open_call(self, engine: Engine, args: Any, kwargs: dict[str, Any]) -> Call:
        """Builds one call of the engine from all items of a message, each checked as it would be alone."""
        mapped = kwargs["task"]
        task, items = self.mapped(mapped), self.items(mapped, kwargs.get("it"))
        built = [task.open_call(engine, *item) for item in items]
        check_total(task, items, sum(task.size_of(*item) for item in items))
        return engine.calls.together(built, task.open_call(engine, *task.nothing(mapped.get("kwargs") or {})))

    def fingerprint(self, args: Any, kwargs: dict[str, Any]) -> str:
        """Empty: such a job's id is chosen by Celery."""
        return ""

    def compute(self, given: Any, it: Any) -> list[Any]:
        """The engine's answers where it has computed them; else each item's result, one after another."""
        if answer := current_answer():
            return list(answer.result())
        mapped = signature(given, app=self.app)
        return [mapped.type(*args, **kwargs) for args, kwargs in self.items(mapped, it)]

    def _arguments(self, item: Any) -> tuple[Any, ...]:
        try:
            return type(self).arguments_of(item)
        except TypeError:
            raise InvalidInput(
                f"an item of a {self.name} must be a list of arguments; given {type(item).__name__}"
            ) from None


def check_total(task: EngineTask, items: list[Item], num_bytes: int) -> list[str]:
    """All texts of the items. JobTooLarge if together they are more than one job may hold."""
    max_texts, max_bytes = config.wire["max_texts_per_job"], config.wire["max_bytes_per_job"]
    texts = [text for item in items for text in task.texts_of(*item)]
    if len(texts) > max_texts or num_bytes > max_bytes:
        raise JobTooLarge(
            f"a job may hold {max_texts:,} texts and {max_bytes:,} bytes; the {len(items):,} items of this one hold "
            f"{len(texts):,} texts and {num_bytes:,} bytes. Use smaller chunks"
        )
    return texts


@app.on_after_finalize.connect
def _replace(sender: Celery, **_: Any) -> None:
    """Put our `celery.map` and `celery.starmap` in the place of Celery's, in our application alone."""
    for name, arguments_of in (("celery.map", _only), ("celery.starmap", tuple)):
        sender.tasks.pop(name, None)
        options = {"bind": True, "shared": False, "lazy": False, "arguments_of": staticmethod(arguments_of)}
        sender.task(base=MapTask, name=name, **options)(_run)


def _run(self: MapTask, task: Any, it: Any) -> list[Any]:
    """The results of `task` for the items of `it`."""
    return self.compute(task, it)


def _only(item: Any) -> tuple[Any, ...]:
    return (item,)
