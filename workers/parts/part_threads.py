"""The threads on which a worker computes parts of datasets, and one that publishes their progress.

    two part threads   one part feeds the engine while the other is read ahead, written or committed
    beats              every two seconds: renews the claims of both, and reads whether a run was cancelled

Neither the event loop nor the answers thread ever waits for a part: one puts its message into a queue, the other gets its
answer as a future's callback.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import redis

from embedq import tasks
from embedq.core.engine import Engine
from embedq.core.errors import WorkerError
from embedq.core.guarded_thread import GuardedThread
from embedq.tasks.application import key_prefix
from embedq.tasks.datasets.manifest import Manifest
from embedq.tasks.datasets.part_task import WINDOW_PARTS, PartMessage, send_parts
from embedq.tasks.datasets.receipts import Receipt
from embedq.tasks.datasets.roots import Roots
from embedq.tasks.datasets.run_state import BEAT_S, FAILED, Record, RunState
from embedq.workers.parts.part_run import PartRun, PartsContext

log = logging.getLogger(__name__)

#: Parts that a worker holds: bounds its memory, whatever the number of parts.
NUM_PARTS = 2

#: Times that a part thread which ends unexpectedly is started again. Each time its part fails, and is tried elsewhere.
_MAX_RESTARTS = 3


class PartThreads:
    """Computes parts. Threads start with the first part."""

    def __init__(self, engine: Engine, worker: str) -> None:
        """InvalidInput if a data root of the engine's settings is no path or URL."""
        self._context = PartsContext(engine, Roots(engine.settings.data_roots), self._state_of, worker, _send_following)
        self._waiting: queue.SimpleQueue[tuple[PartRun, Callable[[], None]]] = queue.SimpleQueue()
        self._runs: set[PartRun] = set()
        self._lock = threading.Lock()
        self._is_started = False
        #: Called with the reason if a part thread ends again and again: nobody would compute what waits. The pool sets it.
        self.on_broken: Callable[[str], None] | None = None
        #: By outcome, parts and the rows in them; bytes of objects written. Written by part threads, under the lock.
        self.parts: dict[str, int] = {}
        self.rows: dict[str, int] = {"computed": 0, "failed": 0}
        self.num_bytes = 0

    @property
    def num_held(self) -> int:
        """Parts taken and not yet answered."""
        return len(self._runs)

    def room(self) -> int:
        """Parts that may be taken now."""
        return NUM_PARTS - self.num_held

    def take(self, message: dict[str, Any], job_id: str, retries_left: int, on_started: Callable[[], None]) -> PartRun:
        """Compute a part soon; returns at once. `on_started` is called on its thread when it begins.

        InvalidInput if the message is none of a part's.
        """

        def is_last_try(error: Exception) -> bool:
            return retries_left < 1 or not isinstance(error, WorkerError)

        run = PartRun(self._context, PartMessage.checked(message), job_id, is_last_try)
        with self._lock:
            self._start()
            self._runs.add(run)
        run.answer.add_done_callback(lambda answer: self._over(run, answer))
        self._waiting.put((run, on_started))
        return run

    def drop_slow(self, seconds: float) -> None:
        """Give back parts that will not be done in so many seconds: nothing of them would remain."""
        for run in self._now():
            left_s = run.left_s()
            if left_s is not None and left_s > seconds:
                run.answer.cancel()

    def _start(self) -> None:
        if self._is_started:
            return
        self._is_started = True
        for number in range(NUM_PARTS):
            GuardedThread(f"part-{number}", self._run, self.on_broken, _MAX_RESTARTS).start()
        GuardedThread("part beats", self._beat, max_restarts=None).start()

    def _run(self) -> None:
        while True:
            run, on_started = self._waiting.get()
            if run.is_over:
                continue
            with suppress(Exception):
                on_started()
            try:
                run.run()
            except BaseException as error:  # a panic of a library's Rust code, say: nobody else answers this part
                run.fail(WorkerError(f"a part failed unexpectedly with {type(error).__name__}"))
                raise
            del run, on_started  # its rows must not stay until the next part comes

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            by_run: dict[str, list[PartRun]] = {}
            for run in self._now():
                by_run.setdefault(run.message.manifest, []).append(run)
            for manifest_id, runs in by_run.items():
                try:
                    self._tell(manifest_id, runs)
                except (redis.RedisError, OSError) as error:  # soon again; the target says what is done
                    log.debug("parts not told of", extra={"action": "part_beat_failed", "error": type(error).__name__})

    def _tell(self, manifest_id: str, runs: list[PartRun]) -> None:
        with ExitStack() as told:
            for run in runs:
                told.enter_context(run.telling)
            records = {run.message.part: record for run in runs if (record := run.record())}
            is_cancelled = self._state_of(manifest_id).beat(records)
        if is_cancelled:
            for run in runs:
                run.cancel_run()

    def _over(self, run: PartRun, answer: Any) -> None:
        with self._lock:
            self._runs.discard(run)
            outcome, receipt = "dropped", None
            if not answer.cancelled():
                outcome = "failed" if answer.exception() else answer.result().outcome
                receipt = None if answer.exception() else answer.result()
            self.parts[outcome] = self.parts.get(outcome, 0) + 1
            if isinstance(receipt, Receipt) and receipt.sha256:  # written here
                self.rows["computed"] += receipt.rows - receipt.failed
                self.rows["failed"] += receipt.failed
                self.num_bytes += receipt.bytes
        self._context.engine.backlog.on_room()  # the event loop may fetch another part

    def _now(self) -> list[PartRun]:
        with self._lock:
            return list(self._runs)

    @staticmethod
    def _state_of(manifest_id: str) -> RunState:
        return RunState(tasks.app.backend.client, key_prefix(tasks.app), manifest_id)


def telling_runs(store: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`store`, which stores the failure of a job that killed its workers; a part's run is told of it as well."""

    def told(message: Any, error: Any) -> None:
        store(message, error)
        task = str(message.headers.get("task", ""))
        if not task.endswith("_part"):
            return
        with suppress(Exception):  # a message of anybody's; the failure is stored
            part = PartMessage.checked(message.payload[1])
            record = Record(FAILED, message.headers["id"], error=f"{type(error).__name__}: {error}")
            RunState(tasks.app.backend.client, key_prefix(tasks.app), part.manifest).release(part.part, record)

    return told


def _send_following(manifest: Manifest, message: PartMessage, state: RunState) -> None:
    """Queue the part that follows this one at the window's distance, unless it was."""
    number = message.part + WINDOW_PARTS
    if number >= len(manifest.parts) or not state.unsent([number]):
        return
    state.mark_sent(send_parts(manifest, message.target, [manifest.parts[number]], message.round))
