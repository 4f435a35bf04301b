"""Result backend of a worker: the results of a batch of jobs in one write.

    with app.backend.batch():      # on the thread that runs Celery's tracers
        for job in finished: trace(job)
    ...                            # every result is in Redis now: acknowledge

Input: what Celery's tracer stores for each job. Output: Celery's own blobs at their own keys, each published on the
channel of the same name, so that stock producers read them. Knows nothing of the pool, of queues or of models.

A stored SUCCESS is final, so that a job which ran twice has one result (see `workers/jobs/result_writer.py`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from typing import Any

from celery import Celery, Task, states
from celery.app.task import Context
from kombu.exceptions import EncodeError

from embedq.core.errors import InvalidSettings, JobTooLarge, ServerUnavailable
from embedq.tasks.result_backend import SentinelResultBackend
from embedq.workers.celery_private import StoringBackend, running_again, running_job
from embedq.workers.jobs.json_senders import in_json, wants_json
from embedq.workers.jobs.result_writer import UnwrittenResults

log = logging.getLogger(__name__)

#: Bytes of results held back within a batch; more are written before the batch ends.
_MAX_HELD_BYTES = 64 * 1024 * 1024

#: Bytes of one result. The server takes no string above 512 MiB and closes the connection on which
#: one arrives, with its neighbours; half of that leaves room for its own copy.
MAX_RESULT_BYTES = 256 * 1024 * 1024

#: Seconds for which results are kept and retried while the server cannot be written to: longer than
#: a restart that loads a large append-only file, or a failover.
MAX_OUTAGE_S = 300.0

#: The same for a result stored outside a batch, on a thread that must go on serving events.
_MAX_SINGLE_OUTAGE_S = 5.0


class ResultTooLarge(EncodeError, JobTooLarge):
    """A subclass of both, so that Celery's tracer makes a failure of it; producers get `JobTooLarge`."""


