"""Estimates when jobs are done: one that would be sent now, or one that was sent.

    tasks.estimate(1_000)     seconds until 1,000 texts sent now are embedded
    tasks.eta(job)            seconds until that job is done

By what the server knows: how fast the workers present are and what they hold (`tasks.speeds`), what waits in the lists of
the model's queues, and what a running job says of its progress. A message says how much it holds in the summary that its
sender wrote; where none is there, or the lists may not be read, the mean size of a job counts (`tasks.backlog_estimate`).

Work of the same priority or a more urgent one is ahead of a job; of bulk that is being computed, a batch or two are ahead
of an interactive one. Texts are taken to be as long as those of the queue's latest jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import redis
from celery import Celery, states
from celery.result import AsyncResult

from embedq.core.errors import InvalidInput
from embedq.core.options import MAX_INTERACTIVE_PRIORITY, MAX_INTERACTIVE_ROWS
from embedq.tasks import speeds
from embedq.tasks.addresses import key_prefix
from embedq.tasks.application import config
from embedq.tasks.backlog_estimate import mean_speed
from embedq.tasks.models import KEY, Served, queues_of, read_all
from embedq.tasks.speeds import Load, Report, Speed
from embedq.tasks.steps import Exchange

_SCRIPT = Path(__file__).with_name("ahead.lua").read_text(encoding="utf-8")

#: Messages of a list that are looked at: the server does nothing else meanwhile, some microseconds for each.
_MAX_LOOKED_AT = 300

#: The same for a job's own place, which is not to be found by looking at some.
_MAX_PASSED = 5_000

#: Seconds that a job costs beside the computing: taking, encoding, storing.
_AROUND_S = 0.03

#: What the work that a worker holds counts for a bulk job while more waits in lists: sequences of like length are computed together, whosever they
#: are, so that the last of a job's waits longer than for its turn (`python -m tests.bench estimates`).
_OUT_OF_TURN = 2.25

#: Where nothing was measured: tokens of a character of English for most vocabularies.
_TOKENS_PER_CHARACTER = 0.25

#: Fields of a list in the script's answer.
_NUM_FIELDS = 6


class Waiting(NamedTuple):
    """What waits in one list: its length, and of the messages that were looked at how much they hold."""

    queue: str
    step: int
    length: int
    looked_at: int = 0
    said: int = 0
    texts: int = 0
    characters: int = 0
    #: 1 if the job that was looked for is the last of them.
    is_met: int = 0


@dataclass(frozen=True, slots=True)
class Pool:
    """What the server knows of workers and models at one moment."""

    now_s: float
    reports: Mapping[str, Report]
    latest: Mapping[str, Speed]
    models: Mapping[str, Served]

    def serving(self, alias: str) -> list[Report]:
        """The reports of the workers present that serve a model."""
        return [report for report in self.reports.values() if alias in report.models]

    def speed(self, alias: str) -> float:
        """Tokens per second of one worker; 0 if nobody has measured it."""
        measured = mean_speed(report.models[alias] for report in self.serving(alias))
        return measured or self.latest.get(alias, Speed()).tokens_per_second

    def size(self, alias: str, queue: str, of: Callable[[Speed], Mapping[str, float]]) -> float:
        """A mean size of a queue's jobs or texts, else of the model's other queues; 0 if nobody has measured it."""
        measured = [*(report.models[alias] for report in self.serving(alias)), self.latest.get(alias, Speed())]
        seen = [of(one)[queue] for one in measured if queue in of(one)]
        others = [size for one in measured for size in of(one).values()]
        return fmean(seen or others) if seen or others else 0.0

    def beside(self, alias: str) -> set[str]:
        """The models whose work shares workers with a model's, itself included."""
        return {alias}.union(*(report.models for report in self.serving(alias)))


