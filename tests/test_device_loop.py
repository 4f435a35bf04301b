"""The one thread that touches the models: whose rows go where, and whose failure is whose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from core.device_loop import DeviceLoop, Job
from core.errors import DeviceFailure, DeviceOutOfMemory, EmbedqError, InvalidSettings
from core.sequence import Sequence, Tokens, Wanted
from core.settings import Settings, read_settings
from tests.checkpoints import PATIENCE_S, FakeModel, row_of

DENSE = frozenset({"dense"})


@contextmanager
def running(*models: FakeModel, **limits: Any) -> Iterator[DeviceLoop]:
    """A device loop over `models`, closed at the end with every gate open."""
    loop = DeviceLoop({model.spec.alias: model for model in models}, settings(**limits))
    try:
        yield loop
    finally:
        for model in models:
            model.gate.set()
        loop.close()


def settings(**limits: Any) -> Settings:
    return read_settings(**{"max_waiting_tokens": 100_000, **limits})


def submit(loop: DeviceLoop, *lengths: int, outputs: frozenset[str] = DENSE, alias: str = "fake") -> Job:
    """A job of one sequence per length; sequence number i consists of the token i + 1."""
    wanted = Wanted(outputs)
    job = Job(len(lengths), wanted)
    loop.submit(
        Sequence(Tokens(np.full(length, row + 1, np.int32)), job, row, (alias, wanted))
        for row, length in enumerate(lengths)
    )
    return job


def rows_of(job: Job, output: str = "dense") -> Any:
    """The job's rows of one output, waited for."""
    return job.done.result(PATIENCE_S)[output]


def error_of(job: Job) -> BaseException | None:
    return job.done.exception(PATIENCE_S)


def wait_until(loop: DeviceLoop, is_so: Callable[[], bool]) -> None:
    """Wait for the loop to change until `is_so()`."""
    with loop._changed:
        assert loop._changed.wait_for(is_so, PATIENCE_S)


def raise_on_token(token: int, error: BaseException) -> Callable[[list[Sequence]], None]:
    """What makes a `FakeModel` fail on every batch that holds `token`."""

    def fail(batch: list[Sequence]) -> None:
        if any(token in one.tokens.ids for one in batch):
            raise error

    return fail


def test_each_row_goes_to_its_place_in_its_job() -> None:
    with running(FakeModel()) as loop:
        first, second = submit(loop, 9, 3, 5), submit(loop, 4, 8)
        np.testing.assert_array_equal(rows_of(first), [row_of(np.full(n, i + 1)) for i, n in enumerate((9, 3, 5))])
        np.testing.assert_array_equal(rows_of(second), [row_of(np.full(n, i + 1)) for i, n in enumerate((4, 8))])


def test_what_waits_while_the_device_works_shares_the_next_pass() -> None:
    model = FakeModel()
    model.gate.clear()
    with running(model) as loop:
        submit(loop, 3)
        assert model.begun.acquire(timeout=PATIENCE_S)
        jobs = [submit(loop, 4, 5) for _ in range(10)]
        model.gate.set()
        for job in jobs:
            rows_of(job)
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


def test_a_sequence_that_makes_the_model_raise_fails_its_job_alone() -> None:
    model = FakeModel()
    model.before_rows = raise_on_token(3, RuntimeError("index out of range"))
    model.gate.clear()
    with running(model) as loop:
        blocker = submit(loop, 1)
        assert model.begun.acquire(timeout=PATIENCE_S)
        good, bad, also_good = submit(loop, 4, 4), submit(loop, 4, 4, 4), submit(loop, 4)
        model.gate.set()
        assert len(rows_of(good)) == 2
        assert len(rows_of(also_good)) == 1
        failure = error_of(bad)
        assert isinstance(failure, DeviceFailure)
        assert "model fake" in str(failure)
        assert "RuntimeError" in str(failure)
        assert len(model.batches[1]) == 6  # they did share a pass
        assert rows_of(blocker)
        assert rows_of(submit(loop, 2))  # and the loop goes on


def test_an_error_of_ours_reaches_the_job_as_it_is() -> None:
    model = FakeModel()
    error = DeviceOutOfMemory("4 tokens do not fit")
    model.before_rows = raise_on_token(1, error)
    with running(model) as loop:
        assert error_of(submit(loop, 4)) is error


def _drop_last(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: values[:-1] for name, values in rows.items()}


def _add_one(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: [*values, values[0]] for name, values in rows.items()}


