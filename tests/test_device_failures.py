"""Passes that fail: whose jobs are told, and when the device itself is given up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedq.core.errors import DeviceFailure, DeviceOutOfMemory, EmbedqError
from embedq.core.sequence import Sequence
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.loops import error_of, expected_of, num_waiting, raise_on_token, rows_of, running, submit, wait_until

DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda:0"])

#: Seconds without progress after which a pass counts as hung, where one is to hang.
HANG_TIMEOUT_S = 0.05


def broken(batch: list[Sequence]) -> None:
    """Fail every pass, the probe's too."""
    raise RuntimeError("an illegal memory access was encountered")


@DEVICES
def test_a_sequence_that_makes_the_model_raise_fails_its_job_alone(device: str) -> None:
    model = FakeModel()
    model.device = device
    model.before_rows = raise_on_token(22, RuntimeError("index out of range"))
    model.gate.clear()
    with running(model, max_batch_sequences=6) as loop:
        blocker = submit(loop, 3, token=90)
        assert model.begun.acquire(timeout=PATIENCE_S)
        jobs = {10: submit(loop, 4, 4, token=10), 20: submit(loop, 4, 4, 4, token=20), 30: submit(loop, 4, token=30)}
        model.gate.set()
        failure = error_of(jobs.pop(20))
        for token, job in jobs.items():
            np.testing.assert_array_equal(rows_of(job), expected_of(4, 4, token=token)[: len(job.sequences)])
        assert isinstance(failure, DeviceFailure)
        assert "model fake failed on a single sequence: RuntimeError: index out of range" in str(failure)
        assert 6 in [len(batch) for batch in model.batches]  # they did share a pass
        assert rows_of(blocker)
        assert rows_of(submit(loop, 2))  # and the loop goes on
        assert loop.reasons == []


def test_of_a_job_that_failed_no_more_is_computed() -> None:
    model = FakeModel()
    model.before_rows = raise_on_token(2, RuntimeError("index out of range"))
    with running(model, max_batch_sequences=1) as loop:
        failed = submit(loop, *[4] * 100, token=2)
        assert isinstance(error_of(failed), DeviceFailure)
        wait_until(loop.backlog, lambda: num_waiting(loop.backlog) == 0)
        assert rows_of(submit(loop, 5, token=200))
        assert len(model.batches) < 10  # the failed one, the probe, what was under way meanwhile


def test_both_jobs_of_a_shared_text_are_told_that_it_failed() -> None:
    model = FakeModel()
    model.before_rows = raise_on_token(20, RuntimeError("index out of range"))
    model.gate.clear()
    with running(model) as loop:
        submit(loop, 3)
        assert model.begun.acquire(timeout=PATIENCE_S)
        first, second = submit(loop, 4, 4, token=20), submit(loop, 4, token=20)
        model.gate.set()
        assert isinstance(error_of(first), DeviceFailure)
        assert isinstance(error_of(second), DeviceFailure)


def test_an_error_of_ours_reaches_the_job_as_it_is() -> None:
    model = FakeModel()
    error = DeviceOutOfMemory("4 tokens do not fit")
    model.before_rows = raise_on_token(2, error)
    with running(model) as loop:
        assert error_of(submit(loop, 4, token=2)) is error


@pytest.mark.parametrize("error", [MemoryError(), KeyError("x"), StopIteration(), OSError("gone")], ids=repr)
def test_every_failure_is_one_of_ours(error: Exception) -> None:
    model = FakeModel()
    model.before_rows = raise_on_token(2, error)
    with running(model) as loop:
        assert isinstance(error_of(submit(loop, 2, token=2)), EmbedqError)


