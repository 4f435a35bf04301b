"""The engine in this process: many jobs at once, no queue. What it adds to the bare pass, and loses to the interpreter."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from embedq import core
from embedq.core.batching.job import Job
from embedq.core.engine import Engine
from tests.bench.accelerator import texts
from tests.bench.accelerator.asked import Asked
from tests.bench.report import Figure

#: Texts of a job, and jobs that wait at a time: some ten batches of short texts.
_TEXTS_PER_JOB, _NUM_OPEN = 256, 24
_QUICK_TEXTS_PER_JOB, _QUICK_NUM_OPEN = 16, 4

_BULK = 9

#: Before a rate is counted, part of the time that it is counted for.
_FIRST_SHARE = 0.25


def measure(asked: Asked) -> Iterator[Figure]:
    """Texts per second of each kind."""
    model: dict[str, Any] = {"max_length": asked.max_length}
    precision: Any = asked.precision
    with core.load(asked.directory, device=asked.device, precision=precision, model=model) as engine:
        engine.warm_up()
        for kind, bounds in asked.kinds.items():
            calls = _calls(asked, engine, bounds)
            counted = _count(engine, calls, asked)
            key, told = f"{asked.model}_engine_{kind}", f"engine, {kind} tokens"
            yield from figures(key, told, counted)


def figures(key: str, told: str, counted: dict[str, float]) -> Iterator[Figure]:
    """What an engine counted within `wall_s` seconds."""
    yield Figure(f"{key}_texts_per_s", told, counted["sequences"] / counted["wall_s"], "texts/s")
    yield Figure(f"{key}_tokens_per_s", "  the same", counted["tokens"] / counted["wall_s"], "tokens/s")
    yield Figure(f"{key}_computing", "  a batch is on the device", counted["compute_s"] / counted["wall_s"], "of time")
    fill = counted["padded_tokens"] / counted["budget_tokens"] if counted["budget_tokens"] else None
    yield Figure(f"{key}_fill", "  batch fill", fill, "of budget")
    padding = 1 - counted["tokens"] / counted["padded_tokens"] if counted["padded_tokens"] else None
    yield Figure(f"{key}_padding", "  padding", padding, "of tokens")


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """What was counted between two answers of `Engine.stats`."""
    return {name: after[name] - value for name, value in before.items() if isinstance(value, int | float)}


def _calls(asked: Asked, engine: Engine, bounds: tuple[int, int]) -> list[Callable[[], Any]]:
    """Each opens a job; all texts are different."""
    num_together = _QUICK_TEXTS_PER_JOB if asked.is_quick else _TEXTS_PER_JOB
    if not asked.is_scored:
        found = texts.draw(asked.path, bounds, asked.num_texts)
        parts = [found[start : start + num_together] for start in range(0, len(found), num_together)]
        return [lambda part=part: engine.calls.embed(part) for part in parts]  # type: ignore[misc]
    num_before = len(texts.QUERY.split()) + 2
    found = texts.draw(asked.path, bounds, asked.num_texts, num_before=num_before)
    parts = [found[start : start + num_together] for start in range(0, len(found), num_together)]
    return [lambda part=part: engine.calls.rerank(texts.QUERY, part) for part in parts]  # type: ignore[misc]


def _count(engine: Engine, calls: list[Callable[[], Any]], asked: Asked) -> dict[str, float]:
    """Keep jobs waiting; what the engine counts once it is under way."""
    num_open = _QUICK_NUM_OPEN if asked.is_quick else _NUM_OPEN
    waiting: deque[Job] = deque()
    number = 0

    def run(seconds: float) -> None:
        nonlocal number
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            while len(waiting) < num_open:
                waiting.append(engine.submit(calls[number % len(calls)], _BULK))
                number += 1
            waiting.popleft().answer.result()

    run(_FIRST_SHARE * asked.seconds)
    before = engine.stats()
    run(asked.seconds)
    counted = difference(before, engine.stats())
    while waiting:
        waiting.popleft().answer.result()
    return counted
