"""What application code imports.

    import tasks

    vectors = tasks.embed.delay(["a text", "another"]).get(timeout=30)       # Embeddings, (2, dim)
    ranking = tasks.rerank.delay("a question", ["a text", "another"]).get()  # Ranking
    jobs = tasks.embed_many([["a text"], ["another"]])                       # many jobs, few round trips
    vectors = await tasks.aget(jobs[0], timeout=30)                          # in asyncio

Arguments are checked here, at the call, and never reach the queue if they are wrong. Loads no
torch, transformers or tokenizers: a producer needs celery, redis, msgpack and numpy.

No module in this package may be named after a task or `app`: importing it would replace the task.
"""

from __future__ import annotations

import importlib.util
import inspect
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from celery import Celery, Task

from core.checks import EmbedOptions, RerankOptions, check_text, check_texts
from core.errors import InvalidInput, JobTooLarge, ProducerError, WorkerError
from core.results import Embeddings, Ranking
from tasks.models import Registry
from tasks.sending import Call, compression_for, send_many

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from celery.result import AsyncResult, ResultSet

    from core.engine import Engine
    from core.job import Call as EngineCall

__all__ = ["Embeddings", "Ranking", "aget", "app", "embed", "embed_many", "rerank", "rerank_many"]

#: Options shown in logs and Flower. The instruction is a text, so it is not among them.
_SHOWN = ("model", "input_type", "dimensions", "dtype", "outputs", "mode", "top_k", "max_length", "normalize")


def _load_config() -> ModuleType:
    """Our `celeryconfig.py` by its place: the application may have a module of that name itself."""
    path = Path(__file__).parent.parent / "celeryconfig.py"
    spec = importlib.util.spec_from_file_location("embedq_celeryconfig", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


config = _load_config()

# Not the current app: `shared_task`s of the application must stay with the application's own.
app = Celery("embedq", set_as_current=False)
# Without `wire`, which may hold the server's password: workers show Flower all they are configured with.
app.config_from_object({name: value for name, value in vars(config).items() if name != "wire"})


def key_prefix(of: Celery) -> str:
    """What an application writes before every key of its jobs: kombu's `global_keyprefix`, by default nothing."""
    return str(of.conf.broker_transport_options.get("global_keyprefix") or "")


class _Ready(threading.local):
    """The engine's answer to the job whose task this thread runs."""

    answer: Future[Any] | None = None


_ready = _Ready()


@contextmanager
def ready_answer(answer: Future[Any] | None) -> Iterator[None]:
    """Let `embed` and `rerank`, run on this thread, give this answer. For the worker's pool."""
    _ready.answer = answer
    try:
        yield
    finally:
        _ready.answer = None


class EngineTask(Task):
    """A job: checked and summarised where it is sent, computed by the engine where it is run."""

    abstract = True
    #: Expected errors: logged in one line without a traceback, because the producer gets them.
    throws = (ProducerError,)
    #: Failures of the worker, not of the call: the job is sent again, with pauses that double, because another
    #: worker or another moment may do. After that the failure is the answer.
    autoretry_for = (WorkerError,)
    max_retries = 3
    retry_backoff = 1
    retry_jitter = False  # Celery's would make some pauses nothing
    #: Set by the worker once its models are loaded. A producer has none.
    engine: ClassVar[Engine | None] = None

    #: Set by `task`: how to check one kind of call.
    options_class: ClassVar[type[EmbedOptions] | type[RerankOptions]]

    def apply_async(self, args: Any = None, kwargs: Any = None, *rest: Any, **sending: Any) -> AsyncResult:
        """Check the call, then send it. ProducerError, before anything is sent, if it is wrong."""
        call = self.checked(args or (), kwargs or {})
        self.check_model(call.kwargs.get("model"))
        return super().apply_async(args, kwargs, *rest, **{**call.sending, **sending})

    def check_model(self, alias: str | None) -> None:
        """UnknownModel or InvalidInput if no worker would take a job for this model, None for the default."""
        self.registry.check(self.name.removeprefix("tasks."), alias)

    def checked(self, args: Any, kwargs: dict[str, Any]) -> Call:
        """The call, with how it is summarised and sent. ProducerError if its arguments are wrong."""
        call, given = self._bind(args, kwargs)
        check_texts(self._texts_name, call[self._texts_name])
        num_bytes = self._check_size(call)
        self.options_class.checked(given)
        # AMQP's own property for when a message was sent: the exporter tells by it how long the next job has waited.
        sending = {"argsrepr": self._summary(call), "kwargsrepr": _shown(given), "timestamp": int(time.time())}
        if compression := compression_for(num_bytes):
            sending["compression"] = compression
        return Call(args, kwargs, num_bytes, sending)

    @cached_property
    def registry(self) -> Registry:
        """The announced models, on the connections of the result backend."""
        return Registry(self.backend.client, key_prefix(self.app))

    def running_engine(self) -> Engine:
        """The worker's engine. InvalidInput where there is none: the task was called, not sent."""
        if self.engine is None:
            raise InvalidInput(
                f"{self.name} runs in a worker; send it with .delay(...), or use core.load(...) in this process"
            )
        return self.engine

    def open_call(self, engine: Engine, args: Any, kwargs: dict[str, Any]) -> EngineCall:
        """What a message asks of the engine, checked. Any program can write to the queue."""
        call, given = self._bind(args, kwargs)
        build = engine.calls.embed if self.options_class is EmbedOptions else engine.calls.rerank
        built = build(**call, **given)  # checks all but the size
        self._check_size(call)
        return built

    def _bind(self, args: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The call's arguments and its options, by name. TypeError if texts are missing."""
        call = dict(self._signature.bind(*args, **kwargs).arguments)
        return call, call.pop("options", {})

    def _check_size(self, call: dict[str, Any]) -> int:
        return check_size(call[self._texts_name], call.get("query", ""))

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.run)  # at every job it took a third of what a worker spends on a small one

    @property
    def _texts_name(self) -> str:
        return "texts" if self.options_class is EmbedOptions else "passages"

    def _summary(self, call: dict[str, Any]) -> str:
        """What Flower and logs show of the texts: how many, how long, never what they say."""
        texts = call[self._texts_name]
        noun = self._texts_name if len(texts) != 1 else self._texts_name[:-1]
        return f"{len(texts):,} {noun}, {sum(map(len, texts)):,} characters"


def check_size(texts: list[str], query: str = "") -> int:
    """Bytes of one job's texts. JobTooLarge if it holds too much; says the limits, what was given, and what to do."""
    max_texts, max_bytes = config.wire["max_texts_per_job"], config.wire["max_bytes_per_job"]
    check_text("query", query)
    num_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in (query, *texts))
    if len(texts) > max_texts or num_bytes > max_bytes:
        raise JobTooLarge(
            f"a job may hold {max_texts:,} texts and {max_bytes:,} bytes; given {len(texts):,} texts and {num_bytes:,} bytes. "
            "Send several jobs, or raise EMBEDQ_MAX_TEXTS_PER_JOB or EMBEDQ_MAX_BYTES_PER_JOB for producers and workers."
        )
    return num_bytes


