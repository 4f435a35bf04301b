"""Time from `.delay()` to the result in the producer's hands, one after the other or at a steady pace."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from embedq import tasks

#: A result takes longer than this only if the worker has ended.
_TIMEOUT_S = 600.0

#: Between two questions whether to go on.
_CHECK_S = 0.05


def one_by_one(send: Callable[[int], Any], num_calls: int, num_first: int = 20) -> np.ndarray:
    """(num_calls,) seconds of `send(index).get()`, after `num_first` that do not count."""
    seconds = []
    for index in range(num_first + num_calls):
        started_s = time.perf_counter()
        send(index).get(timeout=_TIMEOUT_S)
        seconds.append(time.perf_counter() - started_s)
    return np.array(seconds[num_first:])


def paced(send: Callable[[int], Any], every_s: float, has_ended: Callable[[], bool]) -> np.ndarray:
    """(num_calls,) seconds of calls sent every `every_s`, from the moment each was due to its result.

    Sent whether or not earlier ones were answered. All that were sent are waited for.
    """
    seconds: list[float] = []
    results = tasks.app.backend.result_consumer
    begin_s = checked_s = time.perf_counter()
    num_sent = 0

    def note(due_s: float, _: Any) -> None:
        seconds.append(time.perf_counter() - due_s)

    is_sending = not has_ended()
    while is_sending or len(seconds) < num_sent:
        now_s = time.perf_counter()
        if is_sending and now_s - checked_s > _CHECK_S:
            checked_s, is_sending = now_s, not has_ended()
        due_s = begin_s + num_sent * every_s
        if is_sending and now_s >= due_s:
            send(num_sent).then(partial(note, due_s))
            num_sent += 1
            continue
        if now_s - begin_s > _TIMEOUT_S:
            raise TimeoutError(f"{num_sent - len(seconds)} calls had no answer within {_TIMEOUT_S:.0f} s")
        results.drain_events(timeout=min(max(due_s - now_s, 0.001), _CHECK_S) if is_sending else _CHECK_S)
    return np.array(seconds)


def percentiles_ms(seconds: np.ndarray) -> tuple[float, float]:
    """(p50, p99) in milliseconds."""
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return float(p50), float(p99)
