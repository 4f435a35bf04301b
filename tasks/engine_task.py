"""The base class of our tasks: a call is checked and summarised where it is sent, and computed by a worker's engine."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar

from celery import Task, states
from celery.result import EagerResult
from kombu.utils.imports import symbol_by_name

from embedq.core.codec import pack
from embedq.core.errors import InvalidInput, InvalidSettings, JobTooLarge, OperatorError, ProducerError, WorkerError
from embedq.core.options import EmbedOptions, RerankOptions, check_text, check_texts
from embedq.tasks.application import app, config, key_prefix
from embedq.tasks.job_results import JobResult, ReadyResult
from embedq.tasks.models import Registry
from embedq.tasks.queue_cap import waiting_for_room
from embedq.tasks.sending import OutgoingJob, checked_sending, compression_for

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from embedq.core.batching.job import Call
    from embedq.core.engine import Engine

#: Options shown in logs and Flower. The instruction is a text, so it is not among them.
_SHOWN = ("model", "input_type", "dimensions", "dtype", "outputs", "mode", "top_k", "max_length", "normalize")


class _Ready(threading.local):
    """The engine's answer to the job whose task this thread runs."""

    answer: Future[Any] | None = None


_ready = _Ready()


@contextmanager
def ready_answer(answer: Future[Any] | None) -> Iterator[None]:
    """Have `embed` and `rerank`, run on this thread, return this answer. For the worker's pool."""
    _ready.answer = answer
    try:
        yield
    finally:
        _ready.answer = None


def current_answer() -> Future[Any] | None:
    """The answer of the job whose task this thread runs; None outside the worker's pool."""
    return _ready.answer


#: The functions that load an engine, by name and not by import: a producer has no torch.
_LOAD, _READ_SETTINGS = "embedq.core:load_all", "embedq.core.settings:read_settings"

#: What is said where `task_always_eager` cannot do it.
_EAGER = "task_always_eager computes jobs in this process"
_IN_TESTS = "Unit tests need no model with embedq.testing.fake()"

#: Held while the engine of this process is loaded.
_loading = threading.Lock()


