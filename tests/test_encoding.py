"""Jobs on their way to the backlog: who is encoded first, how far ahead, and what a bad one does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from core.backlog import Backlog
from core.encoding import EncodeThreads
from core.errors import DeviceFailure, InvalidInput
from core.job import MAX_INTERACTIVE_ROWS, SLICE, Call, Job
from core.sequence import Tokens, Wanted
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.loops import DENSE, backlog_of, num_waiting, wait_for_waiting, wait_until

#: Tokens of each row of these jobs.
LENGTH = 10


class Encoder:
    """Jobs whose rows are encoded where the test can see it, and hold it."""

    def __init__(self) -> None:
        self.model = FakeModel()
        #: What encoding waits for.
        self.gate = threading.Event()
        self.gate.set()
        #: One count for each slice that has begun.
        self.begun = threading.Semaphore(0)
        #: (name of the job, first row, row behind the last), in the order of beginning; None for an opened job.
        self.steps: list[tuple[str, int | None, int | None]] = []
        #: Called with (name of the job, first row) before a slice is encoded; may raise.
        self.before_slice: Callable[[str, int], None] = lambda name, row: None

    def job(self, name: str, num_rows: int, is_bulk: bool = False, num_bytes: int = 0) -> Job:
        """A job whose rows are all different from any other's."""

        def encode(part: slice) -> list[Tokens]:
            self.steps.append((name, part.start, part.stop))
            self.begun.release()
            assert self.gate.wait(PATIENCE_S)
            self.before_slice(name, part.start)
            return [
                Tokens(np.array([*name.encode().ljust(LENGTH - 1), row], np.int32))
                for row in range(part.start, part.stop)
            ]

        def open_call() -> Call:
            self.steps.append((name, None, None))
            return Call(self.model, Wanted(DENSE), num_rows, encode, lambda rows: rows)

        return Job(open_call, is_bulk, num_bytes)

    def slices_of(self, name: str) -> list[tuple[int, int]]:
        return [(start, stop) for one, start, stop in self.steps if one == name and start is not None and stop]


@contextmanager
def running(encoder: Encoder, num_threads: int = 1, max_waiting_tokens: int = 1_000_000) -> Iterator[EncodeThreads]:
    """Encode threads before a backlog that nobody empties, ended at the end."""
    backlog = backlog_of("fake", max_waiting_tokens=max_waiting_tokens)
    encoding = EncodeThreads(backlog, num_threads)
    try:
        yield encoding
    finally:
        encoder.gate.set()
        encoding.fail_all(DeviceFailure("the test is over"))
        encoding.close()


def backlog_behind(encoding: EncodeThreads) -> Backlog:
    return encoding._backlog


def hold(encoder: Encoder, encoding: EncodeThreads) -> None:
    """Keep the one encode thread inside a slice, so that what is submitted waits."""
    encoder.gate.clear()
    encoding.submit(encoder.job("held", 1))
    assert encoder.begun.acquire(timeout=PATIENCE_S)
    encoder.steps.clear()


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def test_interactive_jobs_go_before_bulk_jobs_and_of_a_class_the_oldest_first(encoder: Encoder) -> None:
    with running(encoder) as encoding:
        hold(encoder, encoding)
        for name in ("bulk 1", "now 1", "bulk 2", "now 2"):
            encoding.submit(encoder.job(name, 1, is_bulk=name.startswith("bulk")))
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 5)
    opened = [name for name, start, _ in encoder.steps if start is None]
    assert opened == ["now 1", "now 2", "bulk 1", "bulk 2"]


def test_a_large_job_is_encoded_in_slices_and_an_interactive_one_goes_between(encoder: Encoder) -> None:
    encoder.gate.clear()
    with running(encoder) as encoding:
        encoding.submit(encoder.job("bulk", 2 * SLICE + 5, is_bulk=True))
        assert encoder.begun.acquire(timeout=PATIENCE_S)
        encoding.submit(encoder.job("now", 1))
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 2 * SLICE + 6)
    assert encoder.slices_of("bulk") == [(0, SLICE), (SLICE, 2 * SLICE), (2 * SLICE, 2 * SLICE + 5)]
    assert [name for name, start, _ in encoder.steps if start is not None] == ["bulk", "now", "bulk", "bulk"]


def test_large_jobs_of_interactive_priority_keep_their_order(encoder: Encoder) -> None:
    num_rows = MAX_INTERACTIVE_ROWS + 1
    with running(encoder) as encoding:
        hold(encoder, encoding)
        for name in "abc":
            encoding.submit(encoder.job(name, num_rows))
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 1 + 3 * num_rows)
        assert backlog_behind(encoding).num_tokens(is_bulk=True) == 3 * num_rows * LENGTH
    # The first slices come with the opening, before anyone knows how large they are.
    later = [name for name, start, _ in encoder.steps if start]
    assert later == sorted(later)


def test_several_threads_work_on_one_large_job(encoder: Encoder) -> None:
    encoder.gate.clear()
    with running(encoder, num_threads=3) as encoding:
        encoding.submit(encoder.job("large", 20 * SLICE))
        for _ in range(2):  # two slices are under way at once
            assert encoder.begun.acquire(timeout=PATIENCE_S)
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 20 * SLICE)
    assert sorted(encoder.slices_of("large")) == [(row * SLICE, (row + 1) * SLICE) for row in range(20)]
    assert [step for step in encoder.steps if step[1] is None] == [("large", None, None)]


