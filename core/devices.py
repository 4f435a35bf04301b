"""Lists this machine's accelerators, pins processes to them, and chooses the precision each computes in.

`devices()` and `choose_precision()` load torch when called. Pinning does not: it is an environment that must be set
before the pinned process starts, because a driver reads it once. Inside a pinned process the accelerator is always
number 0.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from embedq.core.errors import InvalidSettings

if TYPE_CHECKING:
    from embedq.core.settings import Precision

#: Kinds in order of preference, each with the variable that limits which devices a process sees.
VISIBILITY = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "musa": "MUSA_VISIBLE_DEVICES",
    "mps": None,
    "cpu": None,
}

#: CPU flags of 8-bit integer products; without one of them int8 is slower than float32.
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})

#: Variables that set how many threads the CPU libraries start; read when torch loads.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

#: A pass allocates and frees megabytes in each operation. If glibc returned them to the kernel each time, mapping and
#: clearing them anew would cost 1 to 2 % of a CPU's time (docs/measurements.md). So glibc keeps up to half a GiB, and
#: asks for pages of 2 MiB where the kernel has them, which gains another 2 %.
_ALLOCATING = {
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

#: Between operations the threads of the CPU libraries sleep instead of spinning, because a worker's other threads need
#: the cores. One-text jobs were a tenth to a fifth faster, large jobs as fast (docs/measurements.md).
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Device:
    """One device a worker can be pinned to."""

    kind: str
    index: int
    name: str
    #: 0 if the device does not report it.
    memory_bytes: int = 0
    #: The cores of a CPU worker; empty for accelerators, whose workers run on any core.
    cores: tuple[int, ...] = field(default=())
    #: Precisions it computes in natively, by torch's names.
    precisions: tuple[str, ...] = ("float32",)
    #: The one that `auto` chooses, and why.
    chosen: str = "float32"
    reason: str = ""

    def __str__(self) -> str:
        """The device as settings name it: "cuda:0", "cpu"."""
        return self.kind if self.kind in ("cpu", "mps") else f"{self.kind}:{self.index}"

    @property
    def label(self) -> str:
        """The device's part of a worker's name, without a colon: "cuda0", "cpu0"."""
        return f"{self.kind}{self.index}"

    def environment(self) -> dict[str, str]:
        """The environment in which a new process sees this device and no other."""
        variable = VISIBILITY[self.kind]
        pinned = {variable: self._name_in(os.environ.get(variable, ""))} if variable else {}
        if self.cores:
            pinned |= dict.fromkeys(_THREADS, str(len(self.cores)))
            pinned |= {name: os.environ.get(name, value) for name, value in (_WAITING | _ALLOCATING).items()}
        return pinned

    def _name_in(self, visible: str) -> str:
        """This device's name in a visibility variable: if one is set already, `index` counts within its list."""
        entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
        return entries[self.index] if self.index < len(entries) else str(self.index)


def read_devices(listing: str | bytes) -> list[Device]:
    """Read the devices that `python -m embedq.core.devices` printed."""
    lists = ("cores", "precisions")  # JSON knows no tuples
    return [Device(**{**one, **{name: tuple(one[name]) for name in lists}}) for one in json.loads(listing)]


def devices() -> list[Device]:
    """List the accelerators of the first kind that is present, else the CPU with all its cores."""
    import torch

    _load_vendor_plugins()
    for kind in ("cuda", "npu", "musa"):
        device_module = getattr(torch, kind, None)
        if device_module is not None and device_module.is_available():
            return [_accelerator(kind, index) for index in range(device_module.device_count())]
    if torch.backends.mps.is_available():
        return [_with_precisions(Device("mps", 0, "Apple GPU", int(torch.mps.recommended_max_memory())))]
    return cpu_devices(1)


def cpu_devices(num_workers: int) -> list[Device]:
    """Split the cores this process may use evenly into `num_workers` CPU devices. Needs no torch."""
    cores = _own_cores()
    if not 1 <= num_workers <= len(cores):
        raise InvalidSettings(
            f"{num_workers} CPU workers were asked for; at most one per core and at least one, and there are {len(cores)}"
        )
    size = len(cores) // num_workers
    groups = [tuple(cores[i * size : (i + 1) * size]) for i in range(num_workers)]
    return [_cpu_device(index, group) for index, group in enumerate(groups)]


def device_of_cores(name: str) -> Device | None:
    """The CPU device that "cpu:0-3" or "cpu:5" names by its cores; None for other names. Needs no torch.

    InvalidSettings if this process may not use one of the cores.
    """
    found = re.fullmatch(r"cpu:(\d+)(?:-(\d+))?", name)
    if not found:
        return None
    first, last = int(found[1]), int(found[2] or found[1])
    own = _own_cores()
    if not {first, last} <= set(own) or first > last:
        shown = ", ".join(map(str, own))
        raise InvalidSettings(f"device {name:.40} names cores that are not there; this process may use {shown:.200}")
    return _cpu_device(first, tuple(core for core in own if first <= core <= last))


