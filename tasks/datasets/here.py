"""Embeds a dataset from this machine: it reads and writes the files, and texts travel through the queue as jobs.

For workers that cannot reach the files. Same formats, same target, same resuming: a target begun so can be finished by
workers that can, and the other way round. Costs the server what texts and vectors weigh, one window of jobs at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from embedq.core.errors import InvalidInput, JobTooLarge, ProducerError
from embedq.tasks.calls import embed
from embedq.tasks.datasets.gathered import Gathered
from embedq.tasks.datasets.manifest import CANCELLED, Manifest, Part
from embedq.tasks.datasets.objects import commit, computed_for
from embedq.tasks.datasets.part_task import PRIORITY
from embedq.tasks.datasets.planning import Question, plan, write
from embedq.tasks.datasets.receipts import WRITTEN, Receipt
from embedq.tasks.datasets.rows import BadRow, rows_of
from embedq.tasks.datasets.schemas import schema_from_text
from embedq.tasks.datasets.sources import check_unchanged
from embedq.tasks.datasets.status import done_parts
from embedq.tasks.datasets.stores import Store, locate

if TYPE_CHECKING:
    from celery.result import AsyncResult

#: Jobs sent ahead of the answers, so that every worker is busy and the queue stays short for others.
_MAX_JOBS_AHEAD = 32

#: Seconds without an answer after which it gives up.
_TIMEOUT_S = 600.0

#: Told how many rows of how many are done, and how many in a second.
Tell = Callable[[int, int, float], None]


def embed_here(asked: Question, tell: Tell, is_adding: bool = False) -> Manifest:
    """Compute every part that is not done, one after another; returns the manifest.

    Errors as `tasks.datasets.embed` has them; TimeoutError if no worker answers for ten minutes.
    """
    if asked.kind != "embed":
        raise InvalidInput("pairs are scored by `embedq dataset rerank`, whose workers read the files")
    manifest, old = plan(asked, is_adding)
    store = Store(locate(asked.target))
    if old is None:
        store.check()
    manifest = write(manifest, old, store)
    store.remove(CANCELLED)
    begun_s, done = time.monotonic(), done_parts(manifest, store)
    num_before = num_rows = sum(part.num_rows for part in manifest.parts if part.number in done)
    for part in manifest.parts:
        if part.number not in done:
            _compute(manifest, store, part)
            num_rows += part.num_rows
            tell(num_rows, manifest.num_rows, (num_rows - num_before) / (time.monotonic() - begun_s))
    return manifest


def _compute(manifest: Manifest, store: Store, part: Part) -> Receipt:
    begun_s, source = time.monotonic(), manifest.inputs[part.input]
    check_unchanged(source)
    typed = schema_from_text(manifest.schema)
    dimensions = int(manifest.model.get("dimensions") or 0)
    gathered = Gathered(manifest, computed_for(manifest, part.num_rows, dimensions), typed)
    jobs = _Jobs(manifest, gathered)
    for rows in rows_of(source, part.within, manifest.columns, typed):
        for places, texts in gathered.take(rows, None):
            jobs.send(places, texts)
    for places, texts in gathered.rest():
        jobs.send(places, texts)
    jobs.finish()
    check_unchanged(source)
    gathered.fail(jobs.failed)
    seconds = round(time.monotonic() - begun_s, 3)
    receipt = Receipt(
        WRITTEN, manifest.id, part.number, part.num_rows, len(gathered.failed), jobs.num_tokens, seconds=seconds,
        what=gathered.computed.what,
    )  # fmt: skip
    return commit(store, manifest, gathered, receipt)


class _Jobs:
    """A part's jobs on their way, at most so many ahead of the answers."""

    def __init__(self, manifest: Manifest, gathered: Gathered) -> None:
        self._options = {**manifest.options, "model": manifest.model["alias"], "timings": True}
        self._gathered = gathered
        self._under_way: deque[tuple[list[int], list[Any], AsyncResult]] = deque()
        self.failed: dict[int, BadRow] = {}
        self.num_tokens = 0

    def send(self, places: list[int], texts: list[Any]) -> None:
        """Send one job; some of those before it are answered first if there are many."""
        while len(self._under_way) >= _MAX_JOBS_AHEAD:
            self._take()
        self._send(places, texts)

    def finish(self) -> None:
        """Wait for all that was sent."""
        while self._under_way:
            self._take()

    def _send(self, places: list[int], texts: list[Any]) -> None:
        try:
            job = embed.apply_async((texts,), self._options, priority=PRIORITY)
        except JobTooLarge as error:
            self._failed(places, texts, error)
        else:
            self._under_way.append((places, texts, job))

    def _take(self) -> None:
        places, texts, job = self._under_way.popleft()
        try:
            answer = job.get(timeout=_TIMEOUT_S)
        except ProducerError as error:
            self._failed(places, texts, error)
        else:
            self._gathered.computed.add(places, answer)
            self.num_tokens += answer.timings.num_tokens if answer.timings else 0
        finally:
            job.forget()

    def _failed(self, places: list[int], texts: list[Any], error: ProducerError) -> None:
        """Halve a job that fails, until the rows that fail it stand alone."""
        if len(texts) == 1:
            self.failed[places[0]] = BadRow(type(error).__name__, str(error)[:500])
            return
        middle = len(texts) // 2
        self._send(places[:middle], texts[:middle])
        self._send(places[middle:], texts[middle:])
