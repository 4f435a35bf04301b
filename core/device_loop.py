"""Jobs' sequences -> batches -> rows, on the one thread that touches the models.

Knows of sequences and rows only: what a text was, what a caller wants of its rows and how calls
are answered is the engine's. Callers' threads meet the device thread in the scheduler, under one
lock, and in each job's future.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Rows
from concurrent.futures import Future
from typing import Any

import numpy as np

from core.errors import DeviceFailure, DeviceOutOfMemory, EmbedqError, InvalidSettings
from core.memory import free_cache, is_out_of_memory, reduced_budget
from core.models import Model
from core.scheduler import Scheduler
from core.sequence import Sequence, Wanted
from core.settings import Settings

log = logging.getLogger(__name__)

#: Token budgets of a batch where the settings leave it open; see `Settings.max_batch_tokens`.
_CPU_BATCH_TOKENS = 2_048
_ACCELERATOR_BATCH_TOKENS = 16_384


class Job:
    """The rows of one call, filled in as batches finish. Touched by the device thread after submitting."""

    def __init__(self, num_rows: int, wanted: Wanted) -> None:
        self.done: Future[dict[str, list[Any]]] = Future()
        self._rows: dict[str, list[Any]] = {output: [np.empty(0)] * num_rows for output in wanted.outputs}
        self._num_left = num_rows
        if num_rows == 0:
            self.done.set_result(self._rows)

    def deliver(self, row: int, index: int, outputs: Mapping[str, Rows[Any]]) -> None:
        """Take row `index` of a batch's outputs as this job's row `row`."""
        for name, rows in self._rows.items():
            rows[row] = outputs[name][index]
        self._num_left -= 1
        if self._num_left == 0 and not self.done.done():
            self.done.set_result(self._rows)

    def fail(self, error: BaseException) -> None:
        """Answer the call with `error`; what still comes of its rows is dropped."""
        if not self.done.done():
            self.done.set_exception(error)


class DeviceLoop:
    """The scheduler, the device thread that empties it, and the room that callers wait for."""

    def __init__(self, models: Mapping[str, Model], settings: Settings) -> None:
        self._models = models
        self._max_waiting_tokens = settings.max_waiting_tokens
        self.scheduler = Scheduler(_batch_tokens(models, settings), settings.max_batch_sequences, settings.max_wait_s)
        #: Guards the scheduler; signals new work to the device thread and new room to the callers.
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Let `sequences` wait for a batch; blocks while as much as settings allow is waiting already."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self.scheduler.num_tokens < self._max_waiting_tokens)
            if self._is_closing:
                raise DeviceFailure("the engine is closed; no new work is taken")
            self.scheduler.add(sequences)
            self._changed.notify_all()

    def withdraw(self, job: Job) -> None:
        """Drop what still waits of `job`."""
        with self._changed:
            self.scheduler.remove(job)
            self._changed.notify_all()

    def limit_batch_tokens(self, max_tokens: int) -> None:
        """Let batches from now on have at most `max_tokens`; never raises the budget."""
        with self._changed:
            self.scheduler.max_batch_tokens = min(self.scheduler.max_batch_tokens, max_tokens)

    def close(self) -> None:
        """Finish what waits, then end the device thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._step(batch)

    def _next_batch(self) -> list[Sequence]:
        """Wait for work and take a batch of it; empty once the engine is closing and all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self.scheduler.num_sequences)
            batch = self.scheduler.next_batch(time.monotonic())
            self._changed.notify_all()
            return batch

    def _step(self, batch: list[Sequence]) -> None:
        """Run one batch and deliver its rows; what fails is halved, so that only the culprit's job fails."""
        pieces = [batch]
        while pieces:
            piece = pieces.pop()
            # The budget may have fallen since this piece was made; run as it is, it would fail like the one before.
            if len(piece) > 1 and _padded_tokens(piece) > self.scheduler.max_batch_tokens:
                pieces += _halves(piece)
                continue
            failure = self._forward(piece)
            if failure is None:
                continue
            if isinstance(failure, DeviceOutOfMemory):
                self._make_room(piece)
            if len(piece) == 1:
                piece[0].job.fail(failure)
                continue
            log.warning(
                "a batch failed and is run again in halves: %s",
                type(failure).__name__,
                extra={"action": "batch_split", "model": piece[0].key[0], "num_sequences": len(piece)},
            )
            pieces += _halves(piece)

    def _forward(self, piece: list[Sequence]) -> EmbedqError | None:
        """Run one pass and deliver its rows, or return what its jobs are to be told.

        Of the error itself nothing is kept: through its traceback it would hold the pass's tensors
        while the device needs the room for the next pass.
        """
        alias, wanted = piece[0].key
        model = self._models[alias]
        try:
            rows = model.forward(piece, wanted)
            _check_rows(model, rows, wanted.outputs, len(piece))
        except Exception as error:
            return _as_failure(model, piece, error)
        for index, sequence in enumerate(piece):
            sequence.job.deliver(sequence.row, index, rows)
        return None

    def _make_room(self, piece: list[Sequence]) -> None:
        """After `piece` did not fit: free what is cached, and let later batches be smaller.

        One sequence that did not fit alone says nothing about batches: it would have failed under any budget.
        """
        alias, failed_tokens = piece[0].key[0], _padded_tokens(piece)
        free_cache(self._models[alias].device)
        if len(piece) > 1:
            self.limit_batch_tokens(reduced_budget(self.scheduler.max_batch_tokens, failed_tokens))
        log.warning(
            "the device is out of memory",
            extra={
                "action": "out_of_memory",
                "model": alias,
                "num_sequences": len(piece),
                "num_tokens": failed_tokens,
                "max_batch_tokens": self.scheduler.max_batch_tokens,
            },
        )


