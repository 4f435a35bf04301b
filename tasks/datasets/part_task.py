"""The tasks of a part: a message that names a target, a file and rows, and never holds a text.

Whoever sends one has planned the dataset. A worker computes it with its engine; here is nothing but the shape.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from celery import Task

from embedq.core.errors import InvalidInput
from embedq.tasks.application import app, config
from embedq.tasks.datasets.manifest import Manifest, Part
from embedq.tasks.datasets.receipts import Receipt
from embedq.tasks.engine_task import EngineTask, current_answer
from embedq.tasks.sending import OutgoingJob, send_many

#: A bulk load gives way to interactive jobs.
PRIORITY = 9

#: Parts of one run whose jobs wait in the queue: each queues the one that far behind it when it begins, so that a run of
#: a hundred thousand parts takes no more of the server than one of these.
WINDOW_PARTS = 2_000

#: Which rows of a part are computed: all, or those that failed before.
ALL, FAILED = "all", "failed"

#: Bytes of one message, envelope included; only for how many go to the server in one write.
_MESSAGE_BYTES = 2_000

#: What a summary may show of a file's name.
_NOT_SHOWN = re.compile(r"[^\w.,=@+ /-]")
_MAX_SHOWN = 80


@dataclass(frozen=True, slots=True)
class PartMessage:
    """The message of a part's job."""

    target: str
    manifest: str
    edition: int
    #: Raised by each resume: messages of earlier rounds that still wait are passed over.
    round: int
    model: str
    part: int
    file: str
    first_row: int
    end_row: int
    mode: str = ALL

    @classmethod
    def checked(cls, given: dict[str, Any]) -> PartMessage:
        """From a message's keywords. InvalidInput if they are not what `PartMessage` has."""
        numbers = ("edition", "round", "part", "first_row", "end_row")
        for one in fields(cls):
            value, is_number = given.get(one.name), one.name in numbers
            if (type(value) is not int or value < 0) if is_number else type(value) is not str:
                wanted = "whole number from 0" if is_number else "text"
                shown = value if type(value) is int else type(value).__name__
                raise InvalidInput(f"{one.name} of a part must be a {wanted}; given {shown!s:.40}")
        if given["mode"] not in (ALL, FAILED):
            raise InvalidInput(f"mode of a part must be {ALL!r} or {FAILED!r}; given {given['mode']!r:.40}")
        if num_others := len(given.keys() - {one.name for one in fields(cls)}):
            raise InvalidInput(f"a part's message holds {num_others} values that no part has")
        return cls(**given)

    @property
    def summary(self) -> str:
        """The rows and the end of the file's path, for Flower and logs."""
        file = _NOT_SHOWN.sub("?", "/".join(self.file.split("/")[-2:]))[-_MAX_SHOWN:]
        return f"rows {self.first_row:,}–{self.end_row - 1:,} of {file}"


class PartTask(Task):
    """A part's job: a failure of the worker or of a store is tried again, as for any job."""

    abstract = True
    throws, autoretry_for, max_retries = EngineTask.throws, EngineTask.autoretry_for, EngineTask.max_retries
    retry_backoff, retry_jitter = EngineTask.retry_backoff, EngineTask.retry_jitter


def _answer(task: Task) -> Receipt:
    answer = current_answer()
    if answer is None:
        raise InvalidInput(f"{task.name} runs in a worker; start a dataset with tasks.datasets.embed or rerank")
    receipt: Receipt = answer.result()
    return receipt


@app.task(base=PartTask, bind=True, shared=False, name="tasks.embed_part")
def embed_part(self: PartTask, **message: Any) -> Receipt:
    """Embed the rows of one part and write its object."""
    return _answer(self)


@app.task(base=PartTask, bind=True, shared=False, name="tasks.rerank_part")
def rerank_part(self: PartTask, **message: Any) -> Receipt:
    """Score the pairs of one part and write its object."""
    return _answer(self)


def send_parts(manifest: Manifest, target: str, parts: Iterable[Part], round_: int, mode: str = ALL) -> list[int]:
    """Queue the jobs of some parts, hundreds in a round trip; returns the numbers of those sent."""
    messages = [message_of(manifest, target, part, round_, mode) for part in parts]
    task = embed_part if manifest.kind == "embed" else rerank_part
    send_many(task, [_call(one) for one in messages])
    return [one.part for one in messages]


def message_of(manifest: Manifest, target: str, part: Part, round_: int, mode: str = ALL) -> PartMessage:
    """The message of one part."""
    return PartMessage(
        target=target,
        manifest=manifest.id,
        edition=manifest.edition,
        round=round_,
        model=manifest.model["alias"],
        part=part.number,
        file=manifest.inputs[part.input].path,
        first_row=part.first_row,
        end_row=part.end_row,
        mode=mode,
    )


def _call(message: PartMessage) -> OutgoingJob:
    shown = f"part={message.part}, dataset={message.manifest[:8]}, model={message.model}"
    sending = {
        "argsrepr": message.summary,
        "kwargsrepr": shown,
        "priority": PRIORITY,
        "queue": config.parts_queue(message.model),
        "timestamp": int(time.time()),
    }
    return OutgoingJob((), asdict(message), _MESSAGE_BYTES, sending)
