"""Child processes: where they run, what they inherit, that they end with their parent, and what a start costs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from embedq.workers.processes import spawn, stop
from tests.running import ROOT, Running, is_alive

#: Prints what a child finds, as JSON.
LOOKS = """
import json, os, signal, sys
print(json.dumps({
    "arguments": sys.argv[1:], "cores": sorted(os.sched_getaffinity(0)), "is_leader": os.getsid(0) == os.getpid(),
    "variable": os.environ.get("A_VARIABLE"), "parent": os.getppid(), "pid": os.getpid(),
    "ignored": next(line.split()[1] for line in open("/proc/self/status") if line.startswith("SigIgn")),
}))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_child_is_the_program_itself_with_its_cores_environment_and_session() -> None:
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", LOOKS, "a b", ""]
    with spawn(command, {"A_VARIABLE": "set"}, [core], stdout=subprocess.PIPE) as process:
        found = json.loads(process.communicate(timeout=60)[0])
    plain = subprocess.run([sys.executable, "-c", LOOKS], capture_output=True, check=True)
    ignored = json.loads(plain.stdout)["ignored"]
    assert found == {
        "arguments": ["a b", ""], "cores": [core], "is_leader": True, "variable": "set", "parent": os.getpid(),
        "pid": process.pid, "ignored": ignored,
    }  # fmt: skip


def test_a_child_has_the_pipes_it_is_given_and_no_others() -> None:
    given, other = os.pipe(), os.pipe()
    program = "import os, sys; os.write(int(sys.argv[1]), b'told')\ntry: os.fstat(int(sys.argv[2]))\nexcept OSError: sys.exit(3)"
    with spawn([sys.executable, "-c", program, str(given[1]), str(other[1])], pass_fds=(given[1],)) as process:
        assert process.wait(60) == 3
    assert os.read(given[0], 10) == b"told"
    for end in (*given, *other):
        os.close(end)


def test_a_program_that_is_not_there_is_an_error_at_once() -> None:
    with pytest.raises(FileNotFoundError):
        spawn(["no-such-program-anywhere"])


def test_children_end_with_a_parent_that_is_killed() -> None:
    program = (
        "import sys, time\nfrom embedq.workers.processes import spawn\n"
        "print('child', spawn([sys.executable, '-c', 'import time; time.sleep(300)']).pid, flush=True)\ntime.sleep(300)"
    )
    with Running([sys.executable, "-c", program]) as parent:
        pid = int(parent.wait_for("child")[0].split()[1])
        _wait_until_it_is(pid, "time.sleep(300)")
        parent.process.send_signal(signal.SIGKILL)
        deadline_s = time.monotonic() + 20
        while is_alive(pid):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_no_python_code_of_ours_runs_between_fork_and_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **options: (asked.append(options), real(*args, **options))[1]
    )
    stop(spawn([sys.executable, "-c", ""]), 20)
    assert asked
    assert all(options.get("preexec_fn") is None for options in asked)
    sources = [path for path in (ROOT / "workers").rglob("*.py") if "preexec_fn=" in path.read_text()]
    assert sources == []


@pytest.mark.timing
def test_a_start_costs_some_milliseconds_more_than_the_programs_own() -> None:
    def seconds(start: object) -> float:
        begun_s = time.monotonic()
        start().wait(20)  # type: ignore[operator]
        return time.monotonic() - begun_s

    bare = statistics.median(seconds(lambda: subprocess.Popen(["true"])) for _ in range(15))
    ours = statistics.median(seconds(lambda: spawn(["true"])) for _ in range(15))
    assert ours - bare < 0.1


def _wait_until_it_is(pid: int, words: str) -> None:
    deadline_s = time.monotonic() + 20
    while f"-c\0import time; {words}" not in Path(f"/proc/{pid}/cmdline").read_text():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)
