"""Passes at once on a CPU: how many, on how many threads each, and that none is forgotten."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from embedq.core.batching import cpu_streams
from embedq.core.batching.cpu_streams import Cores, num_streams
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.engines import running, texts_of


@pytest.mark.parametrize(("num_cores", "expected"), [(1, 1), (2, 2), (4, 2), (8, 2), (16, 4), (64, 16)])
def test_a_cpu_runs_one_pass_per_four_cores_and_at_least_two(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, expected: int
) -> None:
    monkeypatch.setattr(cpu_streams, "_num_threads", lambda: num_cores)
    assert num_streams(None, {"cpu"}) == expected
    assert num_streams(3, {"cpu"}) == 3


def test_an_accelerator_runs_one_pass_whatever_is_asked() -> None:
    assert num_streams(None, {"cuda:0"}) == num_streams(4, {"npu:0"}) == 1


def test_the_number_of_threads_is_that_of_the_thread_which_set_it() -> None:
    """What all of this leans on in torch."""
    both_have_set = threading.Barrier(2, timeout=PATIENCE_S)

    def set_and_ask(num_threads: int) -> int:
        torch.get_num_threads()
        torch.set_num_threads(num_threads)
        both_have_set.wait()
        torch.ones(64, 64) @ torch.ones(64, 64)
        return torch.get_num_threads()

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(set_and_ask, (1, 3))) == [1, 3]


def test_a_pass_that_is_alone_has_all_threads_and_others_have_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_streams, "_num_threads", lambda: 4)
    cores = Cores(2)

    def threads_of(has_followers: bool) -> int:
        with cores.share(has_followers):
            return torch.get_num_threads()

    with ThreadPoolExecutor(1) as other:
        assert other.submit(threads_of, False).result() == 4
        assert other.submit(threads_of, True).result() == 2
        with cores.share(has_followers=True):
            assert other.submit(threads_of, False).result() == 2
        assert other.submit(threads_of, False).result() == 4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_passes_as_streams_are_under_way(count: int) -> None:
    model = FakeModel()
    model.gate.clear()
    with running(model, cpu_streams=count, max_batch_tokens=64) as engine:
        jobs = [engine.submit(lambda text=text: engine.calls.embed([text])) for text in texts_of(0, 8, (60, 64))]  # type: ignore[misc]
        for _ in range(count):
            assert model.begun.acquire(timeout=PATIENCE_S)
        assert not model.begun.acquire(blocking=False)
        model.gate.set()
        for job in jobs:
            job.answer.result(PATIENCE_S)
        assert engine.is_alive


def test_one_stream_that_hangs_ends_the_engine() -> None:
    model, is_dead = FakeModel(), threading.Event()
    model.gate.clear()
    with running(model, cpu_streams=2, hang_timeout_s=0.05) as engine:
        engine.on_dead = lambda reason: is_dead.set()
        job = engine.submit(lambda: engine.calls.embed(["a"]))
        assert is_dead.wait(PATIENCE_S)
        assert "hangs" in str(job.answer.exception(PATIENCE_S))
        assert not engine.is_alive
        model.gate.set()
