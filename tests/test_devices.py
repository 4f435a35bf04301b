"""Devices, pinning and precision. The accelerators are fakes of torch's backends: none can be here."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedq.core import devices
from embedq.core.devices import Device, choose_device, choose_precision, cpu_devices, device_of_cores
from embedq.core.errors import InvalidSettings
from embedq.workers import commands
from embedq.workers.__main__ import main
from embedq.workers.launcher import launcher

#: Order of preference.
KINDS = ["cuda", "npu", "musa", "mps", "cpu"]


@dataclass
class FakeBackend:
    """Stands for `torch.cuda`, `torch.npu`, `torch.musa` or `torch.backends.mps`, as far as `core.devices` calls it."""

    num_devices: int = 2
    #: Of all, or of each.
    has_bf16: bool | list[bool] = True
    current: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)

    def is_available(self) -> bool:
        return self.num_devices > 0

    def device_count(self) -> int:
        return self.num_devices

    def get_device_name(self, index: int) -> str:
        return f"Accelerator {index}"

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(total_memory=(index + 1) * 2**30)

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        self.current = index
        yield
        self.current = 0

    def is_bf16_supported(self, **how: Any) -> bool:
        self.asked.append(how)
        return self.has_bf16 if isinstance(self.has_bf16, bool) else self.has_bf16[self.current]


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without accelerators, whatever this one has."""
    for variable in filter(None, devices.VISIBILITY.values()):
        monkeypatch.delenv(variable, raising=False)
    for kind in KINDS[:-1]:
        install(monkeypatch, kind, FakeBackend(0))


def install(monkeypatch: pytest.MonkeyPatch, kind: str, backend: FakeBackend) -> FakeBackend:
    """Put `backend` where torch keeps the one of `kind`."""
    monkeypatch.setattr(torch.backends if kind == "mps" else torch, kind, backend, raising=False)
    if kind == "mps":  # the rest of it is elsewhere
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 3 * 2**30)
    return backend


@pytest.mark.parametrize("first", range(len(KINDS)))
def test_the_best_kind_that_is_present_is_taken(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS[first:-1]:
        install(monkeypatch, kind, FakeBackend())
    kind = KINDS[first]
    assert {device.kind for device in devices.devices()} == {kind}
    assert choose_device("auto") == (kind if kind in ("mps", "cpu") else f"{kind}:0")


@pytest.mark.parametrize("kind", ["cuda", "npu", "musa"])
def test_every_accelerator_is_listed_with_name_and_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, kind, FakeBackend(2))
    assert [(str(device), device.name, device.memory_bytes) for device in devices.devices()] == [
        (f"{kind}:0", "Accelerator 0", 2**30),
        (f"{kind}:1", "Accelerator 1", 2 * 2**30),
    ]


