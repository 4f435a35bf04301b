"""Computes the work that waits for one launcher's workers, in seconds of one of them. Pure: no clock, process or server.

`tasks.backlog_estimate` says how many tokens wait and how fast they are computed. Of the jobs in a queue this launcher
counts the part that its workers will take, which is the part of their speed in that of all workers of that model,
wherever they were started: two launchers on one queue then start together what one would.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from statistics import fmean

from embedq.tasks.backlog_estimate import estimate, mean_speed
from embedq.tasks.speeds import Report, Speed
from embedq.workers.heartbeat_line import Beat
from embedq.workers.launcher.queue_lengths import Look


def work_s(
    look: Look, beats: Mapping[str, Beat], queues: Mapping[str, str], speeds: Mapping[str, float]
) -> float | None:
    """Seconds that one worker would need for this launcher's part of all that waits.

    `beats` are those of its workers that take jobs, by their names; `queues` maps each queue to its model, `speeds`
    each model to its tokens per second as these workers last measured it. None if something waits and its amount is
    unknown, as before the first of them takes jobs.
    """
    if not beats:
        return None if any(look.queued.values()) else 0.0
    unmeasured = _unmeasured(beats.values(), speeds)
    seconds = 0.0
    for alias in dict.fromkeys(queues.values()):
        ours = [beat.models[alias] for beat in beats.values() if alias in beat.models]
        held = sum(beat.waiting.get(alias, 0) for beat in beats.values())
        latest = look.latest.get(alias, Speed())
        last = Speed(speeds.get(alias) or latest.tokens_per_second, latest.tokens_per_job)
        found = estimate(_queued(look, queues, alias), ours, last, unmeasured)
        if found is None:
            return None
        found = found._replace(num_tokens=held + part_of(alias, beats, look.workers) * found.num_tokens)
        if found.num_tokens and not found.tokens_per_second:
            return None
        seconds += found.seconds()
    return seconds


def others_s(look: Look, own: Collection[str], queues: Mapping[str, str]) -> float | None:
    """Seconds in which workers not named `own` compute what is queued; None if they do not serve all of it."""
    seconds = 0.0
    for alias in dict.fromkeys(queues.values()):
        queued = _queued(look, queues, alias)
        if not any(queued.values()):
            continue
        theirs = [one.models[alias] for name, one in look.workers.items() if alias in one.models and name not in own]
        found = estimate(queued, theirs, look.latest.get(alias, Speed()))
        if found is None or not theirs or not found.tokens_per_second:
            return None
        seconds += found.seconds(len(theirs))
    return seconds


def part_of(alias: str, own: Collection[str], workers: Mapping[str, Report]) -> float:
    """The part of a model's queued jobs that the workers named `own` will take, by their speed; 0 if there are none.

    A worker that has measured nothing, or of which there is no report yet, counts as fast as the others.
    """
    serving = {name: report.models[alias] for name, report in workers.items() if alias in report.models}
    usual = mean_speed(serving.values()) or 1.0
    ours = sum(serving.get(name, Speed()).tokens_per_second or usual for name in own)
    others = sum(one.tokens_per_second or usual for name, one in serving.items() if name not in own)
    return ours / (ours + others) if ours else 0.0


def mean_speeds(beats: Iterable[Beat]) -> dict[str, float]:
    """The mean speed of each model, in tokens per second of work for it, over the workers that have measured it."""
    found: dict[str, list[Speed]] = {}
    for beat in beats:
        for alias, speed in beat.models.items():
            found.setdefault(alias, []).append(speed)
    means = {alias: mean_speed(speeds) for alias, speeds in found.items()}
    return {alias: mean for alias, mean in means.items() if mean}


def _queued(look: Look, queues: Mapping[str, str], alias: str) -> dict[str, int]:
    """Jobs in each queue of one model."""
    return {queue: look.queued.get(queue, 0) for queue, model in queues.items() if model == alias}


def _unmeasured(beats: Iterable[Beat], speeds: Mapping[str, float]) -> Speed:
    """Returns the speed that these workers assume for a model that nobody ever measured.

    As fast as the fastest of those they ran: half a second of its work will say better soon, and a worker started for
    nothing until then has to load, and stays. Its jobs as large as those of other models, or as those that are held.
    """
    beats = list(beats)
    sizes = [size for beat in beats for speed in beat.models.values() for size in speed.tokens_per_job.values()]
    num_held = sum(beat.num_held for beat in beats)
    held = sum(beat.waiting_tokens for beat in beats) / max(1, num_held)
    size = fmean(sizes) if sizes else held
    return Speed(max(speeds.values(), default=0.0), {"any": size} if size else {})
