"""The device thread: takes batches from the backlog and runs them; a CPU has one per stream.

    next batch  →  launch  →  (the next one is launched meanwhile)  →  collect  →  completion

On a device that computes beside the host, a batch is prepared, copied and queued while the one
before it runs. A batch that fails is halved until only the culprit's jobs fail; a device that cannot compute
even one harmless token is given up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from embedq.core.batching.backlog import Backlog
from embedq.core.batching.batch_stats import Batch, Meter
from embedq.core.batching.completion_thread import CompletionThread
from embedq.core.batching.cpu_streams import Cores
from embedq.core.batching.device_memory import free_cache, reduced_budget
from embedq.core.batching.pass_results import as_failure, check_rows
from embedq.core.batching.watchdog import Watchdog
from embedq.core.errors import DeviceFailure, DeviceOutOfMemory, EmbedqError
from embedq.core.models import Launched, Model, Outputs
from embedq.core.sequence import Sequence, Tokens, Wanted, num_computed_tokens

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _RunningPass:
    """A batch on the device: the function that waits for its rows, or the failure that kept it from starting."""

    batch: list[Sequence]
    model: Model
    started_s: float
    finish: Launched | None
    failure: EmbedqError | None = None
    #: Whether others waited when it began.
    is_loaded: bool = False


class DeviceLoop:
    """Runs batches until the backlog is closed and empty, or the device is given up."""

    def __init__(
        self,
        models: Mapping[str, Model],
        backlog: Backlog,
        completion: CompletionThread,
        cores: Cores,
        meter: Meter,
        hang_timeout_s: float,
        on_dead: Callable[[DeviceFailure], None],
    ) -> None:
        self._models = models
        self._backlog = backlog
        self._completion = completion
        self._cores = cores
        self._meter = meter
        self._on_dead = on_dead
        self.watchdog = Watchdog(hang_timeout_s, self._hung)
        #: Seconds in which a batch was on the device.
        self.compute_s = 0.0
        self._idle_since_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the backlog is closed and empty, or the device is given up. Never waits for a hung thread."""
        self._ended.wait()
        if not self._backlog.dead:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # a bug here or in an extension: without this thread no job gets an answer
            self.give_up(f"the device thread ended with {type(error).__name__}: {error}")
        finally:
            self.watchdog.close()
            self._ended.set()

    def _work(self) -> None:
        running: _RunningPass | None = None
        while not self._backlog.dead:
            batch = self._backlog.next_batch(must_wait=running is None)
            if not batch and running is None:
                break  # closed, and all is done
            following = self._launch(batch) if batch else None
            if running:
                self._collect(running)
            if following and not _overlaps(following):
                self._collect(following)
                following = None
            self.watchdog.progress(is_busy=following is not None)
            running = following

    def _launch(self, batch: list[Sequence]) -> _RunningPass:
        """Start a pass; on an accelerator this returns before it has ended."""
        model, started_s = self._models[batch[0].model], time.monotonic()
        self.watchdog.progress(is_busy=True)
        self._meter.begin(batch[0].model)
        self._completion.submit(lambda: _start(batch, started_s))
        launched = _RunningPass(batch, model, started_s, None, is_loaded=self._backlog.has_work)
        try:
            launched.finish = self._start_pass(model, batch)
        except Exception as error:
            launched.failure = as_failure(model, batch, error)
        return launched

    def _start_pass(self, model: Model, batch: list[Sequence]) -> Launched:
        with self._cores.share(has_followers=self._backlog.has_work):
            return model.launch(batch, batch[0].wanted)

    def _collect(self, launched: _RunningPass) -> None:
        """Wait for the pass's rows and pass them to completion."""
        batch, failure = launched.batch, launched.failure
        if launched.finish:
            failure = self._finish(launched.model, batch, launched.finish, launched.started_s)
        self._meter.end(batch[0].model, 0 if failure else _num_tokens(batch), launched.is_loaded)
        ended_s = time.monotonic()
        seconds = ended_s - max(launched.started_s, self._idle_since_s)
        self.compute_s += seconds
        self._idle_since_s = ended_s
        if failure:
            self._retry(batch, failure)
        else:
            num_tokens = num_computed_tokens(batch, launched.model.is_padded)
            self._backlog.finished(batch[0].model, num_tokens, seconds)

    def _finish(self, model: Model, batch: list[Sequence], finish: Launched, started_s: float) -> EmbedqError | None:
        """Pass the rows of a launched pass to completion, or return the error its jobs get."""
        try:
            rows = finish()
            check_rows(model, rows, batch[0].wanted.outputs, len(batch))
        except Exception as error:
            return as_failure(model, batch, error)
        times_s = started_s, time.monotonic()
        self._completion.submit(lambda: self._deliver(batch, rows, times_s))
        return None

    def _deliver(self, batch: list[Sequence], rows: Outputs, times_s: tuple[float, float]) -> None:
        answered = self._backlog.answered(batch)
        if self._meter.on_batch:
            jobs = [job for places in answered for job, _ in places]
            self._meter.on_batch(Batch(batch[0].model, len(batch), _num_tokens(batch), *times_s, jobs))
        for index, places in enumerate(answered):
            for job, row in places:
                job.deliver(row, index, rows, len(places) > 1, times_s, len(batch))

    def _retry(self, batch: list[Sequence], failure: EmbedqError) -> None:
        """Run a failed batch again in halves, so that only the culprit's jobs fail."""
        model = self._models[batch[0].model]
        pieces = self._split(model, batch, failure)
        while pieces and not self._backlog.dead:
            piece = [sequence for sequence in pieces.pop() if sequence.rows]  # the rest of a failed job need not run
            if not piece:
                continue
            # The budget may have fallen since this piece was made; run as it is, it would fail like the one before.
            num_tokens = num_computed_tokens(piece, model.is_padded)
            if len(piece) > 1 and num_tokens > self._backlog.max_tokens(piece[0].model):
                pieces += _halves(piece)
                continue
            again = self._forward(model, piece)
            if again:
                pieces += self._split(model, piece, again)

    def _split(self, model: Model, piece: list[Sequence], failure: EmbedqError) -> list[list[Sequence]]:
        """Return the halves of a failed piece, to run again. A single sequence's jobs fail instead."""
        if isinstance(failure, DeviceOutOfMemory):
            self._make_room(model, piece)
        if len(piece) == 1:
            self._fail(model, piece, failure)
            return []
        self._meter.split(piece[0].model, isinstance(failure, DeviceOutOfMemory))
        log.warning(
            "a batch failed; running it again in halves: %s",
            type(failure).__name__,
            extra={"action": "batch_split", "model": model.spec.alias, "num_sequences": len(piece)},
        )
        return _halves(piece)

    def _forward(self, model: Model, piece: list[Sequence]) -> EmbedqError | None:
        self.watchdog.progress(is_busy=True)
        self._meter.begin(piece[0].model)
        started_s, failure = time.monotonic(), None
        try:
            finish = self._start_pass(model, piece)
        except Exception as error:
            failure = as_failure(model, piece, error)
        else:
            failure = self._finish(model, piece, finish, started_s)
        self._meter.end(piece[0].model, 0 if failure else _num_tokens(piece))
        return failure

    def _fail(self, model: Model, piece: list[Sequence], failure: EmbedqError) -> None:
        """Fail the jobs of one sequence, or give the device up if it cannot compute a harmless token either."""
        if isinstance(failure, DeviceFailure) and not _is_well(model):
            self.give_up(f"{model.device} fails every pass of model {model.spec.alias}, the last with: {failure}")
            return
        self._completion.submit(lambda: self._deliver_failure(piece, failure))

    def _deliver_failure(self, piece: list[Sequence], failure: EmbedqError) -> None:
        for places in self._backlog.answered(piece):
            for job, _ in places:
                job.fail(failure)
                self._backlog.withdraw(job)

    def _make_room(self, model: Model, piece: list[Sequence]) -> None:
        """After `piece` ran out of memory: free cached memory and lower the budget of later batches.

        A single sequence that does not fit says nothing about batches: it would have failed under any budget.
        """
        alias, failed_tokens = piece[0].model, num_computed_tokens(piece, model.is_padded)
        free_cache(model.device)
        if len(piece) > 1:
            self._backlog.lower_budget(alias, reduced_budget(self._backlog.max_tokens(alias), failed_tokens))
        log.warning(
            "a batch ran out of device memory; later batches are smaller",
            extra={
                "action": "out_of_memory",
                "model": alias,
                "num_sequences": len(piece),
                "num_tokens": failed_tokens,
                "max_batch_tokens": self._backlog.max_tokens(alias),
            },
        )

    def _hung(self) -> None:
        self.give_up("a forward pass made no progress for longer than hang_timeout_s; the device hangs")

    def give_up(self, reason: str) -> None:
        """Stop using the device: log `reason` and call `on_dead`, which fails every job with it or ends the process."""
        if self._backlog.dead:
            return  # given up before: a pass that hung may fail later
        log.error("giving the device up: %s", reason, extra={"action": "device_dead"})
        try:
            self._on_dead(DeviceFailure(reason))
        finally:
            self._ended.set()


def _start(batch: list[Sequence], started_s: float) -> None:
    for sequence in batch:
        for job, _ in list(sequence.rows):  # a job may join or leave meanwhile
            job.start(started_s)


def _num_tokens(batch: list[Sequence]) -> int:
    return sum(sequence.length for sequence in batch)


def _overlaps(launched: _RunningPass) -> bool:
    """Returns True if the pass runs while the host does other work. On other devices its rows are there already."""
    return launched.failure is None and launched.model.device.startswith("cuda")


def _is_well(model: Model) -> bool:
    """Returns True if the model can still compute a sequence of one harmless token."""
    probe = Sequence(Tokens(np.full(1, int(model.spec.pad_token_id == 0), np.int32)))
    wanted = Wanted(frozenset(list(model.outputs)[:1]))
    try:
        check_rows(model, model.launch([probe], wanted)(), wanted.outputs, 1)
    except Exception:
        return False
    return True


def _halves(piece: list[Sequence]) -> list[list[Sequence]]:
    """The two halves; the first one last, because pieces are taken from the end."""
    return [piece[len(piece) // 2 :], piece[: len(piece) // 2]]
