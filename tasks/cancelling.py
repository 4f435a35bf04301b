"""Cancels jobs: each that has no answer is answered at once, and workers free its place wherever it waits or runs.

    tasks.cancel(job)       {"2fd1…": "running"}

    embedq:cancelled        zset of the ids of cancelled jobs; workers are told when it changes (workers/broker/fetch.py)
    embedq:cancel_words     hash in which they say what they found each as, once its place is free

One script on the server answers a job and notes its id, in one step: either it had its answer before, and cancelling came
too late, or TaskRevokedError is its answer for good. The note outlives workers, so that a cancelled job does not run
after a crash. Knows no queue, and needs no right to read one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias
from uuid import UUID

from celery import Celery, states
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult, EagerResult, ResultSet

from embedq.core.errors import InvalidInput
from embedq.tasks.addresses import key_prefix
from embedq.tasks.sending import MAX_ID_LENGTH
from embedq.tasks.speeds import WORKERS_KEY
from embedq.tasks.steps import Exchange

CANCELLED_KEY, WORDS_KEY = "embedq:cancelled", "embedq:cancel_words"

#: Seconds for which a cancelled job is dropped wherever it is met, and most jobs for which that is remembered.
_KEEP_S, _MAX_KEPT = 7 * 86_400, 1_000_000

#: Jobs of one call of the script: the server does nothing else meanwhile, some microseconds for each.
_MAX_JOBS_PER_CALL = 1000

#: Seconds between two looks at what workers said: they mostly say it within some milliseconds, and tell nobody else.
_LOOK_S = 0.01

#: Atomic, so that a result which is stored in this moment either stays or is refused.
_SCRIPT = Path(__file__).with_name("cancel.lua").read_text(encoding="utf-8")

#: What a cancelled job was found as.
Found: TypeAlias = Literal["waiting", "running", "done", "unknown"]

#: A job, its id, a group, and a list of them.
Cancellable: TypeAlias = AsyncResult | ResultSet | str | UUID | Iterable[Any]

#: Said where the server fails.
FAILED = "jobs cannot be cancelled"


def ids_of(given: Cancellable) -> list[str]:
    """The ids of all jobs that are meant, each once: of a group its jobs, of a chain all parts, of a chord both sides.

    InvalidInput for anything else.
    """
    return list(dict.fromkeys(_ids_of(given)))


def _ids_of(given: Any) -> Iterator[str]:
    if isinstance(given, EagerResult):  # computed already, in this process
        yield from _ids_of(str(given.id))
    elif isinstance(given, AsyncResult | ResultSet):
        if isinstance(given, ResultSet):
            yield from _ids_of(given.results or [])
        else:
            yield from _ids_of(str(given.id))
        if (parent := getattr(given, "parent", None)) is not None:
            yield from _ids_of(parent)
    elif isinstance(given, UUID):
        yield str(given)
    elif isinstance(given, str):
        if not 0 < len(given) <= MAX_ID_LENGTH:
            raise InvalidInput(f"a job's id has 1 to {MAX_ID_LENGTH} characters; given {len(given):,}")
        yield given
    elif isinstance(given, Iterable) and not isinstance(given, bytes | dict):
        for one in given:
            yield from _ids_of(one)
    else:
        raise InvalidInput(
            f"only jobs, their ids, groups, and lists of them can be cancelled; given {type(given).__name__}"
        )


def cancel(app: Celery, given: Cancellable, wait_s: float) -> Exchange[dict[str, Found]]:
    """As `tasks.cancel`, for the jobs of `app`: cancel them, then ask until each was found or `wait_s` have passed."""
    ids, prefix = ids_of(given), key_prefix(app)
    found: dict[str, str] = {}
    for begin in range(0, len(ids), _MAX_JOBS_PER_CALL):
        some = ids[begin : begin + _MAX_JOBS_PER_CALL]
        answers = yield _call(app, some, prefix)
        found |= dict(zip(some, (answer.decode() for answer in answers), strict=True))
    left = [job_id for job_id in ids if found[job_id] != "done"]
    deadline_s = time.monotonic() + wait_s
    while left:
        words = yield partial(_words, prefix + WORDS_KEY, left[:_MAX_JOBS_PER_CALL])
        said = {job_id: word.decode() for job_id, word in zip(left, words, strict=False) if word}
        found |= said
        left = [job_id for job_id in left if job_id not in said]
        if left and not said:
            if time.monotonic() >= deadline_s or not (yield lambda client: client.hlen(prefix + WORKERS_KEY)):
                break
            yield _LOOK_S
    return {job_id: _found(word) for job_id, word in found.items()}


def _found(word: str) -> Found:
    """What is told of a job: no word is that nobody knows it."""
    known: tuple[Found, ...] = ("waiting", "running", "done")
    return next((one for one in known if one == word), "unknown")


def _call(app: Celery, ids: Sequence[str], prefix: str) -> Callable[[Any], Any]:
    """The call that answers these jobs and notes their ids."""
    backend = app.backend
    keys = [prefix + CANCELLED_KEY, prefix + WORDS_KEY, *map(backend.get_key_for_task, ids)]
    meta = {
        "status": states.REVOKED,
        # Behind the state: by both, workers tell this answer, which is final, from one that they gave themselves.
        "cancelled": True,
        "result": backend.prepare_exception(TaskRevokedError("cancelled")),
        "traceback": None,
        "children": [],
        "date_done": datetime.now(UTC).isoformat(),
    }
    answers = [part for job_id in ids for part in (job_id, backend.encode({**meta, "task_id": job_id}))]
    arguments = (_KEEP_S, _MAX_KEPT, int(backend.expires or 0), *answers)
    return lambda client: client.eval(_SCRIPT, len(keys), *keys, *arguments)


def _words(key: str, ids: Sequence[str], client: Any) -> Any:
    return client.hmget(key, ids)
