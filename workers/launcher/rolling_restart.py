"""Replaces workers one by one, so that a new model revision goes live without loss of capacity.

Each worker's successor starts beside it, and the worker drains once its successor takes jobs. If a device's memory
holds one worker only, the worker drains first: one worker's share of the capacity is missing while its successor loads.
If a successor cannot start, the workers that are not replaced yet stay.
"""

from __future__ import annotations

import logging

from embedq.workers.launcher.fleet import Fleet
from embedq.workers.launcher.worker_process import Child

log = logging.getLogger(__name__)


class Rolling:
    """A rolling restart: one replacement at a time, the fleet keeps its size. On the launcher's main thread."""

    def __init__(self, fleet: Fleet, drains_first: bool) -> None:
        self._fleet = fleet
        self._drains_first = drains_first
        self._left: list[Child] = []
        #: The worker that is replaced, and its successor.
        self._old: Child | None = None
        self._new: Child | None = None

    @property
    def is_under_way(self) -> bool:
        return bool(self._left or self._old)

    def begin(self) -> None:
        """Replace every present worker, also those that a restart in progress has started."""
        self._left = [child for child in self._fleet.staying if child is not self._new or child.process]
        log.info("workers are being replaced", extra={"action": "replacing", "num_workers": len(self._left)})

    def step(self, now_s: float) -> None:
        """Do as much of the restart as is possible now. Called whenever something has changed."""
        while self.is_under_way:
            if self._old is None and not self._next(now_s):
                return
            assert self._old
            is_gone = self._old not in self._fleet.children
            if self._new is None:
                if not is_gone:
                    return
                self._new = self._successor(self._old)  # its place is free now
                return
            if self._has_failed():
                self._give_up()
                return
            if not self._new.is_ready:
                return
            if not is_gone:
                self._fleet.drain(self._old, now_s)
                if self._old in self._fleet.children:
                    return
            log.info(
                "a worker was replaced", extra={"action": "replaced", "old": self._old.name, "new": self._new.name}
            )
            self._new.is_successor = False  # a restart after a crash must not bring an old revision back
            self._old = self._new = None
            if not self._left:
                log.info("all workers were replaced", extra={"action": "replaced_all"})

    def _next(self, now_s: float) -> bool:
        """Start to replace the next worker that is still present; False if there is none."""
        self._left = [child for child in self._left if child in self._fleet.staying]
        if not self._left:
            return False
        self._old = self._left.pop(0)
        if self._drains_first:
            self._fleet.drain(self._old, now_s)
        else:
            self._new = self._old.successor = self._successor(self._old)
        return True

    def _successor(self, old: Child) -> Child:
        new = self._fleet.add(old.device)
        new.is_successor = True
        return new

    def _has_failed(self) -> bool:
        new = self._new
        assert new
        return new not in self._fleet.children or (new.process is None and new.started_s > 0)

    def _give_up(self) -> None:
        assert self._new
        assert self._old
        if self._new in self._fleet.children:
            self._fleet.children.remove(self._new)
        is_kept = self._old in self._fleet.children and self._old.deadline_s is None
        self._old.successor = None
        if not is_kept:
            self._fleet.wanted -= 1
        log.error(
            "a worker's successor did not start, its reason is above; %s",
            "the workers stay as they are"
            if is_kept
            else "one worker less is left: fix the reason, then scale up again",
            extra={"action": "replace_failed", "worker": self._old.name, "num_left": len(self._left)},
        )
        self._left, self._old, self._new = [], None, None
