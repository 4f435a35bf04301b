"""One call on its way through the engine: what it asks, its rows as batches finish, its answer.

Encode threads open a job and take slices of it, the completion thread delivers its rows, the caller waits for the
future `answer`. Knows no queue, thread or model of its own.
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
from embedq.core.options import MAX_INTERACTIVE_PRIORITY as MAX_INTERACTIVE_PRIORITY
from embedq.core.options import MAX_INTERACTIVE_ROWS as MAX_INTERACTIVE_ROWS
from embedq.core.results import Timings, timed
from embedq.core.sequence import Sequence, Tokens, Wanted

log = logging.getLogger(__name__)

#: Rows per encoded slice: few enough that the device starts early on a large job and an interactive job does not wait
#: long behind it, enough to keep the tokenizer's threads busy.
SLICE = 256

#: Characters after which a slice ends, at a row: of long texts 256 rows would keep a thread from interactive jobs for
#: seconds. More than 256 rows of a thousand characters, which stay one slice.
_SLICE_CHARACTERS = 500_000


@dataclass(frozen=True, slots=True)
class Call:
    """A checked call of one model. `core.calls` builds them."""

    model: Model
    wanted: Wanted
    #: The text or the (query, passage) pair behind each row.
    rows: list[Any]
    #: Encodes some of the rows, in order. Runs on encode threads, on several at once.
    encode: Callable[[list[Any]], list[Tokens]]
    #: Builds the caller's result from each output's rows, in order.
    finish: Callable[[dict[str, list[Any]]], Any]
    #: Whether the result carries its `Timings`.
    has_timings: bool = False
    #: Rows of calls with equal values may be encoded together, by the `encode` of any of them.
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
        #: Bytes of its texts; 0 if unknown. Bounds the memory of jobs not encoded yet.
        self.num_bytes = num_bytes
        #: The submitter's own reference, kept as given.
        self.origin = origin
        self.sequences: list[Sequence] = []
        #: Tokens of its encoded rows; equal texts count each.
        self.num_tokens = 0
        #: `time.monotonic()` when it was submitted, its first batch began, its last batch ended; 0 before that.
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
        """True once it has its answer or was cancelled."""
        return self.answer.done()

    @property
    def is_opened(self) -> bool:
        return self._num_left >= 0

    @property
    def progress(self) -> tuple[int, int]:
        """Rows that are computed, and all rows; (0, 0) before it is opened."""
        return (self.call.num_rows - self._num_left, self.call.num_rows) if self.is_opened else (0, 0)

    def open(self) -> None:
        """Check the call and allocate its rows; raises the call's errors. Called once, by one thread."""
        self.call = call = self._open_call()
        self.is_bulk = self.is_bulk or call.num_rows > MAX_INTERACTIVE_ROWS
        self._rows = {output: [np.empty(0)] * call.num_rows for output in call.wanted.outputs}
        self._num_left = call.num_rows
        if call.num_rows == 0:
            self._finish()

    def take_slice(self) -> slice:
        """The next rows to encode; empty once all are taken. One thread at a time."""
        first, num_characters = self._next_row, 0
        for row in self.call.rows[first : first + SLICE]:
            num_characters += _num_characters(row)
            self._next_row += 1
            if num_characters >= _SLICE_CHARACTERS:
                break
        return slice(first, self._next_row)

    @property
    def computed_s(self) -> float:
        """Seconds from the start of its first batch to the end of its latest."""
        return max(0.0, self.ended_s - self.started_s)

    def start(self, started_s: float = 0.0) -> None:
        """Record that a batch with its rows began at `started_s`, and call `on_started` the first time.

        Never raises, because rows of other jobs are in the same batch.
        """
        if not self.started_s:
            self.started_s = max(started_s, self.submitted_s)  # it may have joined a sequence that was already running
            self.waited_s = max(0.0, self.started_s - self.submitted_s - self.encoded_s)
        on_started, self._on_started = self._on_started, None
        if on_started:
            try:
                on_started()
            except Exception:
                log.exception("an application's callback on a job raised", extra={"action": "callback_failed"})

    def deliver(
        self,
        row: int,
        index: int,
        outputs: Outputs,
        is_shared: bool,
        times_s: tuple[float, float] = (0.0, 0.0),
        batch_size: int = 0,
    ) -> None:
        """Store row `index` of a batch's outputs as row `row`; a copy of it if other jobs get it too.

        The batch of `batch_size` sequences began and ended at `times_s`. Called on the completion thread only.
        """
        self.start(times_s[0])  # if it joined a sequence that was already running
        self.ended_s = times_s[1]
        if batch_size > self._batch_size:
            self._batch_size = batch_size
        for name, rows in self._rows.items():
            given = outputs[name][index]
            rows[row] = copy.deepcopy(given) if is_shared else given  # callers may write to their results
        self._num_left -= 1
        if self._num_left == 0:
            self._finish()

    def fail(self, error: BaseException) -> None:
        """Set `error` as the answer; rows that arrive later are dropped."""
        with contextlib.suppress(InvalidStateError):  # it has an answer already
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
        with contextlib.suppress(InvalidStateError):  # cancelled at this moment
            self.answer.set_result(result)


def _num_characters(row: Any) -> int:
    """Characters of a text, or of the texts of a pair."""
    parts = row if isinstance(row, (tuple, list)) else (row,)
    return sum(len(part) for part in parts if isinstance(part, str))
