"""Out of memory: smaller batches and the same rows, remembered, and only one's own fault is one's own failure.

Memory is limited by making a pass raise what torch raises, once it holds more tokens than the limit.
"""

from __future__ import annotations

import gc
import logging
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from embedq import core
from embedq.core.batching.device_memory import (
    MIN_BUDGET_TOKENS,
    fitting_budget,
    free_cache,
    is_out_of_memory,
    reduced_budget,
)
from embedq.core.errors import DeviceFailure, DeviceOutOfMemory
from embedq.core.sequence import Sequence
from tests.checkpoints import PATIENCE_S, FakeModel, save_encoder
from tests.loops import error_of, expected_of, raise_on_token, rows_of, running, submit


@pytest.fixture(autouse=True)
def spared() -> Iterator[None]:
    """As in a worker, the collector leaves alone what was there before: it runs for each batch that did not fit, and
    would walk through all that the whole run of tests has imported and made, for half a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def padded_tokens(batch: list[Sequence]) -> int:
    return max(one.length for one in batch) * len(batch)


def limit(model: FakeModel, max_tokens: int) -> list[int]:
    """Let passes of `model` run out of memory above `max_tokens`; returns the list of those that did."""
    failed: list[int] = []

    def allocate(batch: list[Sequence]) -> None:
        if padded_tokens(batch) > max_tokens:
            failed.append(padded_tokens(batch))
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {padded_tokens(batch)} MiB.")

    model.before_rows = allocate
    return failed


def torch_error(ask: Callable[[], Any]) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        ask()
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.OutOfMemoryError("words of a version to come"),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 29.50 GiB total capacity)"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.93 GB, max allowed: 18.13 GB)."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch_error(lambda: torch.empty(2**58)),
        torch_error(lambda: np.empty(2**58)),
        MemoryError(),
    ],
    ids=["cuda", "by class", "npu", "mps", "driver", "cublas", "torch's cpu allocator", "numpy", "python"],
)
def test_a_failed_allocation_is_known_as_one(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("index out of range in self"),
        ValueError("out of memory"),
        KeyError("out of memory"),
        DeviceFailure("broken"),
    ],
    ids=repr,
)
def test_any_other_error_is_not_one(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_a_cache_that_cannot_be_emptied_is_left_to_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def broken() -> None:
        tried.append("npu")
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(torch, "npu", SimpleNamespace(empty_cache=broken), raising=False)
    free_cache("npu:0")
    assert tried == ["npu"], "the cache of this device was not emptied at all"
    free_cache("cpu")
    assert tried == ["npu"]


def test_a_mistake_of_our_own_in_emptying_a_cache_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "npu", SimpleNamespace(empty_cache=lambda wrong: None), raising=False)
    with pytest.raises(TypeError):
        free_cache("npu:0")


def test_a_budget_falls_by_a_quarter_of_what_failed_and_never_rises() -> None:
    assert reduced_budget(2048, 2048) == 1536
    assert reduced_budget(2048, 1000) == 750
    assert reduced_budget(500, 1000) == 500
    assert reduced_budget(2048, 10) == MIN_BUDGET_TOKENS
    assert reduced_budget(16, 16) == 16


def test_a_measured_budget_leaves_15_percent_of_the_free_memory_and_never_rises() -> None:
    assert fitting_budget(16_384, 10_000_000, 1000.0) == 8500
    assert fitting_budget(4096, 10_000_000, 1000.0) == 4096
    assert fitting_budget(16_384, 0, 1000.0) == MIN_BUDGET_TOKENS
    assert fitting_budget(16_384, 10_000_000, 0.0) == 16_384


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_what_does_not_fit_runs_in_parts_and_the_rows_are_the_same(device: str) -> None:
    model = FakeModel()
    model.device = device
    failed = limit(model, 500)
    with running(model) as loop:
        job = submit(loop, *[64] * 32)
        np.testing.assert_array_equal(rows_of(job), expected_of(*[64] * 32))
        # Each size fails once: the other half of a failed batch is made smaller without being tried.
        assert failed == [2048, 1024, 512]
        assert loop.backlog.max_tokens("fake") == 384


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_without_padding_what_failed_is_counted_by_its_tokens(device: str) -> None:
    model = FakeModel(max_length=1000)
    model.device, model.is_padded = device, False
    failed: list[int] = []

    def allocate(batch: list[Sequence]) -> None:
        num_tokens = sum(one.length for one in batch)
        if num_tokens > 900:
            failed.append(num_tokens)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.before_rows = allocate
    lengths = [800, *[8] * 40, *[60] * 14]  # 1,960 tokens, and one batch: padded, it would have 44,000
    with running(model, is_padded=False) as loop:
        job = submit(loop, *lengths)
        np.testing.assert_array_equal(rows_of(job), expected_of(*lengths))
        # The first 27 of 55 have 1,008 tokens; what is left of the budget still lets the longest run, alone.
        assert failed == [1960, 1008]
        assert loop.backlog.max_tokens("fake") == 756
        rows_of(submit(loop, 790))
        assert failed == [1960, 1008]


def test_the_budget_is_remembered(caplog: pytest.LogCaptureFixture) -> None:
    model = FakeModel()
    failed = limit(model, 700)
    caplog.set_level(logging.WARNING, "embedq.core.batching.device_loop")
    with running(model) as loop:
        for _ in range(2):
            rows_of(submit(loop, *[64] * 200))
        assert failed == [2048, 1024, 768]
        assert loop.backlog.max_tokens("fake") == 576
    told = [vars(record) for record in caplog.records if vars(record)["action"] == "out_of_memory"]
    assert [(one["num_tokens"], one["max_batch_tokens"], one["model"]) for one in told] == [
        (2048, 1536, "fake"),
        (1024, 768, "fake"),
        (768, 576, "fake"),
    ]


def test_a_moments_shortage_does_not_leave_a_worker_that_runs_texts_one_by_one() -> None:
    model = FakeModel()
    limit(model, 64)
    with running(model) as loop:
        assert len(rows_of(submit(loop, *[64] * 40))) == 40
        assert loop.backlog.max_tokens("fake") == MIN_BUDGET_TOKENS


def test_a_sequence_that_cannot_fit_fails_alone() -> None:
    model = FakeModel(max_length=1000)
    limit(model, 300)
    model.gate.clear()
    with running(model) as loop:
        submit(loop, 1)
        assert model.begun.acquire(timeout=PATIENCE_S)
        before, too_long, after = submit(loop, 240), submit(loop, 500), submit(loop, 250)
        model.gate.set()
        failure = error_of(too_long)
        assert len(rows_of(before)) == len(rows_of(after)) == 1
        assert len(model.batches[1]) == 3  # they did share a pass
        assert isinstance(failure, DeviceOutOfMemory)
        assert "500 tokens" in str(failure)
        assert "model fake" in str(failure)
        assert "lower max_length" in str(failure)


def test_a_sequence_that_cannot_fit_even_alone_does_not_make_batches_smaller() -> None:
    model = FakeModel(max_length=1000)
    limit(model, 600)
    with running(model) as loop:
        assert isinstance(error_of(submit(loop, 700)), DeviceOutOfMemory)
        assert loop.backlog.max_tokens("fake") == 2048


def test_other_errors_do_not_change_the_budget() -> None:
    model = FakeModel()
    model.before_rows = raise_on_token(3, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with running(model) as loop:
        failure = error_of(submit(loop, 64, 64, 64, 64))
        assert isinstance(failure, DeviceFailure)
        assert "RuntimeError: CUDA error: an illegal memory access" in str(failure)
        assert loop.backlog.max_tokens("fake") == 2048


def test_a_sequence_longer_than_the_devices_budget_runs_alone() -> None:
    model = FakeModel(max_length=8192)
    with running(model) as loop:
        rows_of(submit(loop, 3000, 3000, 10, 20))
        assert sorted(tuple(one.length for one in batch) for batch in model.batches) == [(10, 20), (3000,), (3000,)]


@pytest.fixture
def texts() -> list[str]:
    random_ = random.Random(3)
    return [" ".join(random_.choices(["ferry", "garden", "rain", "map"], k=random_.randint(1, 60))) for _ in range(250)]


def test_a_real_model_gives_the_same_vectors_in_less_memory(tmp_path: Path, texts: list[str]) -> None:
    passes: list[tuple[int, weakref.ref[torch.Tensor]]] = []
    held: list[int] = []

    def allocate(module: Any, args: Any, given: dict[str, Any]) -> None:
        ids = given["input_ids"]
        held.extend(count for count, earlier in passes if count > 700 and earlier() is not None)
        passes.append((ids.numel(), weakref.ref(ids)))
        if ids.numel() > 700:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with core.load(str(save_encoder(tmp_path)), device="cpu", precision="float32") as engine:
        unlimited = np.asarray(engine.embed(texts))
        next(iter(engine.models.values()))._network._module.register_forward_pre_hook(allocate, with_kwargs=True)  # type: ignore[attr-defined]
        limited = np.asarray(engine.embed(texts))
        num_failed = sum(count > 700 for count, _ in passes)
        np.testing.assert_allclose(limited, unlimited, rtol=0, atol=1e-5)
        assert num_failed >= 2
        assert held == []  # a failed pass's tensors were gone when the next one began

        np.testing.assert_allclose(np.asarray(engine.embed(texts)), unlimited, rtol=0, atol=1e-5)
        assert sum(count > 700 for count, _ in passes) == num_failed
