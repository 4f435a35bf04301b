"""The one thread that touches the models: whose rows go where, and what runs while something runs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.checkpoints import PATIENCE_S, FakeModel
from tests.loops import expected_of, num_waiting, raise_on_token, rows_of, running, submit, wait_until


@pytest.fixture
def accelerator() -> FakeModel:
    """A model whose passes run beside the host; the first one does not end before its gate opens."""
    model = FakeModel()
    model.device = "cuda:0"
    model.gate.clear()
    return model


def test_each_row_goes_to_its_place_in_its_job() -> None:
    with running(FakeModel()) as loop:
        first, second = submit(loop, 9, 3, 5), submit(loop, 4, 8, token=50)
        np.testing.assert_array_equal(rows_of(first), expected_of(9, 3, 5))
        np.testing.assert_array_equal(rows_of(second), expected_of(4, 8, token=50))


def test_what_waits_while_the_device_works_shares_the_next_pass() -> None:
    model = FakeModel()
    model.gate.clear()
    with running(model) as loop:
        submit(loop, 3)
        assert model.begun.acquire(timeout=PATIENCE_S)
        jobs = [submit(loop, 4, 5, token=10 * number) for number in range(1, 11)]
        model.gate.set()
        for number, job in enumerate(jobs, 1):
            np.testing.assert_array_equal(rows_of(job), expected_of(4, 5, token=10 * number))
        assert [len(batch) for batch in model.batches] == [1, 20]


def test_models_and_outputs_do_not_share_a_pass_but_all_are_served() -> None:
    first, second = FakeModel("first"), FakeModel("second")
    with running(first, second) as loop:
        jobs = [submit(loop, 3, alias=alias) for alias in ("first", "second", "first")]
        both = submit(loop, 3, outputs=frozenset({"dense", "colbert"}), alias="first")
        for job in jobs:
            rows_of(job)
        assert rows_of(both, "colbert")[0].shape == (3, 2)
        assert {one.key[0] for batch in second.batches for one in batch} == {"second"}
        assert all(len({one.key for one in batch}) == 1 for batch in first.batches)


def test_the_next_batch_is_launched_while_one_runs_and_rows_come_in_order(accelerator: FakeModel) -> None:
    with running(accelerator, max_batch_sequences=1) as loop:
        jobs = [submit(loop, 3, 4, token=10 * number) for number in range(3)]
        for _ in range(2):  # the first does not end, and yet a second begins
            assert accelerator.begun.acquire(timeout=PATIENCE_S)
        accelerator.gate.set()
        for number, job in enumerate(jobs):
            np.testing.assert_array_equal(rows_of(job), expected_of(3, 4, token=10 * number))
    overlapped = [step for batch in range(1, 6) for step in (("launch", batch), ("collect", batch - 1))]
    assert accelerator.steps == [("launch", 0), *overlapped, ("collect", 5)]


def test_no_more_than_one_batch_is_queued_behind_the_one_that_runs(accelerator: FakeModel) -> None:
    with running(accelerator, max_batch_sequences=1) as loop:
        job = submit(loop, *[3] * 8)
        for _ in range(2):
            assert accelerator.begun.acquire(timeout=PATIENCE_S)
        assert (len(accelerator.batches), num_waiting(loop.backlog)) == (2, 6)
        accelerator.gate.set()
        rows_of(job)
    ahead = np.cumsum([1 if step == "launch" else -1 for step, _ in accelerator.steps])
    assert ahead.max() == 2


def test_a_device_that_works_on_the_host_has_its_rows_handed_on_before_the_next_pass() -> None:
    model = FakeModel()
    with running(model, max_batch_sequences=1) as loop:
        rows_of(submit(loop, *[3] * 4))
    assert model.steps == [(step, batch) for batch in range(4) for step in ("launch", "collect")]


@pytest.mark.parametrize("culprit", range(4))
@pytest.mark.parametrize("when", ["at launch", "when collected"])
def test_an_overlapped_pass_that_fails_takes_no_other_along(accelerator: FakeModel, culprit: int, when: str) -> None:
    fail = raise_on_token(10 * culprit + 2, RuntimeError("the device said no"))
    if when == "at launch":
        accelerator.before_launch = fail
    else:
        accelerator.before_rows = fail
    with running(accelerator, max_batch_sequences=2) as loop:
        submit(loop, 2, token=90)
        assert accelerator.begun.acquire(timeout=PATIENCE_S)
        jobs = [submit(loop, 3, 4, token=10 * number + 2) for number in range(4)]
        accelerator.gate.set()
        for number, job in enumerate(jobs):
            if number == culprit:
                assert "the device said no" in str(job.answer.exception(PATIENCE_S))
            else:
                np.testing.assert_array_equal(rows_of(job), expected_of(3, 4, token=10 * number + 2))
        assert loop.reasons == []


def test_a_job_is_told_once_that_it_has_started_before_its_answer(accelerator: FakeModel) -> None:
    told: list[str] = []
    has_started = threading.Event()
    with running(accelerator, max_batch_sequences=1) as loop:

        def start() -> None:
            told.append("started")
            has_started.set()

        job = submit(loop, 3, 4, on_started=start)
        job.answer.add_done_callback(lambda answer: told.append("answered"))
        assert has_started.wait(PATIENCE_S)
        joined = submit(loop, 3, on_started=lambda: told.append("joined"))  # of which all is under way already
        assert not job.answer.done()
        accelerator.gate.set()
        rows_of(job)
        rows_of(joined)
    assert sorted(told) == ["answered", "joined", "started"]
    assert told.index("started") < told.index("answered")


def test_close_computes_what_waits() -> None:
    model = FakeModel()
    model.gate.clear()
    with running(model, max_batch_sequences=1) as loop:
        jobs = [submit(loop, 3, 4, token=10 * number) for number in range(1, 5)]
        assert model.begun.acquire(timeout=PATIENCE_S)
        closing = threading.Thread(target=loop.close)
        closing.start()
        wait_until(loop.backlog, lambda: loop.backlog._is_closing)
        model.gate.set()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        assert [len(rows_of(job)) for job in jobs] == [2] * 4
        loop.close()  # a second time: nothing happens


def test_of_a_withdrawn_job_the_rest_is_not_computed() -> None:
    model = FakeModel()
    model.gate.clear()
    with running(model) as loop:
        submit(loop, 3)
        assert model.begun.acquire(timeout=PATIENCE_S)
        withdrawn, kept = submit(loop, 4, 4, token=10), submit(loop, 5, token=20)
        loop.backlog.withdraw(withdrawn)
        model.gate.set()
        rows_of(kept)
        assert sum(len(batch) for batch in model.batches) == 2
        assert not withdrawn.answer.done()
