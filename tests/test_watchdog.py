"""When a forward pass counts as hung, on a clock of the tests' own, and that it is told once."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from embedq.core.batching.watchdog import Watchdog
from embedq.core.sequence import Sequence
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.loops import raise_on_token, rows_of, running, submit

LIMIT_S = 1000.0


class Clock:
    """Seconds as the test sets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr("embedq.core.batching.watchdog.time", SimpleNamespace(monotonic=lambda: self.now_s))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_pass_hangs_once_it_takes_longer_than_the_limit(clock: Clock) -> None:
    watchdog = Watchdog(LIMIT_S, lambda: None)
    watchdog.progress(is_busy=True)
    clock.now_s = LIMIT_S
    assert not watchdog.is_hung
    clock.now_s = LIMIT_S + 1
    assert watchdog.is_hung
    watchdog.close()


def test_each_pass_has_the_limit_for_itself_and_an_idle_device_does_not_hang(clock: Clock) -> None:
    watchdog = Watchdog(LIMIT_S, lambda: None)
    clock.now_s = 10 * LIMIT_S
    assert not watchdog.is_hung  # nothing has begun
    for _ in range(5):
        watchdog.progress(is_busy=True)
        clock.now_s += 0.9 * LIMIT_S
        assert not watchdog.is_hung
    watchdog.progress(is_busy=False)
    clock.now_s += 10 * LIMIT_S
    assert not watchdog.is_hung
    watchdog.close()


def test_a_hung_pass_is_told_once() -> None:
    told: list[threading.Thread] = []
    has_told = threading.Event()

    def tell() -> None:
        told.append(threading.current_thread())
        has_told.set()

    watchdog = Watchdog(0.01, tell)
    watchdog.progress(is_busy=True)
    assert has_told.wait(PATIENCE_S)
    told[0].join(PATIENCE_S)  # its thread ends, so it cannot tell again
    assert not told[0].is_alive()
    assert len(told) == 1


def test_a_closed_watchdog_ends() -> None:
    before = set(threading.enumerate())
    watchdog = Watchdog(LIMIT_S, lambda: None)
    (thread,) = set(threading.enumerate()) - before
    watchdog.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_batches_that_make_progress_raise_no_alarm_however_many_there_are(clock: Clock, device: str) -> None:
    model, hung = FakeModel(), []
    model.device = device

    def take_long(batch: list[Sequence]) -> None:
        clock.now_s += 0.9 * LIMIT_S
        hung.append(loop.device.watchdog.is_hung)

    model.before_rows = take_long
    with running(model, hang_timeout_s=LIMIT_S, max_batch_sequences=1) as loop:
        rows_of(submit(loop, *[3] * 20))
    assert hung == [False] * 20


def test_the_halves_of_a_batch_that_failed_raise_no_alarm(clock: Clock) -> None:
    model, hung = FakeModel(), []
    fail = raise_on_token(7, RuntimeError("the device said no"))

    def take_long(batch: list[Sequence]) -> None:
        if len(batch) > 1 or batch[0].length > 1:  # the probe is quick
            clock.now_s += 0.9 * LIMIT_S
        hung.append(loop.device.watchdog.is_hung)
        fail(batch)

    model.before_rows = take_long
    with running(model, hang_timeout_s=LIMIT_S) as loop:
        assert "the device said no" in str(submit(loop, *[3] * 16, token=2).answer.exception(PATIENCE_S))
        assert hung == [False] * len(hung)
        assert len(hung) > 4


def test_a_device_whose_batches_are_done_is_idle(clock: Clock) -> None:
    model = FakeModel()
    model.device = "cuda:0"
    with running(model, hang_timeout_s=LIMIT_S) as loop:
        rows_of(submit(loop, 3, 4))
        loop.close()
        clock.now_s = 10 * LIMIT_S
        assert not loop.device.watchdog.is_hung
