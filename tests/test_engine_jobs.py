"""Jobs of the engine: started, answered, or given up by whoever waits for them. Over a fake model."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from embedq.core.batching.job import MAX_INTERACTIVE_ROWS, Job
from embedq.core.engine import Engine
from embedq.core.errors import InvalidInput
from tests.checkpoints import PATIENCE_S, FakeModel, expected_rows
from tests.engines import busy, left_over, running
from tests.loops import num_waiting, wait_for_waiting, wait_until


def test_a_job_is_told_that_it_started_and_its_answer_is_a_future(engine: Engine, model: FakeModel) -> None:
    has_started = threading.Event()
    with busy(engine, model):
        job = engine.submit(lambda: engine.calls.embed(["a", "b"]), num_bytes=2, on_started=has_started.set)
        wait_for_waiting(engine.backlog, 2)
        assert not has_started.is_set()
    np.testing.assert_array_equal(job.answer.result(PATIENCE_S).dense, expected_rows(["a", "b"]))
    assert has_started.is_set()


def test_what_opening_a_call_raises_is_the_answer(engine: Engine) -> None:
    job = engine.submit(lambda: engine.calls.embed(["a", 1]))  # type: ignore[list-item]
    assert isinstance(job.answer.exception(PATIENCE_S), InvalidInput)


def test_a_cancelled_job_leaves_and_its_texts_are_not_computed(engine: Engine, model: FakeModel) -> None:
    with busy(engine, model):
        job = engine.submit(lambda: engine.calls.embed(["a", "b"]))
        other = engine.submit(lambda: engine.calls.embed(["b", "c"]))
        wait_for_waiting(engine.backlog, 3)
        assert job.answer.cancel()
        wait_for_waiting(engine.backlog, 2)
    np.testing.assert_array_equal(other.answer.result(PATIENCE_S).dense, expected_rows(["b", "c"]))
    assert [len(batch) for batch in model.batches] == [1, 2]
    assert left_over(engine) == (0, 0, 0, 0)


def test_a_cancelled_job_that_waits_to_be_encoded_frees_its_bytes_at_once(model: FakeModel) -> None:
    encode, begun, gate = model.encode_texts, threading.Event(), threading.Event()

    def held(*given: Any) -> Any:
        begun.set()
        assert gate.wait(PATIENCE_S)
        return encode(*given)

    model.encode_texts = held  # type: ignore[assignment,method-assign]
    with running(model, encode_threads=1) as engine:
        first, second, third = (
            engine.submit(lambda text=text: engine.calls.embed([text]), num_bytes=10_000)  # type: ignore[misc]
            for text in "abc"
        )
        assert begun.wait(PATIENCE_S)
        second.answer.cancel()
        num_bytes = engine.encoding.num_bytes(is_bulk=False)
        gate.set()
        assert [len(job.answer.result(PATIENCE_S)) for job in (first, third)] == [1, 1]
    assert num_bytes == 10_000
    assert sum(map(len, model.batches)) == 2


def test_a_job_cancelled_while_it_is_computed_gets_no_answer(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    job = engine.submit(lambda: engine.calls.embed(["a", "b"]))
    assert model.begun.acquire(timeout=PATIENCE_S)
    assert job.answer.cancel()
    model.gate.set()
    assert len(engine.embed(["c"])) == 1
    with pytest.raises(CancelledError):
        job.answer.result(0)


@pytest.mark.parametrize(("priority", "is_bulk"), [(0, False), (4, False), (5, True), (9, True)])
def test_priorities_are_two_classes(engine: Engine, model: FakeModel, priority: int, is_bulk: bool) -> None:
    with busy(engine, model):
        engine.submit(lambda: engine.calls.embed(["abc"]), priority)
        wait_for_waiting(engine.backlog, 1)
        assert engine.backlog.num_tokens(is_bulk) == 3


def test_a_large_job_is_bulk_whatever_its_priority(engine: Engine, model: FakeModel) -> None:
    texts = [f"{number:05}" for number in range(MAX_INTERACTIVE_ROWS + 1)]
    with busy(engine, model):
        for count, is_bulk in [(len(texts), True), (len(texts) - 1, False)]:
            job = engine.submit(lambda count=count: engine.calls.embed(texts[:count]), 0)  # type: ignore[misc]
            wait_for_waiting(engine.backlog, count)
            assert engine.backlog.num_tokens(is_bulk) == 5 * count
            job.answer.cancel()


def test_a_caller_that_is_interrupted_withdraws_its_job(engine: Engine, model: FakeModel) -> None:
    class Interrupted(BaseException):
        """As Ctrl-C raises it."""

    def interrupt(*given: Any) -> None:
        raise Interrupted

    def submit(*given: Any) -> Job:
        job = submit_job(*given)
        result = job.answer.result

        def result_that_tells() -> Any:
            has_job.set()
            return result()

        job.answer.result = result_that_tells  # type: ignore[assignment,method-assign]
        return job

    def interrupt_once_it_waits() -> None:
        assert has_job.wait(PATIENCE_S)
        wait_for_waiting(engine.backlog, 2)
        os.kill(os.getpid(), signal.SIGUSR1)

    has_job, submit_job = threading.Event(), engine.submit
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with busy(engine, model), ThreadPoolExecutor(1) as other:
            engine.submit = submit  # type: ignore[assignment,method-assign]
            interrupted = other.submit(interrupt_once_it_waits)
            with pytest.raises(Interrupted):
                engine.embed(["a", "b"])
            interrupted.result(PATIENCE_S)
            assert num_waiting(engine.backlog) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("output", ["dense", "colbert"])
def test_callers_that_shared_a_text_may_write_to_their_vectors(engine: Engine, model: FakeModel, output: str) -> None:
    with busy(engine, model):
        jobs = [engine.submit(lambda: engine.calls.embed(["same"] * 2, outputs=[output])) for _ in range(2)]
        wait_until(engine.backlog, lambda: sum(len(job.sequences) for job in jobs) == 4)
    vectors = [row for job in jobs for row in getattr(job.answer.result(PATIENCE_S), output)]
    kept = vectors[0].copy()
    for row in vectors[1:]:
        row[...] = 0
    np.testing.assert_array_equal(vectors[0], kept)
    assert len(model.batches[1]) == 1


def test_done_and_cancelled_jobs_are_freed_without_a_garbage_collection(engine: Engine, model: FakeModel) -> None:
    gc.collect()
    gc.disable()
    try:
        references = []
        for number in range(20):
            job = engine.submit(lambda: engine.calls.embed(["a", "b"]))
            references.append(weakref.ref(job))
            if number % 5:
                job.answer.result(PATIENCE_S)
            else:
                job.answer.cancel()
        del job
        alive = [reference for reference in references if reference()]
        assert len(alive) <= 5  # what each thread had in hand last
    finally:
        gc.enable()


def test_what_waits_is_told_by_model_what_is_not_encoded_yet_divided_like_the_rest(model: FakeModel) -> None:
    other = FakeModel("other")
    with running(model, other, default_embed="fake", encode_threads=1) as engine, busy(engine, model):
        for alias, text in (("fake", "a" * 30), ("other", "b" * 10)):
            engine.submit(lambda alias=alias, text=text: engine.calls.embed([text], model=alias))  # type: ignore[misc]
        wait_for_waiting(engine.backlog, 2)
        assert engine.waiting_by_model() == {"fake": 30, "other": 10}
        begun, gate = threading.Event(), threading.Event()

        def open_late() -> Any:
            begun.set()
            assert gate.wait(PATIENCE_S)
            return engine.calls.embed(["c"], model="other")

        engine.submit(open_late)
        assert begun.wait(PATIENCE_S)
        waits = engine.submit(lambda: engine.calls.embed(["d" * 40], model="other"), num_bytes=320)
        assert engine.waiting_by_model() == {"fake": 60, "other": 20}
        gate.set()
        wait_for_waiting(engine.backlog, 4)
        assert engine.waiting_by_model() == {"fake": 30, "other": 51}
    assert waits.answer.done()
