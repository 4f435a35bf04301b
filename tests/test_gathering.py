"""Small jobs on their way to the backlog: who is encoded in one go, and what gathers for it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from embedq.core.batching.encode_threads import EncodeThreads
from embedq.core.errors import InvalidInput
from tests.checkpoints import PATIENCE_S
from tests.encoders import LENGTH, Encoder, backlog_behind, hold, running
from tests.loops import wait_for_waiting


def test_small_jobs_that_are_encoded_alike_are_encoded_in_one_go_and_each_gets_its_own_rows(encoder: Encoder) -> None:
    with running(encoder) as encoding:
        hold(encoder, encoding)
        named = {
            name: encoder.job(name, num_rows, num_bytes=10, encoded_as=alike)
            for name, num_rows, alike in [("a", 1, "x"), ("b", 3, "x"), ("c", 2, "y"), ("d", 1, None), ("e", 1, None)]
        }
        for job in named.values():
            encoding.submit(job)
        encoder.gate.set()
        wait_for_waiting(backlog_behind(encoding), 9)
    assert encoder.goes == [["held"], ["a", "b"], ["c"], ["d"], ["e"]]
    for name, job in named.items():
        found = [(bytes(one.tokens.ids[:-1].astype(np.uint8)).decode().strip(), one.rows) for one in job.sequences]
        assert found == [(name, [(job, row)]) for row in range(job.call.num_rows)]
        assert job.encoded_s > 0


def test_of_jobs_in_one_go_only_the_one_that_cannot_be_encoded_fails(encoder: Encoder) -> None:
    def refuse(name: str, row: int) -> None:
        if name == "bad":
            raise InvalidInput("not this one")

    encoder.before_slice = refuse
    with running(encoder) as encoding:
        hold(encoder, encoding)
        jobs = {name: encoder.job(name, 1, num_bytes=10, encoded_as="x") for name in ("a", "bad", "b")}
        for job in jobs.values():
            encoding.submit(job)
        encoder.gate.set()
        with pytest.raises(InvalidInput, match="not this one"):
            jobs["bad"].answer.result(PATIENCE_S)
        wait_for_waiting(backlog_behind(encoding), 3)
    assert encoder.goes == [["held"], ["a", "bad", "b"], ["a"], ["bad"], ["b"]]


class Panic(BaseException):
    """As PyO3's, of what Rust code did not expect."""


def test_a_panic_of_the_tokenizer_is_the_answer_of_its_job_and_the_thread_goes_on(encoder: Encoder) -> None:
    def panic(name: str, row: int) -> None:
        if name == "bad":
            raise Panic

    encoder.before_slice = panic
    with running(encoder) as encoding:
        bad = encoder.job("bad", 1)
        encoding.submit(bad)
        with pytest.raises(InvalidInput, match="breaks the tokenizer: Panic"):
            bad.answer.result(PATIENCE_S)
        encoding.submit(encoder.job("good", 1))
        wait_for_waiting(backlog_behind(encoding), 1)


#: Rows of ten batches: those of these backlogs have 2,048 tokens.
NUM_ENOUGH = 10 * 2048 // LENGTH


def ahead(encoder: Encoder, encoding: EncodeThreads) -> None:
    """Let the device have bulk work enough."""
    encoding.submit(encoder.job("enough", NUM_ENOUGH, is_bulk=True))
    wait_for_waiting(backlog_behind(encoding), NUM_ENOUGH)
    encoder.goes.clear()


def test_small_jobs_gather_while_batches_enough_wait(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq.core.batching.encode_threads._GATHERING_S", 10 * PATIENCE_S)
    with running(encoder, num_threads=2) as encoding:
        ahead(encoder, encoding)
        encoding.submit(encoder.job("unknown", 1, True))  # its size: nothing goes with it
        wait_for_waiting(backlog_behind(encoding), NUM_ENOUGH + 1)
        for name in "abcdefgh":
            encoding.submit(encoder.job(name, 1, True, num_bytes=2_000, encoded_as="x"))
        encoding.submit(encoder.job("now", 1, num_bytes=10))  # no interactive work waits for the device
        wait_for_waiting(backlog_behind(encoding), NUM_ENOUGH + 2)
        assert encoder.goes == [["unknown"], ["now"]]
        encoding.submit(encoder.job("i", 1, True, num_bytes=2_000, encoded_as="x"))  # as many as go at once
        wait_for_waiting(backlog_behind(encoding), NUM_ENOUGH + 10)
        assert encoder.goes == [["unknown"], ["now"], [*"abcdefgh"]]


def test_small_jobs_that_gathered_are_encoded_when_their_time_is_over_or_the_device_may_need_them(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(encoder, num_threads=2) as encoding:
        ahead(encoder, encoding)
        backlog = backlog_behind(encoding)
        num_waiting = NUM_ENOUGH
        encoding.submit(encoder.job("soon", 1, True, num_bytes=10))
        wait_for_waiting(backlog, num_waiting + 1)
        monkeypatch.setattr("embedq.core.batching.encode_threads._GATHERING_S", 10 * PATIENCE_S)
        encoding.submit(encoder.job("held", 1, True, num_bytes=10))
        while backlog.is_ahead(is_bulk=True):
            num_waiting -= len(backlog.next_batch(must_wait=True))
        wait_for_waiting(backlog, num_waiting + 2)
    assert encoder.goes == [["soon"], ["held"]]


def test_close_encodes_what_gathers(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq.core.batching.encode_threads._GATHERING_S", 10 * PATIENCE_S)
    with running(encoder, num_threads=2) as encoding:
        ahead(encoder, encoding)
        encoding.submit(encoder.job("small", 1, True, num_bytes=10))
        closing = threading.Thread(target=encoding.close)
        closing.start()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
    assert encoder.goes == [["small"]]
