"""The engine: turns jobs into batches, runs them through the models, and turns rows back into results.

    embed, rerank, score
        →  CallBuilder: checks the arguments
        →  EncodeThreads: encode texts into token ids, ahead of the device
        →  Backlog, Scheduler: hold the waiting sequences, choose the next batch
        →  DeviceLoop: runs batches through the models
        →  CompletionThread: delivers rows to jobs, sets their answers

Any number of threads and event loops may call at once; their jobs then share batches.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, cast

import numpy as np

from embedq.core.batching.backlog import Backlog
from embedq.core.batching.batch_stats import Meter
from embedq.core.batching.completion_thread import CompletionThread
from embedq.core.batching.cpu_streams import Cores, num_streams
from embedq.core.batching.device_loop import DeviceLoop
from embedq.core.batching.encode_threads import EncodeThreads
from embedq.core.batching.job import MAX_INTERACTIVE_PRIORITY, Call, Job
from embedq.core.batching.scheduler import Limits, Scheduler
from embedq.core.batching.warm_up import warm_up
from embedq.core.calls import CallBuilder, Pairs
from embedq.core.errors import DeviceFailure, InvalidSettings
from embedq.core.models import Model
from embedq.core.results import Embeddings, Ranking
from embedq.core.settings import Settings

#: Default token budgets of a batch; see `Settings.max_batch_tokens`. Where several passes run at once, half the tokens
#: are as fast, and an interactive job waits half as long.
_CPU_BATCH_TOKENS = 2_048
_CPU_STREAM_BATCH_TOKENS = 1_024
_ACCELERATOR_BATCH_TOKENS = 16_384

#: Two threads even on a small machine, so that an interactive job need not wait for a slice of a large one; more than
#: four are no faster, because the tokenizer has threads of its own.
_MIN_ENCODE_THREADS, _MAX_ENCODE_THREADS = 2, 4


class Engine:
    """Runs models on one device for any number of callers. Thread-safe. A context manager."""

    def __init__(
        self, models: Mapping[str, Model], settings: Settings, on_dead: Callable[[str], None] | None = None
    ) -> None:
        self.models = dict(models)
        self.settings = settings
        self.calls = CallBuilder(self.models, settings)
        #: Called with the reason when the device hangs or fails every pass, before the waiting jobs fail with it. A
        #: worker ends its process here, so that its jobs are redelivered to another.
        self.on_dead = on_dead
        count = num_streams(settings.cpu_streams, {model.device for model in self.models.values()})
        limits = {alias: _limits(model, settings, count) for alias, model in self.models.items()}
        scheduler = Scheduler(limits, settings.max_batch_s, settings.max_bulk_wait_s)
        self.backlog = Backlog(scheduler, settings.max_waiting_tokens)
        self._pid = os.getpid()
        self._loops: list[DeviceLoop] = []
        self._completion = CompletionThread(self._broken)
        num_threads = _num_encode_threads(settings)
        self.encoding = EncodeThreads(self.backlog, num_threads, settings.max_bulk_wait_s, self._broken)
        self.meter = Meter(self.models)
        shared = self.models, self.backlog, self._completion, Cores(count), self.meter
        self._loops = [DeviceLoop(*shared, settings.hang_timeout_s, self._die) for _ in range(count)]
        self._started_s = time.monotonic()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def embed(self, texts: list[str], *, priority: int = 0, **given: Any) -> Embeddings:
        """Embed `texts`; options as in `core.options.EmbedOptions`.

        `Embeddings.dense` is (num_texts, dim) in the order of the texts. Blocks until they are computed. InvalidInput
        or UnknownModel for a wrong call; DeviceFailure if the pass failed.
        """
        return cast(Embeddings, self._answer(self.calls.embed(texts, **given), priority))

    def rerank(self, query: str, passages: list[str], *, priority: int = 0, **given: Any) -> Ranking:
        """Score each passage against `query`; options as in `core.options.RerankOptions`."""
        return cast(Ranking, self._answer(self.calls.rerank(query, passages, **given), priority))

    def score(self, pairs: Pairs, *, priority: int = 0, **given: Any) -> np.ndarray:
        """Score (query, passage) pairs: (num_pairs,) float32, or (num_layers, num_pairs) for several layers."""
        return cast(np.ndarray, self._answer(self.calls.score(pairs, **given), priority))

    async def aembed(self, texts: list[str], *, priority: int = 0, **given: Any) -> Embeddings:
        """Like `embed`, without blocking the event loop; cancelling the wait cancels the job."""
        return cast(Embeddings, await self._await(self.calls.embed(texts, **given), priority))

    async def arerank(self, query: str, passages: list[str], *, priority: int = 0, **given: Any) -> Ranking:
        """Like `rerank`, without blocking the event loop; cancelling the wait cancels the job."""
        return cast(Ranking, await self._await(self.calls.rerank(query, passages, **given), priority))

    async def ascore(self, pairs: Pairs, *, priority: int = 0, **given: Any) -> np.ndarray:
        """Like `score`, without blocking the event loop; cancelling the wait cancels the job."""
        return cast(np.ndarray, await self._await(self.calls.score(pairs, **given), priority))

    def submit(
        self,
        open_call: Callable[[], Call],
        priority: int = 0,
        num_bytes: int = 0,
        on_started: Callable[[], None] | None = None,
        origin: Any = None,
    ) -> Job:
        """Accept a job and return at once; `Job.answer` is the future of its result, and may be cancelled.

        `open_call` runs on an encode thread and returns a call built by `calls`; an exception it raises becomes the
        answer. `num_bytes` is the size of its texts, 0 if unknown. `on_started` is called on the completion thread once
        the job's first rows are in a batch; `origin` is kept as `Job.origin`. DeviceFailure once the engine is closed
        or its device is given up, and in a process forked from the one that made the engine.
        """
        job = Job(open_call, priority > MAX_INTERACTIVE_PRIORITY, num_bytes, on_started, origin)
        self._refuse_forks()
        # Weak, because a job holds its answer: a cycle would keep its rows until a garbage collection.
        reference = weakref.ref(job)
        job.answer.add_done_callback(lambda answer: self._withdraw(reference()) if answer.cancelled() else None)
        self.encoding.submit(job)
        return job

    def warm_up(self) -> None:
        """Run every model once, so that the first job does not pay for first use, and fit budgets to free memory."""
        budgets = {alias: self.backlog.max_tokens(alias) for alias in self.models}
        for alias, max_tokens in warm_up(self.models, budgets, self.settings.max_batch_sequences).items():
            self.backlog.lower_budget(alias, max_tokens)

    def waiting_tokens(self, is_bulk: bool) -> int:
        """Tokens of one class that wait for a batch; those not encoded yet are estimated."""
        return self.backlog.num_tokens(is_bulk) + self.encoding.num_tokens(is_bulk)

    def waiting_by_model(self) -> dict[str, int]:
        """Waiting tokens of both classes by model.

        Those not encoded yet are divided in proportion to the others, or evenly.
        """
        encoded = {alias: self.backlog.num_tokens_of(alias) for alias in self.models}
        num_encoded = sum(encoded.values())
        num_others = self.encoding.num_tokens(False) + self.encoding.num_tokens(True)
        return {
            alias: tokens + int(num_others * (tokens / num_encoded if num_encoded else 1 / len(encoded)))
            for alias, tokens in encoded.items()
        }

    @property
    def window_tokens(self) -> int:
        """Tokens of each class that may wait before a worker stops fetching."""
        return self.settings.window_batches * self.backlog.largest_budget

    @property
    def is_alive(self) -> bool:
        """True while the engine can compute: the device is not given up, no pass hangs, and all threads are there."""
        return (
            self.backlog.dead is None
            and not any(loop.watchdog.is_hung for loop in self._loops)
            and self.encoding.is_alive
            and self._completion.is_alive
            and self._pid == os.getpid()
        )

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and seconds in which a batch was on the device (mean over the streams)."""
        totals = self.backlog.totals
        return {
            "batches": totals.num_batches,
            "sequences": totals.num_sequences,
            "tokens": totals.num_tokens,
            "padded_tokens": totals.num_padded_tokens,
            "budget_tokens": totals.num_budget_tokens,
            "compute_s": round(sum(loop.compute_s for loop in self._loops) / len(self._loops), 4),
            "streams": len(self._loops),
            "wall_s": round(time.monotonic() - self._started_s, 4),
            "max_batch_tokens": {alias: self.backlog.max_tokens(alias) for alias in self.models},
            "waiting_tokens": {"interactive": self.waiting_tokens(False), "bulk": self.waiting_tokens(True)},
        }

    def close(self) -> None:
        """Finish the waiting jobs, then end all threads. Later calls raise DeviceFailure. In a fork: do nothing."""
        if self._pid != os.getpid():
            return  # the threads are the parent's, and go on there
        self.encoding.close()
        self.backlog.close()
        for loop in self._loops:
            loop.join()
        self._completion.close()

    def _answer(self, call: Call, priority: int) -> Any:
        job = self.submit(lambda: call, priority)
        try:
            return job.answer.result()
        except BaseException:  # also Ctrl-C: nobody waits for the job any more
            job.answer.cancel()
            raise

    async def _await(self, call: Call, priority: int) -> Any:
        return await asyncio.wrap_future(self.submit(lambda: call, priority).answer)

    def _withdraw(self, job: Job | None) -> None:
        if job:
            self.encoding.withdraw(job)
            self.backlog.withdraw(job)

    def _refuse_forks(self) -> None:
        """DeviceFailure in a forked process: threads are not forked, and every call would wait for ever.

        They are not started anew, either: torch's own threads and a driver's state do not outlive a fork, and locks
        may have been held by threads that are gone.
        """
        if self._pid != os.getpid():
            raise DeviceFailure(
                f"this engine was made by process {self._pid} and is used in a fork of it, process {os.getpid()}, where "
                "its threads do not exist. Load the model after the fork: with gunicorn without --preload or in "
                "post_fork, with uWSGI in lazy-apps mode, with multiprocessing in the child or by the start method spawn"
            )

    def _broken(self, reason: str) -> None:
        """A thread without which no job gets an answer ended unexpectedly: give up, as on a broken device."""
        for loop in self._loops:
            loop.give_up(reason)
        if not self._loops:
            self._die(DeviceFailure(reason))

    def _die(self, failure: DeviceFailure) -> None:
        try:
            if self.on_dead:
                self.on_dead(str(failure))
        finally:
            self.backlog.fail_all(failure)
            self.encoding.fail_all(failure)