def _shown(call: dict[str, Any]) -> str:
    # "{}" and not "": Celery replaces an empty summary by the repr of the arguments themselves.
    return ", ".join(f"{name}={call[name]}" for name in _SHOWN if call.get(name) is not None) or "{}"


@app.task(base=EngineTask, bind=True, shared=False, name="tasks.embed", options_class=EmbedOptions)
def embed(self: EngineTask, texts: list[str], **options: Any) -> Embeddings:
    """Embed `texts`; `.dense` is (num_texts, dim) in their order. Options: `core.checks.EmbedOptions`."""
    if _ready.answer:
        return cast(Embeddings, _ready.answer.result())
    return self.running_engine().embed(texts, **options)


@app.task(base=EngineTask, bind=True, shared=False, name="tasks.rerank", options_class=RerankOptions)
def rerank(self: EngineTask, query: str, passages: list[str], **options: Any) -> Ranking:
    """Score `passages` against `query`; `.order` is best first. Options: `core.checks.RerankOptions`."""
    if _ready.answer:
        return cast(Ranking, _ready.answer.result())
    return self.running_engine().rerank(query, passages, **options)


def embed_many(
    batches: Iterable[list[str]], sending: Mapping[str, Any] | None = None, **options: Any
) -> list[AsyncResult]:
    """Send one `embed` job for each list of texts, hundreds in a round trip; their results in order.

    All share `options`, and `sending`: what `apply_async` takes, such as `{"priority": 9}`.
    ProducerError, before anything is sent, if one of them is wrong.
    """
    return _send_all(embed, [((texts,), options) for texts in batches], sending)


def rerank_many(
    calls: Iterable[tuple[str, list[str]]], sending: Mapping[str, Any] | None = None, **options: Any
) -> list[AsyncResult]:
    """Send one `rerank` job for each pair of a query and its passages, as `embed_many` does."""
    return _send_all(rerank, [(call, options) for call in calls], sending)


def _send_all(
    task: Any, calls: list[tuple[Any, dict[str, Any]]], sending: Mapping[str, Any] | None
) -> list[AsyncResult]:
    checked = [task.checked(args, kwargs) for args, kwargs in calls]
    for model in {call.kwargs.get("model") for call in checked}:
        task.check_model(model)
    return send_many(task, [call._replace(sending={**call.sending, **(sending or {})}) for call in checked])


async def aget(job: AsyncResult | ResultSet, timeout: float | None = None) -> Any:
    """`job.get(timeout)` in asyncio: returns and raises the same, and blocks nobody. All waits share a connection."""
    from tasks.awaiting import wait_for

    return await wait_for(job, timeout)