@DEVICES
@pytest.mark.parametrize("output", ["dense", "colbert"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_cannot_be_right_fail_their_job_alone(value: float, output: str, device: str) -> None:
    model = FakeModel()
    model.device = device
    model.gate.clear()

    def spoil(rows: dict[str, Any]) -> dict[str, Any]:
        culprits = [index for index, one in enumerate(model.batches[-1]) if 20 in one.tokens.ids]
        for values in rows.values():
            for index in culprits:
                values[index][...] = value
        return rows

    model.after_rows = spoil
    with running(model) as loop:
        outputs = frozenset({output})
        submit(loop, 4)  # the rest is one batch, which nothing follows
        assert model.begun.acquire(timeout=PATIENCE_S)
        bad, good = submit(loop, 4, token=20, outputs=outputs), submit(loop, 4, 4, token=30, outputs=outputs)
        model.gate.set()
        failure = error_of(bad)
        assert isinstance(failure, DeviceFailure)
        assert f"NaN or infinite {output} values in float32" in str(failure)
        assert len(rows_of(good, output)) == 2


def _drop_last(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: values[:-1] for name, values in rows.items()}


@pytest.mark.parametrize("after_rows", [_drop_last, lambda rows: {}, lambda rows: None], ids=["few", "none", "nothing"])
def test_a_device_that_gives_nothing_right_is_given_up(after_rows: Callable[[Any], Any]) -> None:
    model = FakeModel()
    model.after_rows = after_rows
    with running(model) as loop:
        assert "cpu fails every pass of model fake" in str(error_of(submit(loop, 4, 4)))


@DEVICES
def test_a_device_that_fails_every_pass_is_given_up_and_every_job_told(device: str) -> None:
    model = FakeModel()
    model.device = device
    model.before_rows = broken
    model.gate.clear()
    with running(model, max_batch_sequences=4) as loop:
        jobs = [submit(loop, *[4] * 10, token=20 * number) for number in range(1, 6)]
        assert model.begun.acquire(timeout=PATIENCE_S)
        model.gate.set()
        failures = [error_of(job) for job in jobs]
        assert loop.is_dead.is_set() or loop.is_dead.wait(PATIENCE_S)
        assert len(loop.reasons) == 1
        assert f"{device} fails every pass of model fake" in loop.reasons[0]
        assert "illegal memory access" in loop.reasons[0]
        assert all(isinstance(failure, DeviceFailure) and str(failure) == loop.reasons[0] for failure in failures)
        late = submit(loop, 3)
        assert str(error_of(late)) == loop.reasons[0]


def test_a_device_that_is_well_is_not_given_up_however_many_texts_fail() -> None:
    model = FakeModel()
    model.before_rows = lambda batch: broken(batch) if max(one.length for one in batch) > 1 else None
    with running(model) as loop:
        for number in range(20):
            assert "failed on a single sequence" in str(error_of(submit(loop, 4, token=2 + number)))
        assert loop.reasons == []


def test_whatever_ends_the_device_thread_every_job_is_told() -> None:
    class Panic(BaseException):
        """As an extension raises it."""

    model = FakeModel()
    model.before_rows = raise_on_token(20, Panic("of an extension"))
    model.gate.clear()
    with running(model, max_batch_sequences=1) as loop:
        jobs = [submit(loop, 4, token=token) for token in (20, 30, 40)]
        assert model.begun.acquire(timeout=PATIENCE_S)
        model.gate.set()
        assert [str(error_of(job)) for job in jobs] == ["the device thread ended with Panic: of an extension"] * 3


@DEVICES
def test_a_pass_that_hangs_gives_the_device_up_and_close_does_not_wait_for_it(device: str) -> None:
    model = FakeModel()
    model.device = device
    model.gate.clear()
    with running(model, hang_timeout_s=HANG_TIMEOUT_S, max_batch_sequences=1) as loop:
        jobs = [submit(loop, 4, token=token) for token in (20, 30, 40)]
        assert "no progress" in str(error_of(jobs[0]))
        assert [str(error_of(job)) for job in jobs] == [str(error_of(jobs[0]))] * 3
        loop.close()
        assert loop.device._thread.is_alive()  # it hangs on
        model.gate.set()
        loop.device._thread.join(PATIENCE_S)
        assert not loop.device._thread.is_alive()
        assert len(loop.reasons) == 1


def test_close_returns_when_a_pass_hangs_that_it_waits_for() -> None:
    model = FakeModel()
    model.gate.clear()
    with running(model, hang_timeout_s=HANG_TIMEOUT_S) as loop:
        job = submit(loop, 4)
        closing = threading.Thread(target=loop.close)
        closing.start()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        assert "no progress" in str(error_of(job))


def test_a_hung_pass_that_fails_in_the_end_gives_up_nothing_again() -> None:
    model = FakeModel()
    model.before_rows = broken
    model.gate.clear()
    with running(model, hang_timeout_s=HANG_TIMEOUT_S) as loop:
        assert "no progress" in str(error_of(submit(loop, 4)))
        model.gate.set()
        loop.device._thread.join(PATIENCE_S)
        assert len(loop.reasons) == 1
