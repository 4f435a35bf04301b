"""One call on its way through the engine: what it asks, its rows as batches finish, its answer.

Knows no queue, thread or model of its own. Encode threads open a job and take slices of it, the
completion thread delivers its rows; whoever waits holds the future.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedq import __version__
from embedq.core.models import Model, Outputs
from embedq.core.results import Timings, timed
from embedq.core.sequence import Sequence, Tokens, Wanted

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
    #: What each row is made of: a text, or a pair.
    rows: list[Any]
    #: Some of the rows -> their token ids, in order. Runs on encode threads, on several at once.
    encode: Callable[[list[Any]], list[Tokens]]
    #: Each output's rows, in order -> what the caller gets.
    finish: Callable[[dict[str, list[Any]]], Any]
    #: Whether what the caller gets shall carry its `Timings`.
    has_timings: bool = False
    #: Calls that have equal ones encode each other's rows as their own.
    encoded_as: Any = field(default_factory=object)

    @property
    def num_rows(self) -> int:
        return len(self.rows)


class Job:
    """A call and its answer."""

    def __init__(
        self,
        open_call: Callable[[], Call],
        is_bulk: bool,
        num_bytes: int = 0,
        on_started: Callable[[], None] | None = None,
        origin: Any = None,
    ) -> None:
        self.answer: Future[Any] = Future()
        self.is_bulk = is_bulk
        #: Bytes of its texts, as far as known before they are encoded: what it will ask of the memory.
        self.num_bytes = num_bytes
        #: Whatever its submitter wants to find on it again.
        self.origin = origin
        self.sequences: list[Sequence] = []
        #: Of all its sequences that are encoded, equal ones included.
        self.num_tokens = 0
        #: As `time.monotonic()` counts: submitted, first batch begun, last batch ended; 0 while it is not.
        self.submitted_s, self.started_s, self.ended_s = time.monotonic(), 0.0, 0.0
        #: Seconds: as in `Timings`.
        self.waited_s, self.encoded_s = 0.0, 0.0
        self._batch_size = 0
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
        """The next rows to encode; empty once all are taken. One thread at a time."""
        taken = slice(self._next_row, min(self._next_row + SLICE, self.call.num_rows))
        self._next_row = taken.stop
        return taken

    @property
    def computed_s(self) -> float:
        """Seconds from the begin of its first batch to the end of the latest."""
        return max(0.0, self.ended_s - self.started_s)

    def start(self, started_s: float = 0.0) -> None:
        """Tell, once, that rows of it are in a batch, begun at `started_s`.

        Never raises: others' rows come in the same batch.
        """
        if not self.started_s:
            self.started_s = max(started_s, self.submitted_s)  # it may have joined a sequence that was under way
            self.waited_s = max(0.0, self.started_s - self.submitted_s - self.encoded_s)
        tell, self._on_started = self._on_started, None
        if tell:
            try:
                tell()
            except Exception:
                log.exception("a callback of a job failed", extra={"action": "callback_failed"})

    def deliver(
        self,
        row: int,
        index: int,
        outputs: Outputs,
        is_shared: bool,
        times_s: tuple[float, float] = (0.0, 0.0),
        batch_size: int = 0,
    ) -> None:
        """Take row `index` of a batch's outputs as row `row`, or a copy of it. On the completion thread only.

        The batch of `batch_size` sequences began and ended at `times_s`.
        """
        self.start(times_s[0])  # unless it joined a sequence that was under way
        self.ended_s = times_s[1]
        if batch_size > self._batch_size:
            self._batch_size = batch_size
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
            if self.call.has_timings:
                result = timed(
                    result,
                    Timings(
                        self.waited_s,
                        self.encoded_s,
                        self.computed_s,
                        self._batch_size,
                        self.num_tokens,
                        __version__,
                    ),
                )
        except Exception as error:
            self.fail(error)
            return
        with contextlib.suppress(InvalidStateError):  # cancelled in this moment
            self.answer.set_result(result)
