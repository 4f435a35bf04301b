"""Copies between host and device: the same numbers, and no waiting where the device can."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from embedq.core.models.transfer import launched_as, to_device, to_host

DEVICES = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"))],
)


@DEVICES
def test_what_goes_to_the_device_comes_back_as_it_was(device: str) -> None:
    given = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    there = to_device(given, device)
    assert there.device == torch.device(device)
    np.testing.assert_array_equal(to_host(there)(), given.numpy())


@DEVICES
def test_a_copy_is_of_what_was_queued_before_it_and_not_of_what_comes_after(device: str) -> None:
    tensor = to_device(torch.ones(1000, 1000), device)
    waits: list[Callable[[], np.ndarray]] = []
    for _ in range(10):
        tensor = tensor @ to_device(torch.full((1000, 1000), 1e-3), device)
        waits.append(to_host(tensor * len(waits)))
    for number, wait in enumerate(waits):
        np.testing.assert_allclose(wait(), np.full((1000, 1000), float(number)), rtol=1e-3)


@DEVICES
def test_rows_are_named_for_their_output(device: str) -> None:
    rows = launched_as("score", to_device(torch.ones(2, 1), device))()
    assert {name: values.shape for name, values in rows.items()} == {"score": (2, 1)}
