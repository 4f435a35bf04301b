"""Decides from heartbeats whether a worker is stalled. Pure: times come in as arguments.

It has three clocks, because three things can stop: the process (it is silent), its event loop (it does not turn), and
the work (jobs are held, and none is computed or answered). While the worker loads, only the loading time is bounded.
A worker that waits for the server is not stalled.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedq.workers.heartbeat_line import LOADING, READY, Beat


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds after which each kind of standstill is a stall."""

    #: Longer than any pause of a process that runs, and no shorter than a lease: other workers have its jobs by then.
    silent_s: float
    #: Longer than the engine's own limit of one pass: after that a worker ends by itself, with a better log line.
    working_s: float
    #: From a process's start until it takes jobs.
    loading_s: float


class Progress:
    """The progress of one worker process."""

    def __init__(self, begun_s: float) -> None:
        self._last: Beat | None = None
        self._begun_s = self._heard_s = self._worked_s = self._turned_s = begun_s

    def beat(self, beat: Beat, now_s: float, is_server_up: bool = True) -> None:
        """Record a heartbeat that came at `now_s`."""
        last, self._last = self._last, beat
        self._heard_s = now_s
        if last is None or last.state != READY or beat.state != READY or not is_server_up:
            self._worked_s = self._turned_s = now_s
            return
        if beat.num_held == 0 or beat.work_done != last.work_done:
            self._worked_s = now_s
        if beat.num_turns != last.num_turns:
            self._turned_s = now_s

    def excuse(self, now_s: float) -> None:
        """Restart all clocks: the watching process was asleep and knows nothing of the time before."""
        self._begun_s = self._heard_s = self._worked_s = self._turned_s = now_s

    @property
    def is_loading(self) -> bool:
        """True until the worker takes jobs."""
        return self._last is None or self._last.state == LOADING

    def standstill(self, now_s: float, patience: Patience) -> str | None:
        """Returns the reason for which the worker counts as stalled; None if it does not."""
        if self.is_loading and now_s - self._begun_s > patience.loading_s:
            return f"it has not loaded in {patience.loading_s:.0f} s; if it needs longer, raise EMBEDQ_LOAD_TIMEOUT_S"
        if self._last is None or self._last.state != READY:
            return None
        if now_s - self._heard_s > patience.silent_s:
            return f"no heartbeat for {now_s - self._heard_s:.0f} s"
        if now_s - self._worked_s > patience.working_s:
            return f"{self._last.num_held} jobs are held and none was computed or answered for {now_s - self._worked_s:.0f} s"
        if now_s - self._turned_s > patience.working_s:
            return f"its event loop has not turned for {now_s - self._turned_s:.0f} s"
        return None