@pytest.mark.parametrize(
    ("device", "text", "label", "environment"),
    [
        (Device("cuda", 3, "A"), "cuda:3", "cuda3", {"CUDA_VISIBLE_DEVICES": "3"}),
        (Device("npu", 1, "A"), "npu:1", "npu1", {"ASCEND_RT_VISIBLE_DEVICES": "1"}),
        (Device("musa", 0, "A"), "musa:0", "musa0", {"MUSA_VISIBLE_DEVICES": "0"}),
        (Device("mps", 0, "A"), "mps", "mps0", {}),
        (
            Device("cpu", 1, "A", cores=(2, 3, 5)),
            "cpu",
            "cpu1",
            {
                "OMP_NUM_THREADS": "3",
                "MKL_NUM_THREADS": "3",
                "OMP_WAIT_POLICY": "PASSIVE",
                "MALLOC_MMAP_THRESHOLD_": "67108864",
                "MALLOC_TRIM_THRESHOLD_": "536870912",
                "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            },
        ),
    ],
)
def test_a_process_is_pinned_by_its_environment(
    device: Device, text: str, label: str, environment: dict[str, str]
) -> None:
    assert (str(device), device.label, device.environment()) == (text, label, environment)


@pytest.mark.parametrize("kind", ["cuda", "npu", "musa"])
@pytest.mark.parametrize(("visible", "pinned"), [("4,6", "6"), (" GPU-aaaa , GPU-bbbb ", "GPU-bbbb"), ("", "1")])
def test_devices_are_numbered_among_those_the_launcher_itself_may_see(
    kind: str, visible: str, pinned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = devices.VISIBILITY[kind]
    assert variable
    monkeypatch.setenv(variable, visible)
    assert Device(kind, 1, "the second one visible").environment() == {variable: pinned}


@pytest.mark.parametrize(
    ("num_workers", "groups"),
    [
        (1, [(0, 2, 3, 5, 8, 9, 11)]),
        (2, [(0, 2, 3), (5, 8, 9)]),
        (3, [(0, 2), (3, 5), (8, 9)]),
        (7, [(0,), (2,), (3,), (5,), (8,), (9,), (11,)]),
    ],
)
def test_cores_are_split_evenly_and_none_is_shared(
    num_workers: int, groups: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 5, 8, 9, 11}, raising=False)
    split = cpu_devices(num_workers)
    assert [device.cores for device in split] == groups
    assert [device.label for device in split] == [f"cpu{index}" for index in range(num_workers)]
    assert len({device.environment()["OMP_NUM_THREADS"] for device in split}) == 1


@pytest.mark.parametrize("num_workers", [8, 0, -1])
def test_a_number_of_cpu_workers_that_the_cores_do_not_allow_is_refused(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    with pytest.raises(InvalidSettings, match=f"{num_workers} CPU workers .* 7"):
        cpu_devices(num_workers)


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("cuda", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("npu:1", "npu:1"),
        ("musa:0", "musa:0"),
        ("mps", "mps"),
        ("cpu", "cpu"),
    ],
)
def test_an_explicit_device_is_taken_if_it_is_there(wanted: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS[:-1]:
        install(monkeypatch, kind, FakeBackend(2))
    assert choose_device(wanted) == given


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "npu", "musa:3", "mps"])
def test_an_absent_device_is_refused_and_never_replaced_by_another(wanted: str) -> None:
    with pytest.raises(InvalidSettings, match=f"'{wanted}' was asked for; this process sees 0"):
        choose_device(wanted)


def test_a_device_number_beyond_those_visible_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "cuda", FakeBackend(2))
    with pytest.raises(InvalidSettings, match="sees 2 of kind cuda"):
        choose_device("cuda:2")


@pytest.mark.parametrize("wanted", ["gpu", "", "cuda:x", "cuda:-1", "cuda:²", "CPU", "tpu:0"])
def test_a_device_of_no_known_kind_is_refused(wanted: str) -> None:
    with pytest.raises(InvalidSettings, match="device must be auto or one of cuda, npu, musa, mps, cpu"):
        choose_device(wanted)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ({"avx2", "avx512f"}, "float32"),
        ({"avx512_bf16"}, "bfloat16"),
        ({"amx_bf16", "amx_tile"}, "bfloat16"),
        (set(), "float32"),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_if_it_says_it_can(
    flags: set[str], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cpu_flags", lambda: frozenset(flags))
    chosen, reason = choose_precision("cpu", "auto")
    assert chosen == precision
    assert "bfloat16" in reason


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="float16 on a CPU"):
        choose_precision("cpu", "float16")


