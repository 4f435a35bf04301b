"""A run: a dataset in its target, and all that can be done with it, from any machine. It keeps no state of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from embedq.core.errors import InvalidInput, WorkerError
from embedq.tasks.application import app, key_prefix
from embedq.tasks.datasets.checking import Findings, verify
from embedq.tasks.datasets.manifest import CANCELLED, FAILED, Manifest, read_manifest
from embedq.tasks.datasets.part_task import ALL, WINDOW_PARTS, send_parts
from embedq.tasks.datasets.part_task import FAILED as FAILED_ROWS
from embedq.tasks.datasets.planning import Question, plan, write
from embedq.tasks.datasets.run_state import Record, RunState
from embedq.tasks.datasets.status import FINAL, Status, done_parts, status_of
from embedq.tasks.datasets.stores import Store, locate

#: Jobs sent between two notes of what was sent.
_PARTS_PER_NOTE = 500

#: Seconds between two looks of whoever waits, at first and later.
_FIRST_LOOK_S, _LOOK_S = 0.2, 2.0

#: Seconds after which a temporary object is nobody's any more.
_LEFTOVER_S = 3600.0


@dataclass(frozen=True)
class Run:
    """A dataset in a target."""

    target: str
    manifest: Manifest

    def status(self) -> Status:
        """Read the status from the target and the server."""
        return status_of(self.manifest, self._store, self._state)

    def records(self) -> dict[int, Record]:
        """The last record that workers have written of each part."""
        return self._state.records()

    def wait(self, timeout: float | None = None, tell: Callable[[Status], None] | None = None) -> Status:
        """Wait until the run ends; returns its last status. `tell` is called with each status on the way.

        TimeoutError if it does not end in time; WorkerError if parts failed.
        """
        until_s, pause_s = _until(timeout), _FIRST_LOOK_S
        while True:
            status = self.status()
            if tell:
                tell(status)
            if status.state in FINAL:
                return _checked(status)
            if time.monotonic() + pause_s > until_s:
                raise TimeoutError(f"the dataset in {self.target} is {status.state} after {timeout} s")
            time.sleep(pause_s)
            pause_s = min(_LOOK_S, pause_s * 1.5)

    async def await_(self, timeout: float | None = None) -> Status:
        """`wait` for an event loop, which stays free meanwhile."""
        until_s, pause_s = _until(timeout), _FIRST_LOOK_S
        while True:
            status = await asyncio.to_thread(self.status)
            if status.state in FINAL:
                return _checked(status)
            if time.monotonic() + pause_s > until_s:
                raise TimeoutError(f"the dataset in {self.target} is {status.state} after {timeout} s")
            await asyncio.sleep(pause_s)
            pause_s = min(_LOOK_S, pause_s * 1.5)

    def cancel(self) -> list[str]:
        """Stop it: what is done stays. Returns the names of leftovers that were removed."""
        self._store.replace(CANCELLED, lambda file: file.write(b"cancelled\n"))
        self._state.cancel()
        leftovers = self._store.leftovers(_LEFTOVER_S)
        for name in leftovers:
            self._store.remove(name)
        self._store.abort_uploads()
        return leftovers

    def resume(self) -> int:
        """Queue all that is not done, in a new round; returns how many parts."""
        self._store.remove(CANCELLED)
        state = self._state
        with state.starting():
            state.forget_failures()
            round_ = state.next_round()
            return self._send(state, round_)

    def retry_failed(self) -> int:
        """Compute failed rows alone and write their parts anew, and failed parts again; returns how many parts."""
        listed = self._store.entries(FAILED)
        done = done_parts(self.manifest, self._store)
        with_failed_rows = [number for number in sorted(done) if self.manifest.failed_name(number) in listed]
        state, parts = self._state, self.manifest.parts
        with state.starting():
            round_ = state.begin()
            failed = self.status().errors
            state.forget_failures()
            send_parts(self.manifest, self.target, [parts[n] for n in with_failed_rows], round_, FAILED_ROWS)
            send_parts(self.manifest, self.target, [parts[n] for n in failed], round_, ALL)
        return len(with_failed_rows) + len(failed)

    def verify(self) -> Findings:
        """Read every part whole and compare it with the manifest."""
        return verify(self.manifest, self._store)

    def go_on(self) -> int:
        """Queue what was never queued; of a run that has stopped, all that is not done. Returns how many parts."""
        state, known = self._state, self._state.known()
        if self._store.entry(CANCELLED) or "cancelled" in known:
            return self.resume()
        if known and self.status().state == "failed":
            return self.resume()
        with state.starting():
            return self._send(state, state.begin())

    def _send(self, state: RunState, round_: int) -> int:
        done = done_parts(self.manifest, self._store)
        left = [part for part in self.manifest.parts if part.number not in done]
        # Those beyond the window are queued by parts before them, one by one, or here if those are done.
        near = [part for part in left if part.number < WINDOW_PARTS or part.number - WINDOW_PARTS in done]
        unsent = set(state.unsent(part.number for part in near))
        near = [part for part in near if part.number in unsent]
        for start in range(0, len(near), _PARTS_PER_NOTE):
            state.mark_sent(send_parts(self.manifest, self.target, near[start : start + _PARTS_PER_NOTE], round_))
        return len(near)

    @property
    def _store(self) -> Store:
        return Store(locate(self.target))

    @property
    def _state(self) -> RunState:
        return RunState(app.backend.client, key_prefix(app), self.manifest.id)


def start(asked: Question, is_adding: bool = False, is_conditional: bool = True) -> Run:
    """Plan, write the manifest, queue the parts. Returns at once; nothing needs this process any more."""
    manifest, old = plan(asked, is_adding)
    store = Store(locate(asked.target), is_conditional)
    if old is None and is_conditional:
        store.check()
    manifest = write(manifest, old, store)
    run = Run(str(store.location), manifest)
    run.go_on()
    return run


def open_run(target: str) -> Run:
    """The run in a target. InvalidInput if there is none."""
    store = Store(locate(target))
    manifest = read_manifest(store)
    if manifest is None:
        raise InvalidInput(f"{store.location} holds no dataset")
    return Run(str(store.location), manifest)


def _until(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


def _checked(status: Status) -> Status:
    if status.state == "failed":
        first = next(iter(status.errors.items()), (0, "unknown"))
        raise WorkerError(f"{status.parts.failed:,} parts failed; the first is part {first[0]:,}: {first[1]}")
    return status
