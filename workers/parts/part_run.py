"""Computes one part: looks it up in its manifest, reads its rows, writes its object once, answers with a receipt.

    the target's object is there   nothing to do: its receipt is the answer
    the run was cancelled          nothing is written
    another job computes the part  this message is a second one of the same part, and is dropped
    else                           read, compute, write the list of failed rows, commit the object

Runs on a part thread. The pool treats it like one of the engine's jobs.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import redis
from kombu.exceptions import BatchPublishError, OperationalError

from embedq.core.engine import Engine
from embedq.core.errors import BadSource, InvalidInput, ProducerError, StoreFailed, WorkerError
from embedq.core.models import Model
from embedq.tasks.datasets.gathered import Gathered
from embedq.tasks.datasets.manifest import CANCELLED as CANCELLED_MARK
from embedq.tasks.datasets.manifest import MANIFEST, Manifest, Part, read_manifest
from embedq.tasks.datasets.objects import Hashing, commit, computed_for, found_receipt, list_failed, write_table
from embedq.tasks.datasets.part_task import ALL, PartMessage
from embedq.tasks.datasets.receipts import CANCELLED, DUPLICATE, FOUND, REWRITTEN, SUPERSEDED, WRITTEN, Receipt
from embedq.tasks.datasets.roots import Roots
from embedq.tasks.datasets.rows import rows_of
from embedq.tasks.datasets.run_state import DONE, FAILED, RUNNING, Record, RunState
from embedq.tasks.datasets.schemas import schema_from_text
from embedq.tasks.datasets.sources import check_unchanged
from embedq.tasks.datasets.stores import TEMPORARY, Location, Store
from embedq.workers.parts.part_feed import Dropped, Feed

log = logging.getLogger(__name__)

#: Errors of a queue's server that does not answer.
_SERVER_ERRORS = (redis.RedisError, OperationalError, BatchPublishError, OSError)


@dataclass(frozen=True, slots=True)
class Call:
    """The model of a part, where the pool looks for a job's."""

    model: Model


@dataclass
class PartsContext:
    """State that the parts of one worker share."""

    engine: Engine
    roots: Roots
    #: The run's keys, by the manifest's id.
    state_of: Callable[[str], RunState]
    #: Name of this worker in records.
    worker: str
    #: Queues the job that follows a part, of a run too long to be queued at once.
    send_following: Callable[[Manifest, PartMessage, RunState], None]
    #: One part at a time feeds the engine; the other reads ahead, writes, or waits: parts in step would all be read at
    #: once and all be written at once, and the device would idle meanwhile.
    feeding: threading.Lock = field(default_factory=threading.Lock)


