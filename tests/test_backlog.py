"""What waits for the device: equal texts are one sequence, a class has its room, and who leaves leaves nothing behind."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedq.core.batching.backlog import Backlog, Encoded
from embedq.core.batching.job import Job
from embedq.core.errors import DeviceFailure
from embedq.core.sequence import Sequence, Tokens
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.loops import DENSE, backlog_of, job_of, num_waiting, tokens_of

MODELS = {alias: FakeModel(alias) for alias in ("one", "two")}


@pytest.fixture
def backlog() -> Backlog:
    """A backlog for two models that nobody empties."""
    return backlog_of(*MODELS)


def added(
    backlog: Backlog, tokens: list[Tokens], alias: str = "one", outputs: frozenset[str] = DENSE, is_bulk: bool = False
) -> Job:
    """A job with these sequences that wait."""
    job = job_of(MODELS[alias], len(tokens), outputs, is_bulk)
    backlog.add([Encoded(job, 0, tokens)])
    return job


def compute(backlog: Backlog, batch: list[Sequence]) -> None:
    """Answer `batch` as the device loop does: a sequence's row is its first token."""
    rows = {name: np.array([[one.tokens.ids[0]] for one in batch], np.float32) for name in batch[0].wanted.outputs}
    for index, places in enumerate(backlog.answered(batch)):
        for job, row in places:
            job.deliver(row, index, rows, is_shared=len(places) > 1)


def compute_all(backlog: Backlog) -> int:
    """Compute until nothing waits; returns how many sequences there were."""
    batches = list(iter(lambda: backlog.next_batch(must_wait=False), []))
    for batch in batches:
        compute(backlog, batch)
    return sum(map(len, batches))


def values_of(job: Job, output: str = "dense") -> list[float]:
    return [float(row[0]) for row in job.answer.result(0)[output]]


def test_equal_texts_of_jobs_that_wait_are_computed_once(backlog: Backlog) -> None:
    first = added(backlog, tokens_of(3, 3, 3, token=5))
    second = added(backlog, tokens_of(3, 3, token=7))
    assert (num_waiting(backlog), backlog.num_tokens(is_bulk=False)) == (4, 12)
    assert compute_all(backlog) == 4
    assert values_of(first) == [5, 6, 7]
    assert values_of(second) == [7, 8]


def test_equal_texts_of_one_job_are_computed_once_and_fill_all_their_rows(backlog: Backlog) -> None:
    job = added(backlog, [tokens_of(3, token=token)[0] for token in (5, 6, 5, 5, 6)])
    assert compute_all(backlog) == 2
    assert values_of(job) == [5, 6, 5, 5, 6]


def test_a_text_that_is_being_computed_is_not_computed_again(backlog: Backlog) -> None:
    first = added(backlog, tokens_of(3, token=5))
    batch = backlog.next_batch(must_wait=False)
    second = added(backlog, tokens_of(3, 3, token=5))
    assert num_waiting(backlog) == 1
    compute(backlog, batch)
    assert values_of(first) == [5]
    assert compute_all(backlog) == 1
    assert values_of(second) == [5, 6]


def test_a_text_that_was_answered_is_computed_again(backlog: Backlog) -> None:
    for _ in range(2):
        job = added(backlog, tokens_of(3, token=5))
        assert compute_all(backlog) == 1
        assert values_of(job) == [5]


IDS = np.array([7, 8, 9], np.int32)


@pytest.mark.parametrize(
    ("tokens", "alias", "outputs"),
    [
        (Tokens(IDS), "two", DENSE),
        (Tokens(IDS), "one", frozenset({"dense", "colbert"})),
        (Tokens(IDS, np.zeros(3, np.int32)), "one", DENSE),
        (Tokens(IDS, num_query_tokens=1), "one", DENSE),
        (Tokens(IDS, num_prompt_tokens=1), "one", DENSE),
        (Tokens(IDS[:2]), "one", DENSE),
    ],
    ids=["model", "outputs", "segments", "query", "prompt", "ids"],
)
def test_texts_are_equal_only_with_all_that_decides_their_rows(
    backlog: Backlog, tokens: Tokens, alias: str, outputs: frozenset[str]
) -> None:
    first, other = added(backlog, [Tokens(IDS)]), added(backlog, [tokens], alias, outputs)
    assert compute_all(backlog) == 2
    assert len(values_of(first)) == len(values_of(other)) == 1