@pytest.mark.parametrize("kind", ["cuda", "npu", "musa"])
@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bfloat16"), (False, "float16")])
def test_an_accelerator_computes_in_the_half_precision_it_has(
    kind: str, has_bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = install(monkeypatch, kind, FakeBackend(has_bf16=has_bf16))
    assert choose_precision(f"{kind}:0", "auto")[0] == precision
    if kind == "cuda":
        assert backend.asked == [{"including_emulation": False}]  # emulated is slower than float16


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "mps"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_an_explicit_precision_is_kept(device: str, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "cuda", FakeBackend(has_bf16=False))
    monkeypatch.setattr(devices, "cpu_flags", frozenset)
    assert choose_precision(device, wanted) == (wanted, "asked for")


_WITH = "  computes in float32, float16, bfloat16; auto takes bfloat16: {} multiplies bfloat16 natively"
_WITHOUT = "  computes in float32, float16; auto takes float16: {} has no native bfloat16"


@pytest.mark.parametrize(
    ("kind", "has_bf16", "lines"),
    [
        # Two generations in one machine.
        ("cuda", [True, False], ["cuda:0  Accelerator 0  1 GiB", _WITH, "cuda:1  Accelerator 1  2 GiB", _WITHOUT]),
        ("npu", [True], ["npu:0  Accelerator 0  1 GiB", _WITH]),
        ("musa", [False], ["musa:0  Accelerator 0  1 GiB", _WITHOUT]),
        ("mps", [False], ["mps  Apple GPU  3 GiB", _WITHOUT]),
    ],
)
def test_each_device_is_printed_with_what_it_can_do_and_why_auto_takes_what(
    kind: str,
    has_bf16: list[bool],
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch, kind, FakeBackend(len(has_bf16), has_bf16))
    # The fake is of this process only; what crosses to the launcher crosses here, too.
    listing = json.dumps([asdict(device) for device in devices.devices()])
    monkeypatch.setattr(launcher, "list_devices", lambda: devices.read_devices(listing))
    assert main(["devices"]) == 0
    assert capsys.readouterr().out.splitlines() == [line.format(kind) for line in lines]


def test_the_command_line_prints_what_this_machine_has() -> None:
    """The real command, which asks a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-m", "embedq.workers", "devices"], capture_output=True, text=True, timeout=60, check=True
    )
    first, second, *_ = answer.stdout.splitlines()
    if first.startswith("cpu"):
        (cpu,) = cpu_devices(1)
        memory_gib = cpu.memory_bytes / 2**30
        assert first == f"cpu  {devices.cpu_name()}  {len(cpu.cores)} cores  {memory_gib:.0f} GiB"
        precision, reason = choose_precision("cpu", "auto")
        can = "float32, bfloat16" if precision == "bfloat16" else "float32"
        can += ", int8" if devices.cpu_flags() & devices.INT8_FLAGS else ""
        assert second == f"  computes in {can}; auto takes {precision}: {reason}"
    else:
        assert second.startswith("  computes in float32, float16")


def test_the_listing_that_the_launcher_asks_for_is_made_of_devices() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "embedq.core.devices"], capture_output=True, text=True, timeout=60, check=True
    )
    listed = devices.read_devices(answer.stdout)
    assert listed
    assert all(device.chosen in device.precisions and device.reason for device in listed)
    assert [device.index for device in listed] == list(range(len(listed)))
    if listed[0].kind == "cpu":
        assert listed[0].cores
        assert listed[0].name


def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))


def test_part_of_a_cpu_is_named_by_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    eight_cores(monkeypatch)
    named = [device_of_cores(name) for name in ("cpu:0-3", "cpu:4-7", "cpu:5")]
    assert [(device.label, device.cores) for device in named if device] == [
        ("cpu0", (0, 1, 2, 3)),
        ("cpu4", (4, 5, 6, 7)),
        ("cpu5", (5,)),
    ]
    assert [device_of_cores(name) for name in ("cpu", "cuda:0", "cpu:", "cpu:a")] == [None] * 4


@pytest.mark.parametrize("name", ["cpu:8", "cpu:0-8", "cpu:3-1"])
def test_cores_that_are_not_there_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eight_cores(monkeypatch)
    with pytest.raises(
        InvalidSettings, match=rf"device {name} names cores that are not there; this process may use 0, 1"
    ):
        device_of_cores(name)


def test_two_devices_of_one_command_share_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    eight_cores(monkeypatch)
    chosen = commands._chosen(lambda: [], "cpu:0-3, cpu:4-7,cpu:0-3")
    assert [device.label for device in chosen] == ["cpu0", "cpu4"]
    with pytest.raises(InvalidSettings, match="devices cpu:0-3, cpu:3 share cores"):
        commands._chosen(lambda: [], "cpu:0-3,cpu:3")
    with pytest.raises(
        InvalidSettings, match=r"'cpu1' is not on this machine; there is cpu\. Part of a CPU is named by"
    ):
        commands._chosen(lambda: cpu_devices(1), "cpu1")
