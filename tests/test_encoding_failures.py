"""Jobs that fail on their way to the backlog: who is told, and that nobody else is touched."""

from __future__ import annotations

import pytest

from embedq.core.batching.job import SLICE, Call, Job
from embedq.core.errors import DeviceFailure, InvalidInput
from tests.checkpoints import PATIENCE_S
from tests.encoders import LENGTH, Encoder, backlog_behind, hold, running
from tests.loops import num_waiting, wait_for_waiting, wait_until


@pytest.mark.parametrize("bad_row", [0, SLICE])
def test_a_bad_text_fails_its_job_alone_and_what_of_it_waits_leaves(encoder: Encoder, bad_row: int) -> None:
    def refuse(name: str, row: int) -> None:
        if (name, row) == ("bad", bad_row):
            raise InvalidInput(f"text {row} cannot be encoded")

    encoder.before_slice = refuse
    with running(encoder) as encoding:
        hold(encoder, encoding)
        bad, good = encoder.job("bad", 3 * SLICE), encoder.job("good", 7)
        encoding.submit(bad)
        encoding.submit(good)
        encoder.gate.set()
        assert str(bad.answer.exception(PATIENCE_S)) == f"text {bad_row} cannot be encoded"
        wait_for_waiting(backlog_behind(encoding), 1 + 7)
        assert not good.is_over
    assert encoder.slices_of("bad")[-1][0] == bad_row  # of a job that failed the rest is not encoded


def test_what_opening_raises_is_the_answer(encoder: Encoder) -> None:
    def open_call() -> Call:
        raise InvalidInput("texts must be a list")

    with running(encoder) as encoding:
        job = Job(open_call, is_bulk=False, num_bytes=5)
        encoding.submit(job)
        assert str(job.answer.exception(PATIENCE_S)) == "texts must be a list"
        encoding.submit(encoder.job("next", 1))
        wait_for_waiting(backlog_behind(encoding), 1)
        assert encoding.num_bytes(is_bulk=False) == 0


def test_a_tokenizer_that_panics_fails_its_job_and_not_the_thread(encoder: Encoder) -> None:
    class PanicException(BaseException):
        """As extensions in Rust raise it."""

    def panic(name: str, row: int) -> None:
        if name == "bad":
            raise PanicException("the secret text")

    encoder.before_slice = panic
    with running(encoder) as encoding:
        bad = encoder.job("bad", 1)
        encoding.submit(bad)
        failure = bad.answer.exception(PATIENCE_S)
        assert isinstance(failure, InvalidInput)
        assert "PanicException" in str(failure)
        assert "secret" not in str(failure)
        encoding.submit(encoder.job("next", 1))
        wait_for_waiting(backlog_behind(encoding), 1)


def test_a_job_that_failed_elsewhere_is_not_encoded_further(encoder: Encoder) -> None:
    encoder.gate.clear()
    with running(encoder) as encoding:
        job = encoder.job("job", 3 * SLICE)
        encoding.submit(job)
        assert encoder.begun.acquire(timeout=PATIENCE_S)
        job.fail(DeviceFailure("its first row failed"))
        encoding.submit(encoder.job("next", 1))
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 1)
    assert encoder.slices_of("job") == [(0, SLICE)]


def test_when_the_device_is_dead_who_waits_is_told_and_close_returns(encoder: Encoder) -> None:
    with running(encoder, max_waiting_tokens=SLICE * LENGTH) as encoding:
        backlog = backlog_behind(encoding)
        under_way, waiting = (
            encoder.job("under way", 3 * SLICE, num_bytes=5),
            encoder.job("waiting", 1, num_bytes=20_000),
        )
        encoding.submit(under_way)
        encoding.submit(waiting)
        wait_until(backlog, lambda: num_waiting(backlog) == SLICE)
        reason = DeviceFailure("the device is gone")
        backlog.fail_all(reason)
        encoding.fail_all(reason)
        assert [job.answer.exception(PATIENCE_S) for job in (under_way, waiting)] == [reason, reason]
        assert encoding.num_bytes(is_bulk=False) == 0
        with pytest.raises(DeviceFailure, match="the device is gone"):
            encoding.submit(encoder.job("late", 1))
        encoding.close()


def test_a_job_that_is_being_encoded_when_the_device_dies_is_told(encoder: Encoder) -> None:
    with running(encoder) as encoding:
        encoder.gate.clear()
        job = encoder.job("job", 3 * SLICE)
        encoding.submit(job)
        assert encoder.begun.acquire(timeout=PATIENCE_S)
        reason = DeviceFailure("the device is gone")
        encoding.fail_all(reason)  # first here: what comes of the job later finds the backlog dead
        backlog_behind(encoding).fail_all(reason)
        encoder.gate.set()
        assert job.answer.exception(PATIENCE_S) is reason
        encoding.close()