def test_segments_that_differ_are_not_shared(backlog: Backlog) -> None:
    added(backlog, [Tokens(IDS, np.array(types, np.int32)) for types in ([0, 0, 1], [0, 1, 1])])
    assert compute_all(backlog) == 2


def test_a_job_that_leaves_does_not_take_a_shared_sequence_along(backlog: Backlog) -> None:
    leaving, staying = added(backlog, tokens_of(3, 3, token=5)), added(backlog, tokens_of(3, token=5))
    backlog.withdraw(leaving)
    assert num_waiting(backlog) == 1
    late = added(backlog, tokens_of(3, token=5))
    assert compute_all(backlog) == 1
    assert values_of(staying) == values_of(late) == [5]
    assert not leaving.answer.done()


def test_a_job_that_leaves_while_its_text_is_computed_is_not_missed(backlog: Backlog) -> None:
    leaving = added(backlog, tokens_of(3, token=5))
    batch = backlog.next_batch(must_wait=False)
    backlog.withdraw(leaving)
    late = added(backlog, tokens_of(3, token=5))
    compute(backlog, batch)
    assert compute_all(backlog) == 1
    assert values_of(late) == [5]


def test_an_interactive_job_takes_a_shared_bulk_sequence_with_it(backlog: Backlog) -> None:
    bulk = added(backlog, tokens_of(3, 3, token=5), is_bulk=True)
    interactive = added(backlog, tokens_of(3, token=6))
    assert (backlog.num_tokens(is_bulk=False), backlog.num_tokens(is_bulk=True)) == (3, 3)
    compute(backlog, backlog.next_batch(must_wait=False))
    assert values_of(interactive) == [6]
    assert not bulk.is_over
    compute_all(backlog)
    assert values_of(bulk) == [5, 6]


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False), (True, True)])
def test_a_shared_sequence_is_bulk_if_all_its_jobs_are(backlog: Backlog, first: bool, second: bool) -> None:
    for is_bulk in (first, second):
        added(backlog, tokens_of(3, token=5), is_bulk=is_bulk)
    assert [backlog.num_tokens(is_bulk) for is_bulk in (first and second, not (first and second))] == [3, 0]


def test_each_class_has_its_own_room_and_who_leaves_frees_it() -> None:
    backlog = backlog_of("one", max_waiting_tokens=10)
    job = added(backlog, tokens_of(4, 6), is_bulk=True)
    with backlog.lock:
        assert (backlog.has_room(is_bulk=False), backlog.has_room(is_bulk=True)) == (True, False)
    backlog.withdraw(job)
    with backlog.lock:
        assert backlog.has_room(is_bulk=True)
    added(backlog, tokens_of(4, 6), is_bulk=True)
    backlog.next_batch(must_wait=False)
    with backlog.lock:
        assert backlog.has_room(is_bulk=True)


@pytest.mark.parametrize("leave", ["withdrawn", "computed"])
def test_who_waits_for_room_is_woken_and_told_without_the_lock(leave: str) -> None:
    backlog = backlog_of("one", max_waiting_tokens=10)
    was_free: list[bool] = []
    waits = threading.Event()
    backlog.on_room = lambda: was_free.append(not backlog.lock.locked())
    job = added(backlog, tokens_of(10))

    def wait_for_room() -> bool:
        with backlog.lock:
            waits.set()
            return backlog.room.wait(PATIENCE_S)

    with ThreadPoolExecutor(1) as waiter:
        woken = waiter.submit(wait_for_room)
        assert waits.wait(PATIENCE_S)
        if leave == "withdrawn":
            backlog.withdraw(job)
        else:
            backlog.next_batch(must_wait=False)
        assert woken.result(PATIENCE_S)
    assert was_free == [True]


def test_nothing_is_told_of_room_when_no_batch_left(backlog: Backlog) -> None:
    told: list[None] = []
    backlog.on_room = lambda: told.append(None)
    assert backlog.next_batch(must_wait=False) == []
    assert told == []


def test_who_waits_for_work_gets_it_and_nothing_at_the_end(backlog: Backlog) -> None:
    with ThreadPoolExecutor(1) as device:
        batch = device.submit(backlog.next_batch, must_wait=True)
        added(backlog, tokens_of(3))
        assert len(batch.result(PATIENCE_S)) == 1
        ended = device.submit(backlog.next_batch, must_wait=True)
        backlog.close()
        assert ended.result(PATIENCE_S) == []


