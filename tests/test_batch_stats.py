"""What is counted of batches and passes: sizes, the device's seconds among models and streams, speeds."""

from __future__ import annotations

import random
import threading

import pytest

from embedq.core.batching import batch_stats as meter_module
from embedq.core.batching.batch_stats import Batch, Histogram, Meter, ModelTotals
from embedq.core.errors import DeviceFailure, DeviceOutOfMemory
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.loops import error_of, raise_on_token, rows_of, running, submit


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(meter_module, "time", made)
    return made


def run(meter: Meter, clock: Clock, model: str, seconds: float, num_tokens: int, is_loaded: bool = True) -> None:
    meter.begin(model)
    clock.now_s += seconds
    meter.end(model, num_tokens, is_loaded)


def test_values_are_counted_up_to_each_bound_and_in_all() -> None:
    histogram = Histogram((1, 2, 4))
    for value in (0.5, 1, 1.5, 4, 5, 100):
        histogram.add(value)
    assert histogram.up_to() == [2, 3, 4, 6]
    assert histogram.total == 112


def test_counts_are_those_of_all_values_whatever_they_are() -> None:
    random_ = random.Random(5)
    bounds = tuple(sorted(random_.sample(range(100), 10)))
    values = [random_.uniform(-10, 110) for _ in range(500)]
    histogram = Histogram(bounds)
    for value in values:
        histogram.add(value)
    assert histogram.up_to() == [sum(value <= bound for value in values) for bound in bounds] + [500]


def test_late_shares_follow_the_last_batches_and_the_others_are_of_all() -> None:
    totals = ModelTotals()
    assert (totals.late_fill, totals.late_padding_share) == (0.0, 0.0)
    for _ in range(500):
        totals.add(4, 50, 100, 200)
    for _ in range(500):
        totals.add(4, 100, 100, 100)
    assert totals.late_fill == pytest.approx(1, abs=0.001)
    assert totals.late_padding_share == pytest.approx(0, abs=0.001)
    assert totals.fill == pytest.approx(100 / 150)
    assert totals.padding_share == pytest.approx(0.25)
    assert totals.sizes.up_to()[-1] == totals.num_batches == 1000


def test_time_is_divided_among_the_passes_under_way_and_idle_time_is_nobodys(clock: Clock) -> None:
    meter = Meter(["a", "b"])
    meter.begin("a")
    clock.now_s += 1
    meter.begin("b")
    meter.begin("a")
    clock.now_s += 3
    meter.end("b", 10)
    meter.end("a", 10)
    clock.now_s += 2
    meter.end("a", 10)
    clock.now_s += 50
    assert meter.passes["a"].seconds == pytest.approx(1 + 2 + 2)
    assert meter.passes["b"].seconds == pytest.approx(1)
    assert meter.busy_s == pytest.approx(6)
    assert meter.progressed_s == clock.now_s - 50
    run(meter, clock, "b", 1, 5)
    assert meter.busy_s == pytest.approx(7)


def test_passes_of_two_streams_are_counted_in_the_seconds_that_both_took(clock: Clock) -> None:
    meter = Meter(["a"])
    for _ in range(20):
        run(meter, clock, "a", 0.5, 100)
        clock.now_s += 3  # idle
    assert meter.passes["a"].num_tokens / meter.passes["a"].seconds == pytest.approx(200)
    meter = Meter(["a"])
    for _ in range(200):
        meter.begin("a")
        meter.begin("a")
        clock.now_s += 0.5
        meter.end("a", 100, True)
        meter.end("a", 100, True)
    assert meter.passes["a"].num_tokens / meter.passes["a"].seconds == pytest.approx(400)


def test_passes_that_left_others_waiting_are_counted_apart(clock: Clock) -> None:
    meter = Meter(["a", "b"])
    run(meter, clock, "a", 0.01, 1, is_loaded=False)
    run(meter, clock, "a", 0.1, 1000)
    run(meter, clock, "a", 0.1, 1000)
    assert meter.passes["a"].num_loaded == 2
    assert meter.passes["b"].num_loaded == 0


def test_passes_of_many_threads_are_all_counted() -> None:
    meter, start = Meter(["a", "b"]), threading.Barrier(8)

    def work(model: str) -> None:
        start.wait(PATIENCE_S)
        for _ in range(500):
            meter.begin(model)
            meter.end(model, 1)
            meter.split(model, is_out_of_memory=False)

    threads = [threading.Thread(target=work, args=("ab"[number % 2],)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert meter.passes["a"].num_splits == meter.passes["b"].num_splits == 2000
    before_s = meter.busy_s
    meter.begin("a")
    meter.end("a", 1)
    assert meter.busy_s - before_s < 1  # none of them is still under way


def test_a_loop_tells_of_its_batches_before_their_jobs_are_answered() -> None:
    model, batches, answered = FakeModel(), [], []

    def note(batch: Batch) -> None:
        batches.append(batch)
        answered.append([job.answer.done() for job in batch.jobs])

    with running(model) as loop:
        loop.meter.on_batch = note
        job = submit(loop, 3, 4)
        rows_of(job)
        (batch,) = batches
        assert (batch.model, batch.num_sequences, batch.num_tokens) == ("fake", 2, 7)
        assert batch.jobs == [job, job]
        assert answered == [[False, False]]
        assert batch.started_s == job.started_s <= batch.ended_s == job.ended_s
        assert loop.meter.progressed_s <= batch.ended_s + PATIENCE_S
        assert loop.meter.passes["fake"].num_tokens == 7


@pytest.mark.parametrize(("error", "is_memory"), [(DeviceFailure("broken"), False), (DeviceOutOfMemory("full"), True)])
def test_halved_batches_are_counted_and_those_for_memory_apart(error: Exception, is_memory: bool) -> None:
    model = FakeModel()
    model.before_launch = raise_on_token(7, error)
    with running(model) as loop:
        good, bad = submit(loop, 3, 3, 3, token=10), submit(loop, 3, token=7)
        assert len(rows_of(good)) == 3
        assert isinstance(error_of(bad), type(error))
        passes = loop.meter.passes["fake"]
        model.before_launch = lambda batch: None
    assert passes.num_memory_splits == (passes.num_splits if is_memory else 0)
    assert passes._num_running == 0
