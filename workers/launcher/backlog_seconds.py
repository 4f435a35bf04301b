"""How much work waits for the workers of one launcher, in seconds of one of them. Pure: no clock, no process, no server.

Jobs in queues become tokens by the mean of those answered from the same queue, and tokens become seconds by the
speed measured of the model they are for: a few jobs for a slow reranker and many for a fast embedder add up. Of the
jobs in a queue this launcher counts the part that its workers will take, which is the part of their speed in that of
all workers of that model, wherever they were started: two launchers on one queue then start together what one would.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from statistics import fmean

from embedq.tasks.speeds import Report, Speed
from embedq.workers.heartbeat_line import Beat
from embedq.workers.launcher.queue_lengths import Look


def work_s(
    look: Look, beats: Mapping[str, Beat], queues: Mapping[str, str], speeds: Mapping[str, float]
) -> float | None:
    """Seconds that one worker would need for this launcher's part of all that waits.

    `beats` are those of its workers that take jobs, by their names; `queues` says the model of each queue, `speeds`
    the tokens per second of each model as last known. None if something waits and nobody can tell how much it is, as
    before the first of them takes jobs.
    """
    if not beats:
        return None if any(look.queued.values()) else 0.0
    seconds = 0.0
    for alias in dict.fromkeys(queues.values()):
        held = sum(beat.waiting.get(alias, 0) for beat in beats.values())
        queued = _queued_tokens(look, beats.values(), [queue for queue, of in queues.items() if of == alias], alias)
        if queued is None:
            return None
        num_tokens = held + part_of(alias, beats, look.workers) * queued
        speed = _speed(alias, look, speeds)
        if num_tokens and not speed:
            return None
        seconds += num_tokens / (speed or 1.0)
    return seconds


def others_s(look: Look, own: Collection[str], queues: Mapping[str, str]) -> float | None:
    """Seconds in which workers not named `own` are through with what is queued; None if they are not there for all of it."""
    seconds = 0.0
    for alias in dict.fromkeys(queues.values()):
        its_queues = [queue for queue, of in queues.items() if of == alias]
        if not any(look.queued.get(queue) for queue in its_queues):
            continue
        theirs = [one.models[alias] for name, one in look.workers.items() if alias in one.models and name not in own]
        num_tokens = _queued_tokens(look, (), its_queues, alias)
        usual = _usual_speed(theirs) or look.latest.get(alias, Speed()).tokens_per_second
        if num_tokens is None or not theirs or not usual:
            return None
        seconds += num_tokens / sum(one.tokens_per_second or usual for one in theirs)
    return seconds


def part_of(alias: str, own: Collection[str], workers: Mapping[str, Report]) -> float:
    """The part of a model's queued jobs that the workers named `own` will take, by their speed; 0 if there are none.

    A worker that has measured nothing, or of which there is no report yet, counts as fast as the others.
    """
    serving = {name: report.models[alias] for name, report in workers.items() if alias in report.models}
    usual = _usual_speed(serving.values()) or 1.0
    ours = sum(serving.get(name, Speed()).tokens_per_second or usual for name in own)
    others = sum(one.tokens_per_second or usual for name, one in serving.items() if name not in own)
    return ours / (ours + others) if ours else 0.0


def speeds_of(beats: Iterable[Beat]) -> dict[str, float]:
    """The mean speed of each model, in tokens per second of work for it, over the workers that have measured it."""
    found: dict[str, list[float]] = {}
    for beat in beats:
        for alias, speed in beat.speeds.items():
            found.setdefault(alias, []).append(speed)
    return {alias: fmean(speeds) for alias, speeds in found.items()}


def _speed(alias: str, look: Look, speeds: Mapping[str, float]) -> float:
    """Tokens per second; 0 if nothing is known at all.

    Of a model that these workers never ran, what any worker measured last. Else the fastest of those they ran: half
    a second of its work will say better soon, and a worker started for nothing until then has to load, and stays.
    """
    last = look.latest.get(alias, Speed()).tokens_per_second
    return speeds.get(alias) or last or max(speeds.values(), default=0.0)


def _queued_tokens(look: Look, beats: Iterable[Beat], queues: Collection[str], alias: str) -> float | None:
    """Tokens in the queues of one model; None if jobs wait whose size nobody can tell.

    A job counts as those answered from its queue lately: by these workers, else as any worker last said of that queue
    or the model's others. If none was ever answered, as those of other models, and at last as those that are held.
    """
    beats = list(beats)
    total = 0.0
    for queue in queues:
        if num_jobs := look.queued.get(queue, 0):
            size = _job_size(queue, beats, look.latest.get(alias, Speed()))
            if not size:
                return None
            total += num_jobs * size
    return total


def _job_size(queue: str, beats: list[Beat], latest: Speed) -> float:
    seen = [beat.tokens_per_job[queue] for beat in beats if queue in beat.tokens_per_job]
    known = latest.tokens_per_job
    if seen or known:
        return fmean(seen) if seen else known.get(queue, fmean(known.values()))
    all_seen = [size for beat in beats for size in beat.tokens_per_job.values()]
    held = sum(beat.waiting_tokens for beat in beats), sum(beat.num_held for beat in beats)
    return fmean(all_seen) if all_seen else held[0] / max(1, held[1])


def _usual_speed(speeds: Iterable[Speed]) -> float:
    measured = [one.tokens_per_second for one in speeds if one.tokens_per_second > 0]
    return fmean(measured) if measured else 0.0
