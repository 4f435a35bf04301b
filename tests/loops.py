"""A device loop without an engine around it: jobs whose sequences are written down instead of encoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from embedq.core.batching.backlog import Backlog, Encoded
from embedq.core.batching.batch_stats import Meter
from embedq.core.batching.completion_thread import CompletionThread
from embedq.core.batching.cpu_streams import Cores
from embedq.core.batching.device_loop import DeviceLoop
from embedq.core.batching.job import Call, Job
from embedq.core.batching.scheduler import Limits, Scheduler
from embedq.core.errors import DeviceFailure
from embedq.core.sequence import Sequence, Tokens, Wanted
from tests.checkpoints import PATIENCE_S, FakeModel, row_of

DENSE = frozenset({"dense"})

#: Tokens that starting a batch is said to cost: so many that whatever fits one batch is put into one.
_FULL_BATCHES = 1_000_000


class Loop:
    """What lies between encoding and the jobs' answers."""

    def __init__(self, models: dict[str, FakeModel], hang_timeout_s: float, **limits: Any) -> None:
        self.models = models
        self.backlog = backlog_of(*models, **limits)
        self.completion = CompletionThread()
        #: Set, with the reason before it, when the device is given up.
        self.is_dead = threading.Event()
        self.reasons: list[str] = []
        self.meter = Meter(models)
        shared = models, self.backlog, self.completion, Cores(1), self.meter
        self.device = DeviceLoop(*shared, hang_timeout_s, self._die)

    def close(self) -> None:
        """Compute what waits, then end the threads."""
        self.backlog.close()
        self.device.join()
        self.completion.close()

    def _die(self, failure: DeviceFailure) -> None:
        self.reasons.append(str(failure))
        self.backlog.fail_all(failure)
        self.is_dead.set()


def backlog_of(*aliases: str, max_waiting_tokens: int = 100_000, **limits: Any) -> Backlog:
    """A backlog for models of these names, whose batches are as full as they may be."""
    bounds = {"max_batch_tokens": 2048, "max_batch_sequences": 512, "overhead_tokens": _FULL_BATCHES} | limits
    return Backlog(Scheduler({alias: Limits(**bounds) for alias in aliases}, 1e9, 1e9), max_waiting_tokens)


@contextmanager
def running(*models: FakeModel, hang_timeout_s: float = 10 * PATIENCE_S, **limits: Any) -> Iterator[Loop]:
    """A loop over `models`, closed at the end with every gate open."""
    loop = Loop({model.spec.alias: model for model in models}, hang_timeout_s, **limits)
    try:
        yield loop
    finally:
        for model in models:
            model.gate.set()
        loop.close()


def job_of(
    model: FakeModel,
    num_rows: int,
    outputs: frozenset[str] = DENSE,
    is_bulk: bool = False,
    on_started: Callable[[], None] | None = None,
    origin: Any = None,
) -> Job:
    """An opened job whose result are its rows by output; nothing encodes it."""
    call = Call(model, Wanted(outputs), [*range(num_rows)], lambda rows: [], lambda rows: rows)
    job = Job(lambda: call, is_bulk, on_started=on_started, origin=origin)
    job.open()
    return job


def tokens_of(*lengths: int, token: int = 1) -> list[Tokens]:
    """Sequences of these lengths; number i is nothing but the token `token` + i."""
    return [Tokens(np.full(length, token + index, np.int32)) for index, length in enumerate(lengths)]


def submit(
    loop: Loop,
    *lengths: int,
    token: int = 1,
    outputs: frozenset[str] = DENSE,
    alias: str = "fake",
    on_started: Callable[[], None] | None = None,
) -> Job:
    """A job of one sequence per length, as `tokens_of`, that waits for a batch."""
    job = job_of(loop.models[alias], len(lengths), outputs, on_started=on_started)
    loop.backlog.add([Encoded(job, 0, tokens_of(*lengths, token=token))])
    return job


def rows_of(job: Job, output: str = "dense") -> Any:
    """The job's rows of one output, waited for."""
    return job.answer.result(PATIENCE_S)[output]


def expected_of(*lengths: int, token: int = 1) -> list[tuple[float, float]]:
    """The dense rows of a job of `submit`."""
    return [row_of(tokens.ids) for tokens in tokens_of(*lengths, token=token)]


def error_of(job: Job) -> BaseException | None:
    return job.answer.exception(PATIENCE_S)


def raise_on_token(token: int, error: BaseException) -> Callable[[list[Sequence]], None]:
    """What makes a `FakeModel` fail on every batch that holds `token`. The device's probe is the token 1."""

    def fail(batch: list[Sequence]) -> None:
        if any(token in one.tokens.ids for one in batch):
            raise error

    return fail


def num_waiting(backlog: Backlog) -> int:
    """Sequences that wait for a batch."""
    return backlog._scheduler.num_sequences


def wait_until(backlog: Backlog, is_so: Callable[[], bool]) -> None:
    """Wait until `is_so()`, asked whenever sequences came to the backlog or left it."""
    changed = threading.Condition(backlog.lock)
    with backlog.lock:
        for condition in (backlog.work, backlog.room):
            _also_notify(condition, changed)
        assert changed.wait_for(is_so, PATIENCE_S)


def wait_for_waiting(backlog: Backlog, num_sequences: int) -> None:
    """Wait until exactly so many sequences wait for a batch."""
    wait_until(backlog, lambda: num_waiting(backlog) == num_sequences)


def _also_notify(condition: threading.Condition, other: threading.Condition) -> None:
    """Let `other`, of the same lock, be notified with `condition`: a waiter of our own there could miss the thread meant."""
    notify = condition.notify

    def notify_both(n: int = 1) -> None:
        notify(n)
        other.notify_all()

    condition.notify = notify_both  # type: ignore[method-assign]