def _spoil(value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def spoil(rows: dict[str, Any]) -> dict[str, Any]:
        for values in rows.values():
            values[0][...] = value
        return rows

    return spoil


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_drop_last, "0 {output} rows for 1 sequences"),
        (_add_one, "2 {output} rows for 1 sequences"),
        (lambda rows: {}, "no {output} rows"),
        (lambda rows: None, "model fake"),
        (_spoil(np.nan), "NaN or infinite {output}"),
        (_spoil(np.inf), "NaN or infinite {output}"),
    ],
    ids=["one too few", "one too many", "output missing", "nothing", "nan", "infinite"],
)
@pytest.mark.parametrize("output", ["dense", "colbert"])
def test_rows_that_cannot_be_right_fail_the_job_and_not_the_loop(
    spoil: Callable[[Any], Any], told: str, output: str
) -> None:
    model = FakeModel()
    model.after_rows = spoil
    with running(model) as loop:
        failure = error_of(submit(loop, 4, outputs=frozenset({output})))
        assert isinstance(failure, DeviceFailure)
        assert told.format(output=output) in str(failure)
        model.after_rows = lambda rows: rows
        assert len(rows_of(submit(loop, 4, 4))) == 2


def test_a_job_without_rows_is_done_at_once() -> None:
    assert Job(0, Wanted(DENSE)).done.result(0) == {"dense": []}


def test_close_finishes_what_waits_and_refuses_what_comes() -> None:
    model = FakeModel()
    model.gate.clear()
    with running(model) as loop:
        jobs = [submit(loop, 3)]
        assert model.begun.acquire(timeout=PATIENCE_S)
        jobs += [submit(loop, 3, 4) for _ in range(5)]
        closing = threading.Thread(target=loop.close)
        closing.start()
        wait_until(loop, lambda: loop._is_closing)
        with pytest.raises(DeviceFailure, match="closed"):
            submit(loop, 1)
        model.gate.set()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        assert [len(rows_of(job)) for job in jobs] == [1, 2, 2, 2, 2, 2]
        loop.close()  # a second time: nothing happens


def test_a_call_waits_for_room_and_goes_on_when_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(max_length=1000)
    model.gate.clear()
    num_callers = 12
    together = threading.Barrier(num_callers)
    with running(model, max_waiting_tokens=1000) as loop, ThreadPoolExecutor(num_callers) as callers:
        waiting_before: list[int] = []
        add = loop.scheduler.add

        def watched_add(sequences: Iterable[Sequence]) -> None:
            waiting_before.append(loop.scheduler.num_tokens)
            add(sequences)

        def call() -> Job:
            together.wait(PATIENCE_S)
            return submit(loop, 400)

        monkeypatch.setattr(loop.scheduler, "add", watched_add)
        called = [callers.submit(call) for _ in range(num_callers)]
        wait_until(loop, lambda: loop.scheduler.num_tokens >= 1000)
        model.gate.set()
        assert [len(rows_of(job.result(PATIENCE_S))) for job in called] == [1] * num_callers
        assert len(waiting_before) == num_callers
        assert max(waiting_before) < 1000


def test_a_caller_that_waits_for_room_is_refused_when_the_loop_closes() -> None:
    model = FakeModel(max_length=1000)
    model.gate.clear()
    with running(model, max_waiting_tokens=1000, max_batch_tokens=1000) as loop, ThreadPoolExecutor(2) as callers:
        submit(loop, 900)
        assert model.begun.acquire(timeout=PATIENCE_S)
        submit(loop, 1000)
        late = callers.submit(submit, loop, 5)
        closing = callers.submit(loop.close)
        assert isinstance(late.exception(PATIENCE_S), DeviceFailure)
        model.gate.set()
        closing.result(PATIENCE_S)


def test_a_withdrawn_job_is_not_computed_and_its_room_is_free() -> None:
    model = FakeModel()
    model.gate.clear()
    with running(model) as loop:
        submit(loop, 3)
        assert model.begun.acquire(timeout=PATIENCE_S)
        withdrawn, kept = submit(loop, 4, 4), submit(loop, 5)
        loop.withdraw(withdrawn)
        assert loop.scheduler.num_tokens == 5
        model.gate.set()
        assert len(rows_of(kept)) == 1
        assert sum(len(batch) for batch in model.batches) == 2
        assert not withdrawn.done.done()


@pytest.mark.parametrize(
    ("device", "max_length", "asked", "budget"),
    [("cpu", 64, None, 2048), ("cpu", 8192, None, 2048), ("cuda:0", 64, None, 16_384), ("cpu", 64, 64, 64)],
)
def test_the_budget_is_the_settings_or_the_devices_whatever_the_longest_sequence(
    device: str, max_length: int, asked: int | None, budget: int
) -> None:
    model = FakeModel(max_length=max_length)
    model.device = device
    with running(model, max_batch_tokens=asked) as loop:
        assert loop.scheduler.max_batch_tokens == budget


def test_a_budget_that_the_longest_sequence_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidSettings, match=r"max_batch_tokens is 63 .* 64 tokens.*EMBEDQ_MAX_BATCH_TOKENS"):
        DeviceLoop({"fake": FakeModel(max_length=64)}, settings(max_batch_tokens=63))


def test_every_failure_is_one_of_ours() -> None:
    for error in (MemoryError(), KeyError("x"), StopIteration(), OSError("gone")):
        model = FakeModel()
        model.before_rows = raise_on_token(1, error)
        with running(model) as loop:
            assert isinstance(error_of(submit(loop, 2)), EmbedqError)