def estimate(
    app: Celery, num_texts: int, kind: str, model: str | None, priority: int, num_characters: int | None
) -> Exchange[float | None]:
    """Seconds until a job is done that is sent now; None where nobody has measured its model."""
    _check(num_texts, priority, num_characters)
    pool = yield from _pool(app)
    queue, alias = config.queue_name(kind, model), model or default_of(pool.models, kind)
    if alias is None or not (speed := pool.speed(alias)):
        return None
    step = max(one for one in _steps(app) if one <= priority)
    queues = {name: of for name, (of, _) in queues_of(pool.models).items() if of in pool.beside(alias)}
    waiting = yield from _look(app, [(name, one) for name in queues for one in _steps(app) if one <= step])
    if num_characters is None:
        own = num_texts * pool.size(alias, queue, lambda one: one.tokens_per_text)
        own = own or pool.size(alias, queue, lambda one: one.tokens_per_job)
    else:
        own = num_characters * _per_character(pool, alias, queue)
    is_bulk = priority > MAX_INTERACTIVE_PRIORITY or num_texts > MAX_INTERACTIVE_ROWS
    return _AROUND_S + own / speed + ahead_s(pool, alias, queues, waiting, is_bulk)


def eta(app: Celery, job: AsyncResult | str, priority: int | None) -> Exchange[float | None]:
    """Seconds until a job that was sent is done, 0 if it is; None where nobody has measured its model."""
    _check(0, 0 if priority is None else priority, None)
    job_id = job if isinstance(job, str) else str(job.id)
    backend = app.backend
    blob = yield lambda client: client.get(backend.get_key_for_task(job_id))
    meta = backend.decode_result(blob) if blob else {"status": states.PENDING, "result": None}
    if meta["status"] in states.READY_STATES:
        return 0.0
    pool = yield from _pool(app)
    info = meta["result"] if meta["status"] == states.STARTED and isinstance(meta["result"], dict) else {}
    if info.get("hostname") in pool.reports:
        left_s = left_of(info, pool.now_s)
        if left_s is not None:
            return left_s
    queues = {name: of for name, (of, _) in queues_of(pool.models).items()}
    places = [(name, step) for step in _steps(app) for name in queues]
    waiting = yield from _look(app, places, job_id)
    return _left_of_waiting(pool, queues, waiting, priority is None or priority > MAX_INTERACTIVE_PRIORITY)


def left_of(info: Mapping[str, Any], now_s: float) -> float | None:
    """Seconds that a running job will take on, at the speed so far; None before any of it is computed."""
    numbers = [info.get(name) for name in ("started", "done", "total")]
    if not all(isinstance(one, int | float) for one in numbers):
        return None
    started_s, done, total = (float(one) for one in numbers if one is not None)
    if done <= 0 or total < done:
        return None
    return max(0.0, now_s - started_s) / done * (total - done)


def _left_of_waiting(pool: Pool, queues: Mapping[str, str], waiting: Sequence[Waiting], is_bulk: bool) -> float | None:
    """Seconds until a job is done that waits in its list, or with a worker."""
    met = waiting[-1] if waiting and waiting[-1].is_met else None
    if met is None:  # a worker has it: it is among what they hold
        found = [ahead_s(pool, alias, queues, [], is_bulk) for alias in pool.models if pool.speed(alias)]
        return _AROUND_S + max(found) if found else None
    alias = queues[met.queue]
    if not pool.speed(alias):
        return None
    before = [one for one in waiting if queues[one.queue] in pool.beside(alias)]
    return _AROUND_S + ahead_s(pool, alias, queues, before, met.step > MAX_INTERACTIVE_PRIORITY)


def ahead_s(pool: Pool, alias: str, queues: Mapping[str, str], waiting: Iterable[Waiting], is_bulk: bool) -> float:
    """Seconds until the workers of a model have computed what they hold and `waiting`, as far as it is ahead of a job."""
    seconds = 0.0
    listed = list(waiting)
    in_turn = 1.0 if not any(one.length for one in listed) else _OUT_OF_TURN
    for other in pool.beside(alias):
        speed, serving = pool.speed(other), pool.serving(other)
        if not speed:
            continue
        tokens = sum(tokens_of(pool, other, one) for one in listed if queues[one.queue] == other)
        tokens += sum(
            report.load.waiting.get(other, 0.0) * (in_turn if is_bulk else report.load.interactive)
            for report in serving
        )
        seconds += tokens / (speed * max(1, len(serving)))
    batches = [batch_of(report.load) for report in pool.serving(alias)]
    return seconds + (fmean(batches) / pool.speed(alias) if batches else 0.0)