def test_a_budget_only_falls(backlog: Backlog) -> None:
    for asked, is_now in [(4096, 2048), (1000, 1000), (2000, 1000)]:
        backlog.lower_budget("one", asked)
        assert (backlog.max_tokens("one"), backlog.max_tokens("two")) == (is_now, 2048)


def test_when_the_device_is_dead_all_that_wait_or_run_or_come_are_told(backlog: Backlog) -> None:
    running = added(backlog, tokens_of(3, token=5))
    batch = backlog.next_batch(must_wait=False)
    waiting = added(backlog, tokens_of(3, token=6), is_bulk=True)
    reason = DeviceFailure("the device is gone")
    backlog.fail_all(reason)
    late = added(backlog, tokens_of(3, token=7))
    assert [job.answer.exception(0) for job in (running, waiting, late)] == [reason] * 3
    assert (num_waiting(backlog), backlog.num_tokens(is_bulk=True), backlog._in_flight) == (0, 0, {})
    assert backlog.next_batch(must_wait=True) == []
    compute(backlog, batch)  # a pass that hung ends after all: nothing happens


def test_what_is_attached_to_a_dead_jobs_answer_may_ask_the_backlog(backlog: Backlog) -> None:
    backlog.fail_all(DeviceFailure("the device is gone"))
    job = job_of(MODELS["one"], 1)
    was_free: list[bool] = []
    job.answer.add_done_callback(lambda answer: was_free.append(not backlog.lock.locked()))
    backlog.add([Encoded(job, 0, tokens_of(3))])
    assert was_free == [True]


def test_a_job_that_is_over_is_not_taken(backlog: Backlog) -> None:
    job = job_of(MODELS["one"], 2)
    job.answer.cancel()
    backlog.add([Encoded(job, 0, tokens_of(3, 3))])
    assert num_waiting(backlog) == 0


def test_a_done_job_is_freed_without_a_garbage_collection(backlog: Backlog) -> None:
    gc.disable()
    try:
        done, left = added(backlog, tokens_of(3, 4)), added(backlog, tokens_of(5, token=9))
        backlog.withdraw(left)
        compute_all(backlog)
        references = [weakref.ref(done), weakref.ref(left)]
        del done, left
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


@pytest.mark.timing
def test_withdrawing_takes_time_by_the_different_texts_of_a_job(backlog: Backlog) -> None:
    num_rows = 20_000
    kept = added(backlog, tokens_of(3) * num_rows)
    leaving = added(backlog, tokens_of(3) * num_rows)
    begun_s = time.perf_counter()
    backlog.withdraw(leaving)
    assert time.perf_counter() - begun_s < 2  # row by row it is ten times that
    compute_all(backlog)
    assert len(values_of(kept)) == num_rows


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_and_goes_every_row_is_right_and_nothing_is_left(backlog: Backlog, seed: int) -> None:
    random_ = random.Random(seed)
    jobs: list[tuple[Job, list[int]]] = []
    running: list[list[Sequence]] = []
    for _ in range(600):
        step = random_.random()
        if step < 0.5:
            texts = [random_.randint(1, 12) for _ in range(random_.randint(1, 6))]
            tokens = [tokens_of(text, token=text)[0] for text in texts]
            jobs.append((added(backlog, tokens, random_.choice(["one", "two"]), is_bulk=random_.random() < 0.5), texts))
        elif step < 0.65 and jobs:
            job, _ = random_.choice(jobs)
            if job.answer.cancel():
                backlog.withdraw(job)
        elif step < 0.85 and len(running) < 2:
            running += filter(None, [backlog.next_batch(must_wait=False)])
        elif running:
            compute(backlog, running.pop(0))
    for batch in running:
        compute(backlog, batch)
    compute_all(backlog)
    assert sum(job.answer.cancelled() for job, _ in jobs) > 5
    for job, texts in jobs:
        assert job.answer.cancelled() or values_of(job) == texts
    assert backlog._in_flight == {}
    assert (num_waiting(backlog), backlog.num_tokens(is_bulk=False), backlog.num_tokens(is_bulk=True)) == (0, 0, 0)