class BatchBackend(StoringBackend):
    """Holds results back within `batch()`. Celery makes one for each thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.compression or self.thread_safe:
            raise InvalidSettings(
                "result_compression and result_backend_thread_safe must be off: workers store results in batches"
            )
        self._held = UnwrittenResults(self.client)
        #: Chord parts that follow the results, each with the job in which it was returned.
        self._parts: deque[tuple[tuple[Task, Context] | None, Callable[[], None]]] = deque()
        self._is_batch = False
        self._max_outage_s = _MAX_SINGLE_OUTAGE_S
        self._is_extended = bool(self.app.conf.find_value_for_key("extended", "result"))
        self._timezone = self.app.timezone

    @contextmanager
    def batch(self, max_outage_s: float = MAX_OUTAGE_S) -> Iterator[None]:
        """Hold results back until the end of the block; then store them, also after an exception.

        Whatever reads a result within the block finds it stored. At the end the results are stored first,
        then the chord parts are returned. ServerUnavailable if the server could not be written to for
        `max_outage_s`: no job of the block may be acknowledged then, and all of them run again.
        """
        assert not self._is_batch, "batches do not nest"
        self._is_batch, self._max_outage_s = True, max_outage_s
        try:
            try:
                yield
            finally:
                self.flush()
        finally:
            self._is_batch, self._max_outage_s = False, _MAX_SINGLE_OUTAGE_S
            self._held.clear()
            self._parts.clear()

    def flush(self) -> None:
        """Store all held results, then return the chord parts. ServerUnavailable as in `batch`."""
        self._write_held()
        while self._parts:
            job, part = self._parts.popleft()
            with running_again(*job) if job else nullcontext():
                self._return_part(part)
            self._write_held()  # a chord that fails stores results of its own

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Context | None = None, **_: Any
    ) -> Any:
        """Hold a result back, or store it at once outside a batch. Returns it in its plain form."""
        result = self.encode_result(result, state)
        meta = self.map_of(result, state, traceback, request)
        meta["task_id"] = task_id
        blob = in_json(meta) if wants_json(request) else self.encode(meta)
        if len(blob) > MAX_RESULT_BYTES:
            raise ResultTooLarge(
                f"a result may have {MAX_RESULT_BYTES:,} bytes; this one has {len(blob):,}. "
                "Send fewer texts per job, or ask for fewer outputs or dimensions."
            )
        lives_s = self.failure_expires if state == states.FAILURE else self.expires
        self._held.add(self.get_key_for_task(task_id), lives_s or 0, blob)
        if not self._is_batch:
            self._write_single()
        elif self._held.num_bytes > _MAX_HELD_BYTES:
            self._write_early()
        return result

    def on_chord_part_return(self, request: Context, state: str, result: Any, *rest: Any, **options: Any) -> None:
        """Return a chord part once the results of the batch are stored; outside a batch at once."""
        part = partial(super().on_chord_part_return, request, state, result, *rest, **options)
        if not self._is_batch:
            part()
            return
        self._parts.append((running_job(), part))

    def get(self, key: bytes) -> Any:
        """Read a key, after a result held for it is stored."""
        self._write_if_held([key])
        return super().get(key)

    def mget(self, keys: list[bytes]) -> Any:
        """Read keys, after the results held for them are stored."""
        self._write_if_held(keys)
        return super().mget(keys)

    def delete(self, key: bytes) -> None:
        """Delete a key, after a result held for it is stored: it must not come back."""
        self._write_if_held([key])
        super().delete(key)

    def prepare_exception(self, exc: BaseException, serializer: str | None = None) -> Any:
        """Make an error storable; for a result that is too large, of the class that producers know."""
        return super().prepare_exception(JobTooLarge(str(exc)) if isinstance(exc, ResultTooLarge) else exc, serializer)

    def before_errbacks(self) -> None:
        """Store what is held back: an errback is a job that gets the failed job's id and may read its result."""
        self._write_held()

    def result_map(
        self, make: Callable[[], dict[str, Any]], result: Any, state: str, traceback: Any, request: Context | None
    ) -> dict[str, Any]:
        """The map that is stored for a job: Celery's, at less cost, and the fingerprint of its call."""
        call = getattr(request, "embedq_call", None)
        known = {"call": call} if call else {}
        if self._is_extended:
            return {**make(), **known}
        # The same fields in the same order; Celery's looks up a setting and converts the time, which
        # takes as long as all else that a result costs.
        meta = {
            "status": state,
            "result": result,
            "traceback": traceback,
            "children": self.current_task_children(request),
            "date_done": datetime.now(self._timezone).isoformat() if state in states.READY_STATES else None,
            **known,
        }
        if request and getattr(request, "group", None):
            meta["group_id"] = request.group
        if request and getattr(request, "parent_id", None):
            meta["parent_id"] = request.parent_id
        return meta

    def _write_if_held(self, keys: list[bytes]) -> None:
        if any(key in self._held for key in keys):
            self._write_held()

    def _write_held(self) -> None:
        try:
            self._held.retry(self._held.write, self._max_outage_s)
        except ServerUnavailable:
            self._max_outage_s = 0.0  # it has waited long enough: the rest of the batch is tried once
            raise

    def _return_part(self, part: Callable[[], None]) -> None:
        try:
            self._held.retry(part, self._max_outage_s)
        except ServerUnavailable:
            raise
        except Exception:  # one broken chord must not keep the jobs of the batch from being acknowledged
            log.exception(
                "a part of a chord cannot be returned; the chord will not complete", extra={"action": "chord_part_lost"}
            )

    def _write_early(self) -> None:
        """Bound the memory of a batch. A failure is left to the end of the batch: the tracer cannot use it."""
        if self._max_outage_s:
            with suppress(ServerUnavailable):
                self._write_held()

    def _write_single(self) -> None:
        try:
            self._write_held()
        finally:
            self._held.clear()
            self._max_outage_s = _MAX_SINGLE_OUTAGE_S


class SentinelBatchBackend(BatchBackend, SentinelResultBackend):
    """Results on the server that Sentinel names."""


def use_batches(app: Celery) -> None:
    """Make `app` store results through these classes, in this process alone.

    To be called before anything asks for `app.backend`.
    """
    app.loader.override_backends = {
        **app.conf.override_backends,
        **dict.fromkeys(("redis", "rediss"), f"{__name__}:BatchBackend"),
        "sentinel": f"{__name__}:SentinelBatchBackend",
    }
