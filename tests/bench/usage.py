"""What processes and the server have used so far: processor time, memory, calls (Linux)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """Processor seconds of a process, in user and kernel mode, all threads together."""
    return _cpu_s(Path(f"/proc/{pid}/stat"))


def thread_cpu_s(pid: int) -> dict[int, float]:
    """The same by thread, named by the kernel's ids."""
    return {int(task.name): _cpu_s(task / "stat") for task in Path(f"/proc/{pid}/task").iterdir()}


def idle_s() -> float:
    """Seconds in which the machine's cores had nothing to do, all together since its start."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    return (int(fields[4]) + int(fields[5])) / _TICKS_PER_S


def rss_bytes(pid: int) -> int:
    """Memory of a process that is in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


def peak_bytes(pid: int) -> int:
    """The most memory that a process ever had in use, and each that it has started and that still runs; summed."""
    process = Path(f"/proc/{pid}")
    peak = next((line for line in _lines(process / "status") if line.startswith("VmHWM")), "VmHWM: 0 kB")
    children = {
        int(child) for task in process.glob("task/*/children") for line in _lines(task) for child in line.split()
    }
    return int(peak.split()[1]) * 1024 + sum(map(peak_bytes, children))


@dataclass(frozen=True)
class ServerUse:
    """What a server counts since its start."""

    cpu_s: float
    #: Times that clients sent it something: round trips, where each waits for its answer.
    num_reads: int
    #: Calls by command, those of scripts included.
    calls: dict[str, int]

    def __sub__(self, before: ServerUse) -> ServerUse:
        calls = {name: number - before.calls.get(name, 0) for name, number in self.calls.items()}
        return ServerUse(
            self.cpu_s - before.cpu_s, self.num_reads - before.num_reads, {k: v for k, v in calls.items() if v}
        )


def server_use(client: Any) -> ServerUse:
    """What the server of `client` has used so far."""
    cpu, stats, commands = (client.info(section) for section in ("cpu", "stats", "commandstats"))
    calls = {name.removeprefix("cmdstat_"): int(of["calls"]) for name, of in commands.items()}
    return ServerUse(cpu["used_cpu_user"] + cpu["used_cpu_sys"], int(stats["total_reads_processed"]), calls)


def _lines(file: Path) -> list[str]:
    """Of one of /proc; none where the process has ended."""
    try:
        return file.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _cpu_s(stat: Path) -> float:
    # The name, in brackets, may hold blanks; behind it user and kernel time are fields 12 and 13.
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