def batch_of(load: Load) -> float:
    """Tokens of batches beside a job's own: half of the one that is computed, and what fills up the one with the job."""
    return load.batch_tokens * (1.0 if sum(load.waiting.values()) else 0.5)


def tokens_of(pool: Pool, alias: str, one: Waiting) -> float:
    """Tokens of what waits in a list: by what its messages say, else by the mean size of the queue's jobs."""
    num_jobs = one.looked_at if one.is_met else one.length
    mean = pool.size(alias, one.queue, lambda speed: speed.tokens_per_job)
    if not one.looked_at:
        return num_jobs * mean
    said = one.characters * _per_character(pool, alias, one.queue)
    return num_jobs / one.looked_at * (said + (one.looked_at - one.said) * mean)


def _per_character(pool: Pool, alias: str, queue: str) -> float:
    return pool.size(alias, queue, lambda speed: speed.tokens_per_character) or _TOKENS_PER_CHARACTER


def default_of(models: Mapping[str, Served], kind: str) -> str | None:
    """The model of jobs that name none; None if none is announced."""
    return next((alias for alias, model in models.items() if kind in model.default_for), None)


def _pool(app: Celery) -> Exchange[Pool]:
    prefix = key_prefix(app)
    seconds, microseconds = yield lambda client: client.time()
    now_s = float(seconds) + float(microseconds) / 1e6
    workers = yield lambda client: client.hgetall(prefix + speeds.WORKERS_KEY)
    latest = yield lambda client: client.hgetall(prefix + speeds.SPEEDS_KEY)
    models = yield lambda client: client.hgetall(prefix + KEY)
    return Pool(now_s, speeds.present(workers, now_s), speeds.latest(latest), read_all(models, now_s))


def _look(app: Celery, places: Sequence[tuple[str, int]], job_id: str = "") -> Exchange[list[Waiting]]:
    """What waits in these lists, in their order, up to the job of this id; only their lengths if they may not be read."""
    prefix, separator = key_prefix(app), str(app.conf.broker_transport_options.get("sep", ":"))
    keys = [f"{prefix}{queue}{separator}{step}" if step else f"{prefix}{queue}" for queue, step in places]
    if not keys:
        return []
    most = _MAX_PASSED if job_id else _MAX_LOOKED_AT
    try:
        flat = yield lambda client: client.eval(_SCRIPT, len(keys), *keys, most, job_id)
    except redis.exceptions.NoPermissionError:
        lengths = yield lambda client: _lengths(client, keys)
        return [Waiting(*place, length) for place, length in zip(places, lengths, strict=True)]
    answers = zip(*(iter(flat),) * _NUM_FIELDS, strict=True)
    return [Waiting(*place, *answer) for place, answer in zip(places, answers, strict=False)]


def _lengths(client: Any, keys: Iterable[str]) -> Any:
    pipe = client.pipeline(transaction=False)
    for key in keys:
        pipe.llen(key)
    return pipe.execute()


def _steps(app: Celery) -> list[int]:
    return [int(step) for step in app.conf.broker_transport_options["priority_steps"]]


def _check(num_texts: Any, priority: Any, num_characters: Any) -> None:
    for name, value, most in (
        ("num_texts", num_texts, 10**12),
        ("priority", priority, 9),
        ("num_characters", 0 if num_characters is None else num_characters, 10**15),
    ):
        if type(value) is not int or not 0 <= value <= most:
            raise InvalidInput(f"{name} must be a whole number from 0 to {most:,}; given {value!r:.40}")