def _limits(model: Model, settings: Settings, num_streams: int) -> Limits:
    """The limits of a model's batches: as set, else by device. A sequence longer than the default runs alone."""
    is_cpu = model.device == "cpu"
    max_tokens, longest = settings.max_batch_tokens, model.spec.max_length
    if max_tokens is None:
        on_cpu = _CPU_BATCH_TOKENS if num_streams == 1 else _CPU_STREAM_BATCH_TOKENS
        max_tokens = on_cpu if is_cpu else _ACCELERATOR_BATCH_TOKENS
    elif max_tokens < longest:
        raise InvalidSettings(
            f"max_batch_tokens is {max_tokens} and a sequence may have {longest} tokens; "
            f"raise EMBEDQ_MAX_BATCH_TOKENS to {longest}, or lower the model's max_length"
        )
    # A CPU's attention computes sequences of like length together even where nothing is padded: batches by age alone
    # were 2 to 5 % slower.
    how = {"is_padded": model.is_padded, "has_like_lengths": is_cpu}
    return Limits(max_tokens, settings.max_batch_sequences, 64 if is_cpu else 2_048, **how)


def _num_encode_threads(settings: Settings) -> int:
    spare = (os.cpu_count() or 1) // 2
    return settings.encode_threads or max(_MIN_ENCODE_THREADS, min(spare, _MAX_ENCODE_THREADS))