class KnownCall(JobResult):
    """The result of a job whose id the producer chose, and of no other call that has the same id."""

    #: As `EngineTask.fingerprint` returns it.
    call = ""

    def checked(self, meta: dict[str, Any]) -> dict[str, Any]:
        """The result as it was stored, or an error if another call was answered under this id."""
        answered = meta.get("call")
        if not self.call or not answered or answered == self.call:
            return meta
        error = InvalidInput(
            f"task_id {self.id!r:.80} belongs to another call, whose result is stored; send this one under an id of its own"
        )
        return {**meta, "status": states.FAILURE, "result": error, "traceback": None, "children": []}


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

    #: The registry, and the URL of its server.
    _registry: tuple[str, Registry] | None = None

    #: Set by `task`: how to check one kind of call.
    options_class: ClassVar[type[EmbedOptions] | type[RerankOptions]]

    def apply_async(self, args: Any = None, kwargs: Any = None, task_id: Any = None, *rest: Any, **sending: Any) -> Any:
        """Check the call and how it is sent, then send it. ProducerError, before anything is sent, if one is wrong.

        A `task_id` of the producer's own may be a text or a UUID. Sent again under the same id, the same call has one
        result; `.get()` of another call under that id raises InvalidInput. QueueFull if the queue has no room for the
        job, nor gets any within `block_s` seconds.
        """
        args, kwargs = args or (), kwargs or {}
        app.follow_eager()
        call = self.checked(args, kwargs)
        self.check_model(call.kwargs.get("model"))
        is_retry = bool(sending.get("retries"))  # its message was checked when it came
        sending = {**call.sending, **(sending if is_retry else checked_sending(sending))}
        if task_id is not None:
            task_id = checked_sending({"task_id": task_id})["task_id"]
        block_s = sending.pop("block_s", None)
        job = waiting_for_room(partial(super().apply_async, args, kwargs, task_id, *rest, **sending), block_s)
        return job if task_id is None else self.known(job, call)

    def apply(self, *args: Any, **options: Any) -> Any:
        """Compute the job in this process, as `task_always_eager` has it; its result may be had inside a task as well."""
        done = super().apply(*args, **options)
        return ReadyResult(done.id, done.result, done.state, done.traceback, done.name)

    def known(self, job: AsyncResult, call: OutgoingJob) -> AsyncResult:
        """The result of a job that was sent under an id of the producer's own."""
        if isinstance(job, EagerResult):
            return job
        known = KnownCall(job.id, backend=job.backend, task_name=self.name, app=self.app, parent=job.parent)
        known.call = self.fingerprint(call.args, call.kwargs)
        return known

    def fingerprint(self, args: Any, kwargs: dict[str, Any]) -> str:
        """16 hexadecimal digits that are the same for equal calls, in the producer and in the worker."""
        call, given = self._bind(args, kwargs)
        options = {name: sorted(one) if isinstance(one, set | frozenset) else one for name, one in given.items()}
        return blake2b(pack([self.name, call, sorted(options.items())]), digest_size=8).hexdigest()

    def check_model(self, alias: str | None) -> None:
        """UnknownModel or InvalidInput if no worker would take a job for this model, None for the default."""
        if not self.app.conf.task_always_eager:  # else the engine of this process checks it
            self.registry.check(self.name.removeprefix("tasks."), alias)

    def checked(self, args: Any, kwargs: dict[str, Any]) -> OutgoingJob:
        """The call, with how it is summarised and sent. ProducerError if its arguments are wrong."""
        call, given = self._bind(args, kwargs)
        check_texts(self._texts_name, call[self._texts_name])
        num_bytes = self._check_size(call)
        self.options_class.checked(given)
        sending = sending_of(self.summary_of(call[self._texts_name]), _shown(given), num_bytes)
        return OutgoingJob(args, kwargs, num_bytes, sending)

    @property
    def registry(self) -> Registry:
        """The announced models, on the connections of the result backend; made anew when that leads to another server."""
        backend, url = self.backend, self.app.conf.result_backend
        if self._registry is None or self._registry[0] != url:
            self._registry = url, Registry(backend.client, key_prefix(self.app))
        return self._registry[1]

    def running_engine(self) -> Engine:
        """The engine of this process: the worker's, or under `task_always_eager` one that is loaded at its first use.

        InvalidInput where there is none: the task was called, not sent.
        """
        if self.engine is None and self.app.conf.task_always_eager:
            _load_engine()
        if self.engine is None:
            raise InvalidInput(
                f"{self.name} runs in a worker; send it with .delay(...). To compute in this process, use "
                "embedq.core.load(...), or set tasks.app.conf.task_always_eager = True and EMBEDQ_MODELS; in unit tests, use "
                "embedq.testing"
            )
        return self.engine

    def open_call(self, engine: Engine, args: Any, kwargs: dict[str, Any]) -> Call:
        """Builds the engine's call from a message's arguments, and checks them: any program can write to the queue."""
        call, given = self._bind(args, kwargs)
        build = engine.calls.embed if self.options_class is EmbedOptions else engine.calls.rerank
        built = build(**call, **given)  # checks all but the size
        self._check_size(call)
        return built

    def _bind(self, args: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The call's arguments and its options, by name. TypeError if texts are missing."""
        call = dict(self._signature.bind(*args, **kwargs).arguments)
        return call, call.pop("options", {})

    def nothing(self, options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call without a text, with these options."""
        texts = {"texts": []} if self.options_class is EmbedOptions else {"query": "", "passages": []}
        return (), {**options, **texts}

    def texts_of(self, args: Any, kwargs: dict[str, Any]) -> list[str]:
        """The texts, or the passages, of a call that was checked."""
        texts: list[str] = self._bind(args, kwargs)[0][self._texts_name]
        return texts

    def size_of(self, args: Any, kwargs: dict[str, Any]) -> int:
        """Bytes of a call's texts. JobTooLarge if it holds too much for one job."""
        return self._check_size(self._bind(args, kwargs)[0])

    def _check_size(self, call: dict[str, Any]) -> int:
        return check_size(call[self._texts_name], call.get("query", ""))

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.run)  # at every job it took a third of what a worker spends on a small one

    @property
    def _texts_name(self) -> str:
        return "texts" if self.options_class is EmbedOptions else "passages"

    def summary_of(self, texts: list[str]) -> str:
        """The texts in Flower and logs: their number and length, never the texts themselves."""
        noun = self._texts_name if len(texts) != 1 else self._texts_name[:-1]
        return f"{len(texts):,} {noun}, {sum(map(len, texts)):,} characters"


def _load_engine() -> None:
    """Load the models of this process's settings once, for `task_always_eager`. InvalidSettings if it cannot."""
    with _loading:
        if EngineTask.engine is not None:
            return
        try:
            load, read_settings = symbol_by_name(_LOAD), symbol_by_name(_READ_SETTINGS)
            EngineTask.engine = load(read_settings())
        except ModuleNotFoundError as error:
            raise InvalidSettings(f"{_EAGER}, which needs the extra embedq[worker]: {error}. {_IN_TESTS}") from None
        except OperatorError as error:
            raise type(error)(f"{_EAGER}: {error}. {_IN_TESTS}") from None


def sending_of(argsrepr: str, kwargsrepr: str, num_bytes: int) -> dict[str, Any]:
    """Options of `apply_async` for a job with so many bytes of texts, and with these summaries of its arguments."""
    # AMQP's own property for when a message was sent: by it the exporter computes how long the next job has waited.
    sending = {"argsrepr": argsrepr, "kwargsrepr": kwargsrepr, "timestamp": int(time.time())}
    if compression := compression_for(num_bytes):
        sending["compression"] = compression
    return sending


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
