"""One call on its way through the engine: what it asks, its rows as batches finish, its answer.

Knows no queue, thread or model of its own. Encode threads open a job and take slices of it, the
completion thread delivers its rows; whoever waits holds the future.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.models import Model, Outputs
from core.sequence import Sequence, Tokens, Wanted

log = logging.getLogger(__name__)

#: Rows encoded in one go: small enough that the device starts early on a large job and an
#: interactive job does not wait long behind it, large enough to keep the tokenizer's threads busy.
SLICE = 256

#: A job of more rows is bulk whatever its priority: one such job is seconds of work on a CPU.
MAX_INTERACTIVE_ROWS = 1_000

#: Celery's Redis priorities 0..9, 0 first: up to this one a job counts as interactive.
MAX_INTERACTIVE_PRIORITY = 4


@dataclass(frozen=True, slots=True)
class Call:
    """What a checked call asks of one model. `core.calls` makes them."""

    model: Model
    wanted: Wanted
    num_rows: int
    #: A slice of the rows -> their token ids, in order. Runs on encode threads, several slices at once.
    encode: Callable[[slice], list[Tokens]]
    #: Each output's rows, in order -> what the caller gets.
    finish: Callable[[dict[str, list[Any]]], Any]


class Job:
    """A call and its answer."""

    def __init__(
        self,
        open_call: Callable[[], Call],
        is_bulk: bool,
        num_bytes: int = 0,
        on_started: Callable[[], None] | None = None,
    ) -> None:
        self.answer: Future[Any] = Future()
        self.is_bulk = is_bulk
        #: Bytes of its texts, as far as known before they are encoded: what it will ask of the memory.
        self.num_bytes = num_bytes
        self.sequences: list[Sequence] = []
        self._open_call = open_call
        self._on_started = on_started
        self._next_row = 0
        self._num_left = -1  # not opened
        self._rows: dict[str, list[Any]] = {}

    @property
    def is_over(self) -> bool:
        """Whether it has its answer, or nobody wants one any more."""
        return self.answer.done()

    @property
    def is_opened(self) -> bool:
        return self._num_left >= 0

    def open(self) -> None:
        """Check the call and make room for its rows; errors of the call are raised. Once, on one thread."""
        self.call = call = self._open_call()
        self.is_bulk = self.is_bulk or call.num_rows > MAX_INTERACTIVE_ROWS
        self._rows = {output: [np.empty(0)] * call.num_rows for output in call.wanted.outputs}
        self._num_left = call.num_rows
        if call.num_rows == 0:
            self._finish()

    def take_slice(self) -> slice:
        """The next rows to encode; empty once all are taken. Its caller holds a lock."""
        taken = slice(self._next_row, min(self._next_row + SLICE, self.call.num_rows))
        self._next_row = taken.stop
        return taken

    def start(self) -> None:
        """Tell, once, that rows of it are in a batch. Never raises: others' rows come in the same batch."""
        tell, self._on_started = self._on_started, None
        if tell:
            try:
                tell()
            except Exception:
                log.exception("a callback of a job failed", extra={"action": "callback_failed"})

    def deliver(self, row: int, index: int, outputs: Outputs, is_shared: bool) -> None:
        """Take row `index` of a batch's outputs as row `row`, or a copy of it. On the completion thread only."""
        self.start()  # unless it joined a sequence that was under way
        for name, rows in self._rows.items():
            given = outputs[name][index]
            rows[row] = copy.deepcopy(given) if is_shared else given  # callers may write to what they get
        self._num_left -= 1
        if self._num_left == 0:
            self._finish()

    def fail(self, error: BaseException) -> None:
        """Answer with `error`; what still comes of the rows is dropped."""
        with contextlib.suppress(InvalidStateError):  # it had its answer
            self.answer.set_exception(error)

    def _finish(self) -> None:
        if self.is_over:
            return
        try:
            result = self.call.finish(self._rows)
        except Exception as error:
            self.fail(error)
            return
        with contextlib.suppress(InvalidStateError):  # cancelled in this moment
            self.answer.set_result(result)
