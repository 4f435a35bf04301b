"""Which devices are the same, and who may have one; the other holders are real processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from embedq import tasks
from embedq.core.devices import Device
from embedq.core.errors import OperatorError
from embedq.workers.launcher.device_locks import file_names, holders, locked
from tests.running import Running

CORES = Device("cpu", 0, "a processor", cores=(0, 1))

#: Locks the core 1 as a launcher does, hands the lock to a child, and tells.
_HOLD = """
import subprocess
from embedq.core.devices import Device
from embedq.workers.launcher.device_locks import locked
with locked([Device("cpu", 3, "", cores=(1,))], 1) as descriptors:
    child = subprocess.Popen(["sleep", "60"], pass_fds=descriptors["cpu3"])
    print("child", child.pid, flush=True)
    child.wait()
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the locks are, of this process and of others."""
    monkeypatch.setitem(tasks.config.wire, "data_dir", str(tmp_path))
    return tmp_path / "devices"


@contextmanager
def holding(directory: Path) -> Iterator[tuple[Running, int]]:
    """Another launcher, and the process id of its worker."""
    with Running([sys.executable, "-c", _HOLD], {"EMBEDQ_DATA_DIR": str(directory.parent)}) as running:
        child = int(running.wait_for("child")[0].split()[1])
        try:
            yield running, child
        finally:
            with suppress(ProcessLookupError):  # killed by the test
                os.kill(child, signal.SIGKILL)


def test_a_device_has_one_name_whichever_part_of_the_machine_a_launcher_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert file_names(Device("cuda", 2, "")) == ["cuda2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,MIG-1/0")
    assert file_names(Device("cuda", 0, "")) == ["cuda2"]
    assert file_names(Device("cuda", 1, "")) == ["cudaMIG-1-0"]
    assert file_names(Device("mps", 0, "")) == ["mps0"]
    assert file_names(CORES) == ["core0", "core1"]


def test_a_device_of_a_launcher_that_lives_is_refused_at_once_and_its_process_named(directory: Path) -> None:
    with holding(directory) as (other, child):
        refusal = rf"cpu0 belongs to the launcher with process id {other.process.pid};"
        with pytest.raises(OperatorError, match=refusal), locked([CORES], 60):
            pass
        assert holders(directory / "core1") == {other.process.pid, child}
        with locked([Device("cpu", 0, "", cores=(0, 2))], 60) as descriptors:
            assert len(descriptors["cpu0"]) == 2, "other cores are free"


def test_a_worker_that_outlives_its_launcher_keeps_the_device_until_it_is_killed(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="embedq")
    with ExitStack() as stack:
        other, child = stack.enter_context(holding(directory))
        other.process.kill()
        other.process.wait()
        with locked([CORES], 0.3):
            assert (directory / "core1").read_text() == f"{os.getpid()}\n"
        actions = [vars(record)["action"] for record in caplog.records]
        assert actions[0] == "device_wait"
        assert actions[-1] == "orphan_killed"
        assert vars(caplog.records[-1])["pid"] == child


def test_a_directory_that_cannot_be_written_is_told_and_no_reason_not_to_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(tasks.config.wire, "data_dir", os.devnull)
    with locked([CORES], 1) as descriptors:
        assert descriptors == {}
    assert "devices cannot be locked" in caplog.text