def _own_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _cpu_device(index: int, cores: tuple[int, ...]) -> Device:
    return _with_precisions(Device("cpu", index, cpu_name(), _host_memory_bytes(), cores))


def choose_device(wanted: str) -> str:
    """Translate "auto" or an explicit device into torch's name for it.

    InvalidSettings if this process does not see it.
    """
    import torch

    if wanted == "auto":
        return str(devices()[0])
    kind, _, index = wanted.partition(":")
    if kind not in VISIBILITY or (index and not index.isdecimal()):
        raise InvalidSettings(
            f"device must be auto or one of {', '.join(VISIBILITY)}, with :number; given {wanted!r:.40}"
        )
    if kind == "cpu":
        return "cpu"
    _load_vendor_plugins()
    device_module = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
    count = 0
    if device_module is not None and device_module.is_available():
        count = 1 if kind == "mps" else device_module.device_count()
    if int(index or 0) >= count:
        raise InvalidSettings(f"device {wanted!r:.40} was asked for; this process sees {count} of kind {kind}")
    return "mps" if kind == "mps" else f"{kind}:{int(index or 0)}"


def choose_precision(device: str, wanted: Precision) -> tuple[str, str]:
    """Choose the precision for a device: (precision, reason).

    Keeps an explicit choice; InvalidSettings if impossible.
    """
    kind = device.partition(":")[0]
    if wanted == "float16" and kind == "cpu":
        raise InvalidSettings(
            "precision float16 on a CPU would be slower than float32 and less exact; use auto or float32"
        )
    if wanted == "int8" and kind != "cpu":
        raise InvalidSettings(f"precision int8 is for CPUs; the device is {device}. Use auto or a half precision")
    if wanted == "int8" and not _has_int8():
        raise InvalidSettings(
            f"precision int8 needs a CPU with one of {', '.join(sorted(INT8_FLAGS))}, which this one does not list; use auto"
        )
    if wanted != "auto":
        return wanted, "asked for"
    if _has_native_bf16(device):
        return "bfloat16", f"{kind} multiplies bfloat16 natively"
    if kind == "cpu":
        return "float32", "this CPU has no native bfloat16 products"
    return "float16", f"{kind} has no native bfloat16"


def around_products(device: str, precision: str) -> str:
    """The dtype of all operations except products with weights: `precision`, or for int8 the one of `auto`."""
    return choose_precision(device, "auto")[0] if precision == "int8" else precision


def cpu_flags() -> frozenset[str]:
    """Instruction sets that the CPU reports; empty if the system does not list them."""
    return frozenset(_of_cpu("flags").split())


def cpu_name() -> str:
    """The processor's model name, or the architecture if the system does not report it."""
    return _of_cpu("model name") or os.uname().machine


def _of_cpu(name: str) -> str:
    """The value of `name` for the first core, from /proc/cpuinfo; empty if the system has no such file or name."""
    try:
        with Path("/proc/cpuinfo").open() as lines:  # read up to the name: the file repeats all for each core
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
    except OSError:
        return ""


def _with_precisions(device: Device) -> Device:
    """`device` with its precisions and the one that `auto` chooses."""
    has_bf16 = _has_native_bf16(str(device))
    precisions = (
        "float32",
        *(["float16"] if device.kind != "cpu" else []),  # refused on a CPU, see choose_precision
        *(["bfloat16"] if has_bf16 else []),
        *(["int8"] if device.kind == "cpu" and _has_int8() else []),
    )
    chosen, reason = choose_precision(str(device), "auto")
    return replace(device, precisions=precisions, chosen=chosen, reason=reason)


def _host_memory_bytes() -> int:
    """The machine's memory; 0 if the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def _has_int8() -> bool:
    """Returns True if the CPU multiplies 8-bit integers natively, by its flags."""
    return bool(cpu_flags() & INT8_FLAGS)


def _has_native_bf16(device: str) -> bool:
    kind, _, index = device.partition(":")
    if kind == "cpu":
        # Without these instructions bf16 is emulated and slower than float32. The flags decide, not the model name:
        # virtual machines hide instructions that the name promises.
        return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})
    import torch

    if kind == "cuda":
        with torch.cuda.device(int(index or 0)):  # torch reads the current one, and a machine may have several models
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    device_module = getattr(torch, kind, None)
    supported = getattr(device_module, "is_bf16_supported", None)
    return bool(supported()) if supported else False


def _accelerator(kind: str, index: int) -> Device:
    import torch

    device_module = getattr(torch, kind)
    properties = device_module.get_device_properties(index)
    return _with_precisions(
        Device(kind, index, str(device_module.get_device_name(index)), int(properties.total_memory))
    )


def _load_vendor_plugins() -> None:
    """Import the plug-ins that add torch.npu and torch.musa, if they are installed."""
    import importlib.util

    for plugin in ("torch_npu", "torch_musa"):
        if importlib.util.find_spec(plugin):
            importlib.import_module(plugin)


if __name__ == "__main__":  # run by the launcher, which must never load torch or a driver itself
    json.dump([asdict(device) for device in devices()], sys.stdout)