def test_a_class_without_room_waits_and_goes_on_and_the_other_is_not_held_up(encoder: Encoder) -> None:
    max_tokens = 2 * SLICE * LENGTH
    ahead: list[tuple[str, int]] = []
    with running(encoder, max_waiting_tokens=max_tokens) as encoding:
        backlog = backlog_behind(encoding)
        encoder.before_slice = lambda name, row: ahead.append((name, backlog.num_tokens(name == "bulk")))
        encoding.submit(encoder.job("bulk", 10 * SLICE, is_bulk=True))
        wait_until(backlog, lambda: backlog.num_tokens(is_bulk=True) >= max_tokens)
        encoding.submit(encoder.job("now", 5))
        wait_until(backlog, lambda: backlog.num_tokens(is_bulk=False) > 0)
        assert len(encoder.slices_of("bulk")) == 2
        num_taken = 0
        while num_taken < 10 * SLICE + 5:
            num_taken += len(backlog.next_batch(must_wait=True))
    assert len(encoder.slices_of("bulk")) == 10
    assert max(tokens for name, tokens in ahead if name == "bulk") < max_tokens


def test_withdrawing_makes_room_for_the_next(encoder: Encoder) -> None:
    with running(encoder, max_waiting_tokens=SLICE * LENGTH) as encoding:
        backlog = backlog_behind(encoding)
        first = encoder.job("first", 2 * SLICE)
        encoding.submit(first)
        wait_for_waiting(backlog, SLICE)
        encoding.submit(encoder.job("second", SLICE - 1))
        first.answer.cancel()
        encoding.withdraw(first)
        backlog.withdraw(first)
        wait_for_waiting(backlog, SLICE - 1)
    assert encoder.slices_of("first") == [(0, SLICE)]


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


def test_a_job_without_rows_is_answered(encoder: Encoder) -> None:
    with running(encoder) as encoding:
        job = encoder.job("empty", 0, num_bytes=3)
        encoding.submit(job)
        assert job.answer.result(PATIENCE_S) == {"dense": []}
    assert encoder.slices_of("empty") == []


def test_a_cancelled_job_is_neither_opened_nor_encoded_and_its_bytes_are_free_at_once(encoder: Encoder) -> None:
    with running(encoder) as encoding:
        hold(encoder, encoding)
        jobs = [encoder.job(name, 1, is_bulk=True, num_bytes=10) for name in "abc"]
        for job in jobs:
            encoding.submit(job)
        assert encoding.num_bytes(is_bulk=True) == 30
        jobs[1].answer.cancel()  # not the next one in turn
        encoding.withdraw(jobs[1])
        assert encoding.num_bytes(is_bulk=True) == 20
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 3)
    assert {name for name, *_ in encoder.steps} == {"a", "c"}


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


def test_bytes_are_counted_by_class_and_none_are_left(encoder: Encoder) -> None:
    with running(encoder, num_threads=2) as encoding:
        encoder.gate.clear()
        encoding.submit(encoder.job("small", 1, num_bytes=1))
        encoding.submit(encoder.job("large", 5 * MAX_INTERACTIVE_ROWS, num_bytes=10))
        for _ in range(2):
            assert encoder.begun.acquire(timeout=PATIENCE_S)
        # Who is wholly under way waits no more; who has slices left does, in the class it turned out to be.
        assert (encoding.num_bytes(is_bulk=False), encoding.num_bytes(is_bulk=True)) == (0, 10)
        encoding.submit(encoder.job("bulk", 1, is_bulk=True, num_bytes=100))
        encoding.submit(encoder.job("now", 1, num_bytes=1000))
        assert (encoding.num_bytes(is_bulk=False), encoding.num_bytes(is_bulk=True)) == (1000, 110)
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 5 * MAX_INTERACTIVE_ROWS + 3)
        assert (encoding.num_bytes(is_bulk=False), encoding.num_bytes(is_bulk=True)) == (0, 0)


def test_close_encodes_what_waits_and_refuses_what_comes(encoder: Encoder) -> None:
    with running(encoder, num_threads=3, max_waiting_tokens=SLICE * LENGTH) as encoding:
        encoder.gate.clear()
        for name in "abcdef":
            encoding.submit(encoder.job(name, SLICE))
        assert encoder.begun.acquire(timeout=PATIENCE_S)
        closing = threading.Thread(target=encoding.close)
        closing.start()
        backlog = backlog_behind(encoding)
        wait_until(backlog, lambda: encoding._is_closing)
        with pytest.raises(DeviceFailure, match="closed"):
            encoding.submit(encoder.job("late", 1))
        encoder.gate.set()
        num_taken = 0
        while num_taken < 6 * SLICE:  # there is room for one at a time
            num_taken += len(backlog.next_batch(must_wait=True))
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
    assert {name for name, *_ in encoder.steps} == set("abcdef")


def test_when_the_device_is_dead_who_waits_is_told_and_close_returns(encoder: Encoder) -> None:
    with running(encoder, max_waiting_tokens=SLICE * LENGTH) as encoding:
        backlog = backlog_behind(encoding)
        under_way, waiting = encoder.job("under way", 3 * SLICE, num_bytes=5), encoder.job("waiting", 1, num_bytes=7)
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
