"""What people see of the workers: a table on a terminal, log lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import pytest
from rich.console import Console

from embedq.workers.heartbeat_line import READY, Beat
from embedq.workers.launcher.status_table import Lines, row, table
from tests.pools import TINY, environment
from tests.running import ROOT

BEAT = Beat(READY, "m.cuda0@host", "m", num_held=12, waiting={"m": 34000, "n": 567}, jobs_s=8.25, tokens_s=98765.4)

#: Wide enough for every column.
_SIZE = os.terminal_size((160, 50))

TIMEOUT_S = 60.0


def drawn(rows: list[dict[str, object]], caption: str = "") -> list[str]:
    output = io.StringIO()
    Console(file=output, width=_SIZE.columns).print(table(rows, caption))
    return output.getvalue().splitlines()


def test_a_table_has_a_line_per_worker_with_its_figures() -> None:
    lines = drawn([row(BEAT), row(Beat(), worker="cuda1", device="cuda1", model="m", state="waiting")], "2 wanted")
    first = next(line for line in lines if "m.cuda0@host" in line)
    assert [cell.strip() for cell in first.strip("│").split("│")] == [
        "m.cuda0@host", "cuda0", "m", "ready", "8.2", "98,765", "12", "34,567", "0.0 GiB",
    ]  # fmt: skip
    assert any("cuda1" in line and "waiting" in line for line in lines)
    assert lines[-1].strip() == "2 wanted"


def test_without_a_terminal_each_worker_has_a_log_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="embedq")
    with Lines() as lines:
        for second in range(130):
            lines.show([row(BEAT)], "nothing waits", second)
    told = [record for record in caplog.records if vars(record).get("action") == "worker_status"]
    assert len(told) == 2
    assert vars(told[0])["tokens_s"] == 98765.4


@pytest.fixture
def terminal() -> Iterator[tuple[FileIO, FileIO]]:
    """Both ends of a terminal: ours, and that of a program in it."""
    # Files, not numbers: a number that was closed is soon another file's, and must not be closed again.
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(FileIO(end, "r+")) for end in pty.openpty())
        termios.tcsetwinsize(theirs, (_SIZE.lines, _SIZE.columns))
        yield ours, theirs


def test_on_a_terminal_there_is_a_table_and_closing_it_stops_all(
    server: str, tmp_path: Path, terminal: tuple[FileIO, FileIO]
) -> None:
    ours, theirs = terminal

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(2, termios.TIOCSCTTY, 0)

    with environment(server, "shown", TINY, tmp_path) as variables:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "embedq.workers", "--cpu-workers", "1"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **variables},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=take_terminal,
        )
        theirs.close()
        try:
            seen = b""
            while "│ ready".encode() not in seen:
                seen += ours.read(65_536)
            assert b"action=worker_ready" in seen, "what workers print is shown, too"
            assert b"jobs in the queues" in seen
            ours.close()
            assert launcher.wait(TIMEOUT_S) == 0
        finally:
            launcher.kill()
            launcher.wait()
