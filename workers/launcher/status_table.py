"""Shows people what the workers do: a live table on a terminal, else one log line per worker each minute.

Input: rows, one per worker, which `row` makes and remote control carries. On a terminal the workers' own output is
printed above the table, which it would otherwise overwrite.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import IO, Any

from embedq.core.guarded_thread import GuardedThread
from embedq.workers.heartbeat_line import Beat

log = logging.getLogger(__name__)

#: Seconds between the log lines of one worker.
_LINES_S = 60.0

#: Columns of the table: title, key of a row.
_COLUMNS = (
    ("worker", "worker"),
    ("device", "device"),
    ("model", "model"),
    ("state", "state"),
    ("jobs/s", "jobs_s"),
    ("tokens/s", "tokens_s"),
    ("jobs held", "held"),
    ("waiting tokens", "waiting_tokens"),
    ("memory", "memory_bytes"),
)


def row(beat: Beat, **known: Any) -> dict[str, Any]:
    """The row of one worker: from its heartbeat, with `known` over it."""
    return {
        "worker": beat.worker,
        "device": beat.worker.rpartition("@")[0].rpartition(".")[2],
        "model": beat.model,
        "state": beat.state,
        "jobs_s": beat.jobs_s,
        "tokens_s": beat.tokens_s,
        "held": beat.num_held,
        "waiting_tokens": beat.waiting_tokens,
        "memory_bytes": beat.memory_bytes,
    } | known


def table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> Any:
    """A rich table of `rows`."""
    from rich.table import Table

    made = Table(caption=caption or None, caption_justify="left")
    for title, key in _COLUMNS:
        made.add_column(title, justify="left" if key in ("worker", "device", "model", "state") else "right")
    for one in rows:
        made.add_row(*(_shown(key, one[key]) for _, key in _COLUMNS))
    return made


def _shown(key: str, value: Any) -> str:
    if key == "memory_bytes":
        return f"{value / 2**30:.1f} GiB"
    if key in ("held", "waiting_tokens"):
        return f"{value:,}"
    if key == "tokens_s":
        return f"{value:,.0f}"
    return f"{value:,.1f}" if key == "jobs_s" else str(value)


class Lines:
    """Shows rows as log lines, for output that is no terminal. A context manager, as `Live`."""

    #: Arguments for starting the workers' processes: none, they log to the same place as the launcher.
    popen: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self._next_s = _LINES_S

    def __enter__(self) -> Lines | Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: nothing is held."""

    def follow(self, process: subprocess.Popen[bytes]) -> None:
        """Do nothing: the process writes where we do."""

    def show(self, rows: Sequence[Mapping[str, Any]], caption: str, after_s: float) -> None:
        """Log each row once a minute; `after_s` counts from the launcher's start."""
        if after_s < self._next_s:
            return
        self._next_s = after_s + _LINES_S
        for one in rows:
            log.info("status of a worker", extra={"action": "worker_status", **one})
        log.info(caption, extra={"action": "status"})


class Live(Lines):
    """Shows rows as a table on a terminal."""

    popen: Mapping[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        super().__init__()
        self._live = RichLive(console=Console(stderr=True), auto_refresh=False)

    def __enter__(self) -> Live:
        self._live.start()
        _log_to(sys.stderr)  # which prints above the table now
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the terminal was closed, here and below: only what it would show is lost
            self._live.stop()
        _log_to(sys.stderr)

    def follow(self, process: subprocess.Popen[bytes]) -> None:
        """Print what a worker prints."""
        assert process.stdout
        GuardedThread("output", partial(self._print, process.stdout)).start()

    def show(self, rows: Sequence[Mapping[str, Any]], caption: str, after_s: float) -> None:
        """Redraw the table."""
        with suppress(OSError):
            self._live.update(table(rows, caption), refresh=True)

    def _print(self, output: IO[bytes]) -> None:
        with output:
            for line in output:
                text = line.decode(errors="replace").rstrip("\n")
                with suppress(OSError):
                    self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)


def fitting() -> Lines:
    """The screen that fits our standard error."""
    return Live() if sys.stderr.isatty() else Lines()


def _log_to(stream: Any) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(stream)
