"""Whether a worker gets on, by what its heartbeats say. Pure: times come in as arguments.

Three clocks, because three things can stop: the process (it is silent), its event loop (it does not turn), and the
work (jobs are held, and none is computed or answered). Before it has loaded there is one: that takes its time, and
ends. What waits for the server is no standstill of the worker's.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedq.workers.heartbeat_line import LOADING, READY, Beat


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds after which each standstill counts."""

    #: Longer than any pause of a process that runs, and no shorter than a lease: other workers have its jobs by then.
    silent_s: float
    #: Longer than the engine's own limit of one pass: a worker ends itself when that is over, and tells more.
    working_s: float
    #: From a process's start until it takes jobs.
    loading_s: float


class Progress:
    """The standstills of one worker process."""

    def __init__(self, begun_s: float) -> None:
        self._last: Beat | None = None
        self._begun_s = self._heard_s = self._worked_s = self._turned_s = begun_s

    def beat(self, beat: Beat, now_s: float, is_server_up: bool = True) -> None:
        """Take note of a heartbeat that came at `now_s`."""
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
        """Begin anew: whoever watches has slept, and knows nothing of the time before."""
        self._begun_s = self._heard_s = self._worked_s = self._turned_s = now_s

    @property
    def is_loading(self) -> bool:
        """Whether it has taken no job yet."""
        return self._last is None or self._last.state == LOADING

    def standstill(self, now_s: float, patience: Patience) -> str | None:
        """What has stopped for too long; None if all is well."""
        if self.is_loading and now_s - self._begun_s > patience.loading_s:
            return (
                f"it has not loaded in {patience.loading_s:.0f} s; where that is too short, raise EMBEDQ_LOAD_TIMEOUT_S"
            )
        if self._last is None or self._last.state != READY:
            return None
        if now_s - self._heard_s > patience.silent_s:
            return f"no sign of life for {now_s - self._heard_s:.0f} s"
        if now_s - self._worked_s > patience.working_s:
            return f"{self._last.num_held} jobs held and none computed or answered for {now_s - self._worked_s:.0f} s"
        if now_s - self._turned_s > patience.working_s:
            return f"its event loop has not turned for {now_s - self._turned_s:.0f} s"
        return None
