"""The tasks `embed` and `rerank`, and many of them at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from embedq.core.errors import InvalidInput
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.results import Embeddings, Ranking
from embedq.tasks.application import app
from embedq.tasks.engine_task import EngineTask, current_answer
from embedq.tasks.sending import checked_sending, send_many

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from uuid import UUID

    from celery.result import AsyncResult, ResultSet

    from embedq.tasks.cancelling import Cancellable, Found


#: Said where the server fails.
_NO_ESTIMATE = "nothing can be estimated"


@app.task(base=EngineTask, bind=True, shared=False, name="tasks.embed", options_class=EmbedOptions)
def embed(self: EngineTask, texts: list[str], **options: Any) -> Embeddings:
    """Embed `texts`; `.dense` is (num_texts, dim) in their order. Options: `core.options.EmbedOptions`."""
    if answer := current_answer():
        return cast(Embeddings, answer.result())
    return self.running_engine().embed(texts, **options)


@app.task(base=EngineTask, bind=True, shared=False, name="tasks.rerank", options_class=RerankOptions)
def rerank(self: EngineTask, query: str, passages: list[str], **options: Any) -> Ranking:
    """Score `passages` against `query`; `.order` is best first. Options: `core.options.RerankOptions`."""
    if answer := current_answer():
        return cast(Ranking, answer.result())
    return self.running_engine().rerank(query, passages, **options)


def embed_many(
    batches: Iterable[list[str]],
    sending: Mapping[str, Any] | None = None,
    task_ids: Iterable[str | UUID] | None = None,
    **options: Any,
) -> list[AsyncResult]:
    """Send one `embed` job for each list of texts, hundreds in a round trip; their results in order.

    All share `options`, and `sending`: what `apply_async` takes, such as `{"priority": 9}`. `task_ids` are ids of your
    own, one for each job. ProducerError, before anything is sent, if one of them is wrong. QueueFull, whose `jobs` are
    the results of those that were sent, where the queue has no room, nor gets any within `block_s` of `sending`.
    """
    return _send_all(embed, [((texts,), options) for texts in batches], sending, task_ids)


def rerank_many(
    calls: Iterable[tuple[str, list[str]]],
    sending: Mapping[str, Any] | None = None,
    task_ids: Iterable[str | UUID] | None = None,
    **options: Any,
) -> list[AsyncResult]:
    """Send one `rerank` job for each pair of a query and its passages, as `embed_many` does."""
    return _send_all(rerank, [(call, options) for call in calls], sending, task_ids)


def _send_all(
    task: Any,
    calls: list[tuple[Any, dict[str, Any]]],
    sending: Mapping[str, Any] | None,
    task_ids: Iterable[str | UUID] | None,
) -> list[AsyncResult]:
    app.follow_eager()
    shared = checked_sending(sending or {})
    block_s = shared.pop("block_s", None)
    ids = None if task_ids is None else [checked_sending({"task_id": one})["task_id"] for one in task_ids]
    _check_ids(shared, ids, len(calls))
    checked = [task.checked(args, kwargs) for args, kwargs in calls]
    for model in {call.kwargs.get("model") for call in checked}:
        task.check_model(model)
    outgoing = [call._replace(sending={**call.sending, **shared}) for call in checked]
    jobs = send_many(task, outgoing, ids, block_s)
    return jobs if ids is None else [task.known(job, call) for job, call in zip(jobs, outgoing, strict=True)]


def _check_ids(shared: Mapping[str, Any], ids: list[str] | None, num_jobs: int) -> None:
    if shared.get("task_id") is not None:
        raise InvalidInput("one task_id cannot be the id of many jobs; give one for each as task_ids=[...]")
    if ids is not None and (len(ids) != num_jobs or len(set(ids)) != num_jobs or not all(ids)):
        raise InvalidInput(f"task_ids must be {num_jobs:,} different ids, one for each job; given {len(ids):,}")


async def aget(job: AsyncResult | ResultSet | list[Any] | tuple[Any, ...], timeout: float | None = None) -> Any:
    """`job.get(timeout)` in asyncio: returns and raises the same, and blocks nobody. All waits share a connection.

    For a list or tuple of jobs, such as `embed_many` returns, the list of their results, in order; the first error is raised.
    """
    from embedq.tasks.awaiting import wait_for

    return await wait_for(job, timeout)


def cancel(jobs: Cancellable, wait_s: float = 1.0) -> dict[str, Found]:
    """Cancel jobs: results, ids, a group, chain or chord, or a list of them. Returns what each was found as, by id.

    "waiting" or "running": its place is free. "done": it has its answer, and this came too late. "unknown": no worker has
    said within `wait_s` seconds that it knows the job; it may be of no queue that a worker reads, or not be sent yet, and is
    dropped if it comes. Whoever waits for a job that is not done gets celery.exceptions.TaskRevokedError at once, and so
    does whoever sends another job under that id within a week. ServerUnavailable if the server cannot be reached. Any thread
    may call it.
    """
    from embedq.tasks import cancelling, steps

    return steps.run(app, cancelling.cancel(app, jobs, wait_s), cancelling.FAILED)


async def acancel(jobs: Cancellable, wait_s: float = 1.0) -> dict[str, Found]:
    """`cancel` in asyncio: returns and raises the same, and blocks nobody."""
    from embedq.tasks import cancelling, steps

    return await steps.arun(app, cancelling.cancel(app, jobs, wait_s), cancelling.FAILED)


def estimate(
    num_texts: int,
    *,
    kind: Literal["embed", "rerank"] = "embed",
    model: str | None = None,
    priority: int = 0,
    num_characters: int | None = None,
) -> float | None:
    """Seconds until a job of so many texts or passages would be done if it were sent now; None if nobody has measured the model.

    By the speed of the workers present, what they hold and what waits. The texts are taken to be as long as those of the
    queue's latest jobs, unless `num_characters` says how long they are together. Without workers, the seconds that one would
    take. ServerUnavailable if the server cannot be reached. Any thread may call it.
    """
    from embedq.tasks import estimating, steps

    return steps.run(app, estimating.estimate(app, num_texts, kind, model, priority, num_characters), _NO_ESTIMATE)


async def aestimate(
    num_texts: int,
    *,
    kind: Literal["embed", "rerank"] = "embed",
    model: str | None = None,
    priority: int = 0,
    num_characters: int | None = None,
) -> float | None:
    """`estimate` in asyncio: returns and raises the same, and blocks nobody."""
    from embedq.tasks import estimating, steps

    return await steps.arun(
        app, estimating.estimate(app, num_texts, kind, model, priority, num_characters), _NO_ESTIMATE
    )


def eta(job: AsyncResult | str, priority: int | None = None) -> float | None:
    """Seconds until a job is done, given by its result or id: 0 if it is done, None if nobody has measured its model.

    Of a running job by its progress so far, of one that waits by its place in its queue. One that a worker has taken and not
    begun is taken for bulk, unless the `priority` that it was sent with says otherwise. ServerUnavailable if the server
    cannot be reached. Any thread may call it.
    """
    from embedq.tasks import estimating, steps

    return steps.run(app, estimating.eta(app, job, priority), _NO_ESTIMATE)


async def aeta(job: AsyncResult | str, priority: int | None = None) -> float | None:
    """`eta` in asyncio: returns and raises the same, and blocks nobody."""
    from embedq.tasks import estimating, steps

    return await steps.arun(app, estimating.eta(app, job, priority), _NO_ESTIMATE)
