"""A part's texts on their way through the engine: slice by slice, as there is room, in the bulk class.

Slices are jobs of the engine like any other, so interactive jobs keep their place before them. As many are under way as
fill the engine's window, because that is what lets sequences of like length share a batch. A slice that fails is
halved until the rows that fail it stand alone.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from itertools import chain
from typing import Any

from embedq.core.batching.job import Job
from embedq.core.engine import Engine
from embedq.core.errors import EmbedqError, WorkerError
from embedq.tasks.datasets.columns import Computed
from embedq.tasks.datasets.part_task import PRIORITY
from embedq.tasks.datasets.rows import BadRow

#: Rows alone that may fail for the worker's own reasons before its part is left to another worker.
_MAX_WORKER_FAILURES = 8

#: Of the engine's window of bulk tokens, the part that is filled: the worker fetches bulk jobs of texts into the rest,
#: which would otherwise wait until there are no parts any more.
_WINDOW_SHARE = 0.75

Ask = Callable[[list[Any]], Any]


class Dropped(Exception):
    """Nobody wants the part any more: it was cancelled, or goes to another worker."""


class Feed:
    """The slices of one part. Its thread calls everything here; answers come from the engine's."""

    def __init__(self, engine: Engine, ask: Ask, computed: Computed, is_over: Callable[[], bool]) -> None:
        """`ask` makes one of the engine's calls of items; `is_over` says that nobody wants the part any more."""
        self._engine, self._ask, self._computed, self._is_over = engine, ask, computed, is_over
        self._answered: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._under_way: dict[Job, tuple[list[int], list[Any]]] = {}
        self._num_worker_failures = 0
        #: Places that have no answer, and why.
        self.failed: dict[int, BadRow] = {}
        self.num_tokens = 0
        #: Different rows answered or failed so far.
        self.num_done = 0
        self.ended_s = 0.0

    def put(self, places: list[int], items: list[Any]) -> None:
        """Send one slice, once there is room for it."""
        while self._under_way and not self._has_room():
            self._take()
        self._send(places, items)

    def finish(self) -> None:
        """Wait for all that was put."""
        while self._under_way:
            self._take()

    def drop(self) -> None:
        """Cancel what is under way."""
        for job in self._under_way:
            job.answer.cancel()

    def wake(self) -> None:
        """Let a wait end early, to ask `is_over` again; for any thread."""
        self._answered.put(None)

    def _has_room(self) -> bool:
        return self._engine.waiting_tokens(True) < _WINDOW_SHARE * self._engine.window_tokens

    def _send(self, places: list[int], items: list[Any]) -> None:
        if self._is_over():
            raise Dropped
        texts = items if isinstance(items[0], str) else chain.from_iterable(items)
        num_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        job = self._engine.submit(lambda: self._ask(items), PRIORITY, num_bytes)
        self._under_way[job] = places, items
        job.answer.add_done_callback(lambda _: self._answered.put(job))

    def _take(self) -> None:
        """One answer, waited for."""
        job = self._answered.get()
        if self._is_over():
            raise Dropped
        if job is None:
            return
        places, items = self._under_way.pop(job)
        error = job.answer.exception()
        if error is None:
            self._computed.add(places, job.answer.result())
            self.num_tokens += job.num_tokens
            self.num_done += len(places)
            self.ended_s = job.ended_s
        else:
            self._failed(places, items, error)

    def _failed(self, places: list[int], items: list[Any], error: BaseException) -> None:
        if not isinstance(error, EmbedqError) or not self._engine.is_alive:
            raise error
        if len(items) > 1:
            middle = len(items) // 2
            self._send(places[:middle], items[:middle])
            self._send(places[middle:], items[middle:])
            return
        self._num_worker_failures += isinstance(error, WorkerError)
        if self._num_worker_failures > _MAX_WORKER_FAILURES:
            raise error
        self.failed[places[0]] = BadRow(type(error).__name__, str(error)[:500])
        self.num_done += 1