class PartRun:
    """One part's job, from the message to its receipt."""

    def __init__(
        self, context: PartsContext, message: PartMessage, job_id: str, is_last_try: Callable[[Exception], bool]
    ) -> None:
        """`is_last_try` says whether an error is the job's answer, or it is tried again."""
        self.answer: Future[Receipt] = Future()
        self.message = message
        self.context = context
        self.state = context.state_of(message.manifest)
        #: As the engine's jobs have them; see `core.batching.job`.
        self.submitted_s, self.started_s = time.monotonic(), 0.0
        self.encoded_s = 0.0
        self.sequences: list[Any] = []
        self.call: Call | None = None
        self.feed: Feed | None = None
        self.is_cancelled = False
        self._job_id, self._is_last_try = job_id, is_last_try
        self._began_s = 0.0
        #: To be computed.
        self._num_rows = 0
        self._has_claim = False
        #: Held while its record is written: the last record must be the final one.
        self.telling = threading.Lock()
        self.answer.add_done_callback(lambda _: self._wake())

    @property
    def is_over(self) -> bool:
        """Returns True once it has its answer, or nobody wants one any more."""
        return self.answer.done()

    @property
    def is_opened(self) -> bool:
        return self.call is not None

    @property
    def num_tokens(self) -> int:
        return self.feed.num_tokens if self.feed else 0

    @property
    def ended_s(self) -> float:
        return self.feed.ended_s if self.feed else 0.0

    @property
    def waited_s(self) -> float:
        return max(0.0, self.started_s - self.submitted_s)

    @property
    def computed_s(self) -> float:
        return max(0.0, self.ended_s - self.started_s)

    @property
    def progress(self) -> tuple[int, int]:
        """Rows that are computed, and all that are to be; (0, 0) before they are read."""
        return (self.feed.num_done if self.feed else 0), self._num_rows

    def left_s(self) -> float | None:
        """Seconds until all rows are computed, at the speed so far, equal texts counted apart; None before a row is."""
        done = self.feed.num_done if self.feed else 0
        if not done or not self.started_s:
            return None
        return (time.monotonic() - self.started_s) / done * max(0, self._num_rows - done)

    def record(self) -> Record | None:
        """The record to write while it runs; None if it does not."""
        if not self._has_claim or self.is_over:
            return None
        rows = self.feed.num_done if self.feed else 0
        now_s = self.state.now_s()
        return Record(RUNNING, self._job_id, self.context.worker, self._began_s, now_s, rows, 0, self.num_tokens)

    def cancel_run(self) -> None:
        """Stop, because the whole run was cancelled. Any thread may call it."""
        self.is_cancelled = True
        self._wake()

    def run(self) -> None:
        """Compute the part. Errors become the answer; what is no Exception is raised, and the caller answers with `fail`."""
        self.started_s = time.monotonic()
        try:
            receipt = self._receipt()
        except Dropped:
            receipt = self._nothing(CANCELLED)
            self._let_go(None)
        except Exception as error:
            self.fail(error)
            return
        with suppress(InvalidStateError):  # nobody waits for it any more
            self.answer.set_result(receipt)

    # -- deciding -----------------------------------------------------------------------------------------------------

    def _receipt(self) -> Receipt:
        message = self.message
        location = self.context.roots.check(message.target)
        self._check_links(location, MANIFEST, TEMPORARY)
        store = Store(location)
        manifest = _manifest(location, message.manifest, message.edition)
        part = _part_of(manifest, message)
        names = manifest.name(part.number), manifest.failed_name(part.number)
        self._check_links(location, *names)
        record, why_not = self._look(store)
        if why_not:
            return self._nothing(why_not)
        is_followed = message.mode != ALL or self._send_following(manifest)
        receipt = self._receipt_of(store, manifest, part, record)
        if not is_followed and not self._send_following(manifest):
            raise WorkerError("the queue's server does not answer, and the part that follows this one is not queued")
        return receipt

    def _check_links(self, location: Location, *names: str) -> None:
        """InvalidInput if one of a target's objects is a link, or lies in one, that leads out of the roots."""
        for name in names:
            self.context.roots.check(f"{location}/{name}")

    def _send_following(self, manifest: Manifest) -> bool:
        """Queue the part that follows this one; returns False if the server does not answer."""
        try:
            self.context.send_following(manifest, self.message, self.state)
        except _SERVER_ERRORS:
            return False
        return True

    def _receipt_of(self, store: Store, manifest: Manifest, part: Part, record: Record | None) -> Receipt:
        message, name = self.message, manifest.name(part.number)
        if message.mode == ALL and (entry := store.entry(name)):
            receipt = replace(found_receipt(store, name), outcome=FOUND, bytes=entry.size)
            for written in (name, manifest.failed_name(part.number)):
                store.tidy(written)  # its worker may have died right after it wrote
            self._told_done(receipt, record)
            return receipt
        if self._is_taken():
            return self._nothing(DUPLICATE)
        receipt = self._made(store, manifest, part) if message.mode == ALL else self._mended(store, manifest, part)
        self._let_go(self._done(receipt))
        return receipt

    def _look(self, store: Store) -> tuple[Record | None, str]:
        """The part's record, and an outcome if the part must not be computed."""
        try:
            known, record = self.state.known(), self.state.record(self.message.part)
        except (redis.RedisError, OSError):  # it says nothing that the target does not
            return None, CANCELLED if store.entry(CANCELLED_MARK) else ""
        if "cancelled" in known or (not known and store.entry(CANCELLED_MARK)):
            return record, CANCELLED
        is_redelivered = record is not None and record.job == self._job_id
        is_old = self.message.round < int(known.get("round", 0))
        return record, SUPERSEDED if is_old and not is_redelivered else ""

    def _is_taken(self) -> bool:
        try:
            taken = self.state.claim(self.message.part, self._job_id)
            self._began_s = self.state.now_s()
        except (redis.RedisError, OSError):  # computed twice at worst: the target takes one
            return False
        if taken is None:
            self._has_claim = True
            with suppress(redis.RedisError, OSError):
                if record := self.record():
                    self.state.beat({self.message.part: record})
        return taken is not None

    # -- computing ----------------------------------------------------------------------------------------------------

    def _made(self, store: Store, manifest: Manifest, part: Part) -> Receipt:
        gathered = self._computed(manifest, part, wanted=None)
        receipt = self._new_receipt(manifest, part, gathered)
        if self._is_dropped():
            raise Dropped
        return commit(store, manifest, gathered, receipt)

    def _mended(self, store: Store, manifest: Manifest, part: Part) -> Receipt:
        """Compute the rows that failed, and write the part anew with their answers."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        name, listed = manifest.name(part.number), store.read(manifest.failed_name(part.number))
        old = found_receipt(store, name)
        if not listed:
            return replace(old, outcome=FOUND)
        wanted = failed_rows(listed)
        gathered = self._computed(manifest, part, wanted=wanted)
        with store.open(name) as file:
            table = pq.read_table(file)
        places = gathered.places()
        fresh = gathered.computed.columns(places)
        index = np.arange(table.num_rows)
        rows = np.array(sorted(wanted)) - part.first_row
        mended = places >= 0
        index[rows[mended]] = table.num_rows + np.flatnonzero(mended)
        for column, values in fresh.items():
            both = pa.chunked_array([*table[column].chunks, values.cast(table[column].type)])
            at = table.column_names.index(column)
            table = table.set_column(at, column, pc.take(both, pa.array(index)))
        receipt = self._new_receipt(manifest, part, gathered)
        receipt = replace(receipt, rows=old.rows, tokens=old.tokens + receipt.tokens, what=old.what, outcome=REWRITTEN)
        hashing: list[Hashing] = []
        write = write_table(table, list(manifest.columns.keep), receipt)
        if self._is_dropped():
            raise Dropped
        # First the part: a list that names rows which have vectors by now costs a second look, and loses nothing.
        store.replace(name, lambda file: hashing.append(write(file)))
        list_failed(store, manifest, part.number, gathered.failed)
        return replace(receipt, bytes=hashing[0].num_bytes, sha256=hashing[0].sha256)

    def _computed(self, manifest: Manifest, part: Part, wanted: set[int] | None) -> Gathered:
        """Read the part and compute its rows, or those `wanted`."""
        context, source = self.context, manifest.inputs[part.input]
        model = self._model(manifest)
        # Opened by the path that was checked: what a link leads to may be another file in the next moment.
        source = replace(source, path=str(context.roots.check(source.path)))
        check_unchanged(source)
        typed = schema_from_text(manifest.schema)
        num_rows = part.num_rows if wanted is None else len(wanted)
        gathered = Gathered(manifest, computed_for(manifest, num_rows, model.spec.dimensions), typed)
        self._num_rows = num_rows
        self.feed = Feed(context.engine, _asking(context.engine, manifest), gathered.computed, self._is_dropped)
        self.call = Call(model)
        rows = rows_of(source, part.within, manifest.columns, typed)
        try:
            first = next(rows, None)  # read before it is this part's turn to feed
            with self._turn():
                for read in chain(() if first is None else (first,), rows):
                    for places, items in gathered.take(read, wanted):
                        self.feed.put(places, items)
                for places, items in gathered.rest():
                    self.feed.put(places, items)
            self.feed.finish()
        except BaseException:
            self.feed.drop()
            raise
        check_unchanged(source)
        gathered.fail(self.feed.failed)
        return gathered

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the right to feed the engine, waited for as long as the part is wanted."""
        while not self.context.feeding.acquire(timeout=0.5):
            if self._is_dropped():
                raise Dropped
        try:
            yield
        finally:
            self.context.feeding.release()

    def _model(self, manifest: Manifest) -> Model:
        alias, wanted = manifest.model["alias"], manifest.model.get("content", "")
        model = self.context.engine.models.get(alias)
        if model is None:
            raise InvalidInput(f"this worker serves {', '.join(self.context.engine.models)}, not {alias!r:.60}")
        found = model.spec.revision
        if found.partition(".")[::2] != (wanted, manifest.model.get("reading", "")):
            raise InvalidInput(
                f"model {alias} of this worker holds {found or 'nothing known'}, and the dataset was planned for {wanted}; "
                "serve the model it was planned for, or start a dataset in another target"
            )
        return model

    # -- telling ------------------------------------------------------------------------------------------------------

    def _new_receipt(self, manifest: Manifest, part: Part, gathered: Gathered) -> Receipt:
        return Receipt(
            outcome=WRITTEN,
            manifest=manifest.id,
            part=part.number,
            rows=part.num_rows,
            failed=len(gathered.failed),
            tokens=self.num_tokens,
            seconds=round(time.monotonic() - self.started_s, 3),
            what=gathered.computed.what,
        )

    def _nothing(self, outcome: str) -> Receipt:
        return Receipt(outcome, self.message.manifest, self.message.part)

    def _done(self, receipt: Receipt) -> Record:
        now_s = self._began_s + time.monotonic() - self.started_s
        return Record(
            DONE, self._job_id, self.context.worker, self._began_s, now_s,
            receipt.rows, receipt.failed, receipt.tokens, receipt.bytes,
        )  # fmt: skip

    def _told_done(self, receipt: Receipt, record: Record | None) -> None:
        """An object found there whose worker died before it could tell."""
        if record is None or record.state != DONE:
            with suppress(redis.RedisError, OSError):
                self._began_s = self.state.now_s() - receipt.seconds
                self.state.release(self.message.part, self._done(receipt))

    def fail(self, error: Exception) -> None:
        """Set `error` as the answer, and tell the run of it if it is not tried again."""
        extra = {"action": "part_failed", "job": self._job_id, "part": self.message.part}
        log.warning("a part fails: %s", _words(error), extra=extra)
        told = None
        if not self.is_over and self._is_last_try(error):
            told = Record(FAILED, self._job_id, self.context.worker, self._began_s, self._began_s, error=_words(error))
        self._let_go(told)
        with suppress(InvalidStateError):
            self.answer.set_exception(error)

    def _let_go(self, record: Record | None) -> None:
        with self.telling:
            if not self._has_claim and record is None:
                return
            self._has_claim = False
            with suppress(redis.RedisError, OSError):  # the target says what is done
                self.state.release(self.message.part, record)

    def _is_dropped(self) -> bool:
        return self.is_over or self.is_cancelled

    def _wake(self) -> None:
        if self.feed:
            self.feed.wake()


