"""Jobs on their way to the backlog: who is encoded first, and how far ahead."""

from __future__ import annotations

import itertools
import threading

import pytest

from embedq.core.batching.job import MAX_INTERACTIVE_ROWS, SLICE
from embedq.core.errors import DeviceFailure
from tests.checkpoints import PATIENCE_S
from tests.encoders import LENGTH, Encoder, backlog_behind, hold, running
from tests.loops import wait_for_waiting, wait_until


def test_interactive_jobs_go_before_bulk_jobs_and_of_a_class_the_oldest_first(encoder: Encoder) -> None:
    with running(encoder) as encoding:
        hold(encoder, encoding)
        for name in ("bulk 1", "now 1", "bulk 2", "now 2"):
            encoding.submit(encoder.job(name, 1, is_bulk=name.startswith("bulk")))
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 5)
    opened = [name for name, start, _ in encoder.steps if start is None]
    assert opened == ["now 1", "now 2", "bulk 1", "bulk 2"]


def test_bulk_gets_a_turn_though_interactive_jobs_never_cease(encoder: Encoder) -> None:
    with running(encoder, num_threads=2, max_bulk_wait_s=0.5) as encoding:  # longer than a busy machine pauses
        hold(encoder, encoding)
        is_over = threading.Event()
        numbers = itertools.count()

        def one_more(name: str, row: int) -> None:
            if name != "bulk" and not is_over.is_set():
                encoding.submit(encoder.job(f"now {next(numbers)}", 1))

        encoder.before_slice = one_more
        for number in range(8):  # more than the threads: one always waits
            encoding.submit(encoder.job(f"first {number}", 1))
        encoding.submit(encoder.job("bulk", 2 * SLICE, is_bulk=True))
        encoder.gate.set()
        backlog = backlog_behind(encoding)
        try:
            wait_until(backlog, lambda: backlog.num_tokens(is_bulk=True) == 2 * SLICE * LENGTH)
        finally:
            is_over.set()
    steps = [name for name, start, _ in encoder.steps if start is not None]
    first, second = (place for place, name in enumerate(steps) if name == "bulk")
    assert second - first > 2, "one turn at a time: interactive jobs go between"


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


def test_of_two_large_jobs_the_older_is_encoded_whole_first(encoder: Encoder) -> None:
    with running(encoder) as encoding:
        hold(encoder, encoding)
        for name in "ab":
            encoding.submit(encoder.job(name, 3 * SLICE, is_bulk=True))
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 1 + 6 * SLICE)
    assert [name for name, start, _ in encoder.steps if start is not None] == [*"aaabbb"]


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


def test_bytes_are_counted_by_class_and_none_are_left(encoder: Encoder) -> None:
    with running(encoder, num_threads=2) as encoding:
        encoder.gate.clear()
        for job in (
            encoder.job("small", 1, num_bytes=1),
            encoder.job("large", 5 * MAX_INTERACTIVE_ROWS, num_bytes=10),
        ):
            encoding.submit(job)
            assert encoder.begun.acquire(timeout=PATIENCE_S)
        # Who is wholly under way waits no more; who has slices left does, in the class it turned out to be.
        assert (encoding.num_bytes(is_bulk=False), encoding.num_bytes(is_bulk=True)) == (0, 10)
        encoding.submit(encoder.job("bulk", 1, is_bulk=True, num_bytes=100))
        encoding.submit(encoder.job("now", 1, num_bytes=1000))
        assert (encoding.num_bytes(is_bulk=False), encoding.num_bytes(is_bulk=True)) == (1000, 110)
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 5 * MAX_INTERACTIVE_ROWS + 3)
        assert (encoding.num_bytes(is_bulk=False), encoding.num_bytes(is_bulk=True)) == (0, 0)


def test_small_jobs_that_wait_are_handed_over_together_and_a_large_one_alone(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(encoder, num_threads=1) as encoding:
        backlog = backlog_behind(encoding)
        added: list[int] = []
        add = backlog.add
        monkeypatch.setattr(backlog, "add", lambda encoded: (added.append(len(encoded)), add(encoded)))
        encoder.gate.clear()
        encoding.submit(encoder.job("first", 1, num_bytes=10))
        assert encoder.begun.acquire(timeout=PATIENCE_S)
        for name, num_bytes in [("a", 10), ("b", 10), ("c", 10), ("large", 1_000_000), ("d", 10), ("unknown", 0)]:
            encoding.submit(encoder.job(name, 1, num_bytes=num_bytes))
        encoder.gate.set()
        wait_for_waiting(backlog, 7)
    assert added == [1, 3, 1, 1, 1]


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
