"""The thread that hands out answers: in order, bounded, and not ended by what callers attach to them."""

from __future__ import annotations

import logging
import threading

import pytest

from embedq.core.batching.completion_thread import _MAX_UNDELIVERED, CompletionThread
from tests.checkpoints import PATIENCE_S


def test_work_is_done_in_order_on_one_thread_and_close_waits_for_it() -> None:
    done: list[tuple[int, str]] = []
    completion = CompletionThread()
    for number in range(100):
        completion.submit(lambda number=number: done.append((number, threading.current_thread().name)))  # type: ignore[misc]
    completion.close()
    assert done == [(number, "completion") for number in range(100)]
    completion.close()  # a second time: nothing happens


def test_work_that_raises_is_logged_and_the_rest_is_done(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    def fail() -> None:
        raise RuntimeError("of the application")

    completion = CompletionThread()
    for _ in range(2 * _MAX_UNDELIVERED):  # a place that is not given back would be missed
        completion.submit(fail)
    completion.submit(lambda: done.append("done"))
    completion.close()
    assert done == ["done"]
    assert {vars(record)["action"] for record in caplog.records if record.levelno == logging.ERROR} == {
        "callback_failed"
    }


def test_who_is_far_ahead_waits() -> None:
    gate = threading.Event()
    num_done, most_ahead = 0, 0

    def work() -> None:
        nonlocal num_done
        assert gate.wait(PATIENCE_S)
        num_done += 1

    completion = CompletionThread()
    for num_submitted in range(1, 501):
        completion.submit(work)
        most_ahead = max(most_ahead, num_submitted - num_done)
        if num_submitted == _MAX_UNDELIVERED:
            gate.set()
    completion.close()
    assert num_done == 500
    assert most_ahead == _MAX_UNDELIVERED