@lru_cache(maxsize=4)  # one or two are in use; each may have megabytes
def _manifest(location: Location, manifest_id: str, edition: int) -> Manifest:
    """The manifest in a target, of this edition or a later one. InvalidInput if the target holds none, or another."""
    manifest = read_manifest(Store(location))
    if manifest is None:
        raise InvalidInput(f"{location} holds no dataset: {MANIFEST} is not there")
    if manifest.id != manifest_id:
        raise InvalidInput(f"{location} holds dataset {manifest.id[:8]}; the job is for {manifest_id[:8]}")
    return manifest


def failed_rows(listed: bytes) -> set[int]:
    """Row numbers in a list of failed rows. BadSource if it is none."""
    try:
        return {int(json.loads(line)["row"]) for line in listed.splitlines()}
    except (ValueError, TypeError, KeyError):
        raise BadSource("the list of a part's failed rows cannot be read; remove it and the part, and resume") from None


def _asking(engine: Engine, manifest: Manifest) -> Callable[[list[Any]], Any]:
    options = {**manifest.options, "model": manifest.model["alias"]}
    if manifest.kind == "embed":
        return lambda texts: engine.calls.embed(texts, **options)
    return lambda pairs: engine.calls.score(pairs, **options)


def _part_of(manifest: Manifest, message: PartMessage) -> Part:
    if message.part >= len(manifest.parts):
        raise InvalidInput(
            f"dataset {manifest.id[:8]} has {len(manifest.parts):,} parts; the job is for part {message.part:,}"
        )
    part = manifest.parts[message.part]
    if (message.first_row, message.end_row) != (part.first_row, part.end_row):
        raise InvalidInput(f"part {part.number:,} of dataset {manifest.id[:8]} has other rows than the job says")
    return part


def _words(error: Exception) -> str:
    # Whose words are not ours may quote a text.
    told = str(error) if isinstance(error, ProducerError | StoreFailed) else ""
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