def _batch_tokens(models: Mapping[str, Model], settings: Settings) -> int:
    """The budget of a batch: as set, else the device's. A sequence longer than the device's runs alone."""
    if settings.max_batch_tokens is None:
        is_cpu = all(model.device == "cpu" for model in models.values())
        return _CPU_BATCH_TOKENS if is_cpu else _ACCELERATOR_BATCH_TOKENS
    longest = max(model.spec.max_length for model in models.values())
    if settings.max_batch_tokens < longest:
        raise InvalidSettings(
            f"max_batch_tokens is {settings.max_batch_tokens} and a sequence may have {longest} tokens; "
            f"raise EMBEDQ_MAX_BATCH_TOKENS to {longest}, or lower the model's max_length"
        )
    return settings.max_batch_tokens


def _check_rows(model: Model, rows: Mapping[str, Rows[Any]], outputs: frozenset[str], num_sequences: int) -> None:
    """DeviceFailure unless each of `outputs` has one row per sequence, all of finite numbers."""
    alias = model.spec.alias
    for name in outputs:
        if name not in rows:
            raise DeviceFailure(f"model {alias} gave no {name} rows; this is a bug")
        if len(rows[name]) != num_sequences:
            raise DeviceFailure(
                f"model {alias} gave {len(rows[name])} {name} rows for {num_sequences} sequences; this is a bug"
            )
        # Rows of one length are one array; ColBERT's are arrays of their own, sparse ones pairs of arrays.
        given = rows[name]
        parts = [given] if isinstance(given, np.ndarray) else [part for row in given for part in _arrays(row)]
        if not all(np.isfinite(part).all() for part in parts):
            raise DeviceFailure(f"model {alias} gave NaN or infinite {name} values in {model.precision}")


def _arrays(row: Any) -> Iterable[np.ndarray]:
    return row if isinstance(row, tuple) else (row,)


def _as_failure(model: Model, piece: list[Sequence], error: Exception) -> EmbedqError:
    """`error` as one of ours, without the frames of the pass."""
    if isinstance(error, EmbedqError):
        return error.with_traceback(None)
    if is_out_of_memory(error):
        return DeviceOutOfMemory(
            f"{_padded_tokens(piece)} tokens of one text or pair do not fit the memory of {model.device} beside model "
            f"{model.spec.alias}; lower max_length, or use a device with more memory"
        )
    return DeviceFailure(
        f"the forward pass of model {model.spec.alias} failed on a single sequence: {type(error).__name__}: {error}"
    )


def _padded_tokens(piece: list[Sequence]) -> int:
    return max(sequence.length for sequence in piece) * len(piece)


def _halves(piece: list[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
    """The two halves, the first one last: where it is taken from first."""
    return piece[len(piece) // 2 :], piece[: len(piece) // 2]
