"""The starting budget: from memory as it is measured during warm-up, over a backend that only counts bytes."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from embedq.core.batching.device_memory import measurable
from embedq.core.engine import Engine
from embedq.core.errors import DeviceOutOfMemory
from embedq.core.sequence import Sequence
from embedq.core.settings import read_settings
from tests.checkpoints import FakeModel
from tests.test_device_memory import limit, padded_tokens


class FakeAllocator:
    """What is asked of `torch.npu` for its memory, with a byte count per token instead of tensors."""

    def __init__(self, capacity_bytes: int, weights_bytes: int = 1_000_000, bytes_per_token: int = 1000) -> None:
        self.capacity_bytes, self.bytes_per_token = capacity_bytes, bytes_per_token
        self.allocated_bytes = self.peak_bytes = weights_bytes
        self.cached_bytes = self.num_emptied = 0

    def run(self, batch: list[Sequence]) -> None:
        """Allocate what `batch` needs and free it into the cache, or raise."""
        needed = padded_tokens(batch) * self.bytes_per_token
        if self.allocated_bytes + needed > self.capacity_bytes:
            raise RuntimeError("NPU out of memory. Tried to allocate")
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes + needed)
        self.cached_bytes = max(self.cached_bytes, needed)

    def mem_get_info(self, device: str) -> tuple[int, int]:
        assert device == "npu:0"
        return self.capacity_bytes - self.allocated_bytes - self.cached_bytes, self.capacity_bytes

    def memory_allocated(self, device: str) -> int:
        return self.allocated_bytes

    def max_memory_allocated(self, device: str) -> int:
        return self.peak_bytes

    def reset_peak_memory_stats(self, device: str) -> None:
        self.peak_bytes = self.allocated_bytes

    def empty_cache(self) -> None:
        self.num_emptied += 1
        self.cached_bytes = 0


def warmed_up(monkeypatch: pytest.MonkeyPatch, allocator: FakeAllocator, **limits: Any) -> tuple[Engine, FakeModel]:
    """An engine over a fake model on that memory, warmed up."""
    monkeypatch.setattr(torch, "npu", allocator, raising=False)
    model = FakeModel()
    model.device, model.before_rows = "npu:0", allocator.run
    engine = Engine({"fake": model}, read_settings(models={"fake": "/nowhere"}, **limits))
    engine.warm_up()
    return engine, model


@pytest.mark.parametrize(
    ("free_bytes", "asked", "budget"),
    [
        (100_000_000, None, 16_384),  # there is room for more, but the default is enough
        (17_000_000, None, 14_450),  # 85 % of 17,000 tokens
        (8_000_000, None, 6144),  # 16,384 and 8,192 tokens do not fit: three quarters of the latter
        (17_000_000, 4096, 4096),  # never more than is set
    ],
)
def test_the_starting_budget_is_what_measured_memory_allows(
    free_bytes: int, asked: int | None, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator = FakeAllocator(free_bytes + 1_000_000)
    engine, model = warmed_up(monkeypatch, allocator, max_batch_tokens=asked)
    with engine:
        assert engine.backlog.max_tokens("fake") == budget
        num_warm = len(model.batches)
        assert len(np.asarray(engine.embed([f"{number:064}" for number in range(1000)]))) == 1000
        largest = max(padded_tokens(batch) for batch in model.batches[num_warm:])
        assert largest * 1000 <= free_bytes  # jobs ran within memory: nothing had to be split


def test_the_budget_and_what_it_rests_on_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "embedq.core.batching.warm_up")
    engine, _ = warmed_up(monkeypatch, FakeAllocator(18_000_000))
    engine.close()
    told = vars(caplog.records[-1])
    assert told["action"] == "memory_measured"
    assert (told["bytes_per_token"], told["free_mib"], told["max_batch_tokens"]) == (1000, 16, 14_450)
    assert "85 %" in caplog.text


def test_a_model_that_leaves_no_room_for_one_sequence_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceOutOfMemory, match="model fake leaves no room for a sequence of 64 tokens on npu:0"):
        warmed_up(monkeypatch, FakeAllocator(1_010_000))


def test_out_of_memory_empties_the_devices_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(100_000_000)
    engine, model = warmed_up(monkeypatch, allocator)
    with engine:
        num_emptied = allocator.num_emptied
        failed = limit(model, 1000)
        engine.embed([f"{number:064}" for number in range(100)])
        assert allocator.num_emptied - num_emptied == len(failed) > 0


def test_memory_is_measured_only_where_the_device_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "npu", SimpleNamespace(empty_cache=lambda: None), raising=False)
    assert measurable("npu:0") is None
    assert measurable("cpu") is None
    model = FakeModel()
    with Engine({"fake": model}, read_settings(models={"fake": "/nowhere"})) as engine:
        engine.warm_up()
        assert len(model.batches) == 1
        assert engine.backlog.max_tokens("fake") in (1024, 2048)  # by the cores
