"""Replacing workers one by one, over every order in which successors become ready, fail, and old ones end.

The fleet here is a simulation with the same methods; the real one is under test in `tests/test_launcher.py`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq.core.devices import Device
from embedq.workers.heartbeat_line import READY, Beat
from embedq.workers.launcher.rolling_restart import Rolling
from embedq.workers.launcher.stall_detector import Patience
from embedq.workers.launcher.worker_process import Child

DEVICE = Device("cpu", 0, "cpu")


class Fleet:
    """Workers without processes: the test decides when one is ready, fails or ends."""

    def __init__(self, num_workers: int) -> None:
        self.children: list[Child] = []
        self.wanted = num_workers
        for _ in range(num_workers):
            self.becomes_ready(self.add(DEVICE))

    @property
    def staying(self) -> list[Child]:
        return [child for child in self.children if child.deadline_s is None and not child.successor]

    def add(self, device: Device) -> Child:
        child = Child(device, f"cpu{len(self.children)}", Patience(60.0, 300.0, 1_800.0))
        child.process = SimpleNamespace(pid=1)  # type: ignore[assignment]
        self.children.append(child)
        return child

    def drain(self, child: Child, now_s: float) -> None:
        child.deadline_s = now_s + 60

    @property
    def num_ready(self) -> int:
        return sum(child.is_ready for child in self.children)

    def becomes_ready(self, child: Child) -> None:
        child.beat, child.started_s = Beat(state=READY), 1.0

    def fails(self, child: Child) -> None:
        """It crashed before it was ready, and waits for its next start."""
        child.process, child.started_s = None, 1.0

    def ends(self, child: Child) -> None:
        self.children.remove(child)


def begun(fleet: Fleet, drains_first: bool) -> Rolling:
    """A restart that has begun with the first worker."""
    rolling = Rolling(fleet, drains_first)  # type: ignore[arg-type]
    rolling.begin()
    rolling.step(2.0)
    return rolling


def advance(fleet: Fleet, rolling: Rolling, choice: int) -> None:
    """One of the things that can happen next: a successor becomes ready, or a draining worker ends."""
    possible: list[Any] = [(fleet.becomes_ready, child) for child in fleet.children if child.is_loading]
    possible += [(fleet.ends, child) for child in fleet.children if child.deadline_s is not None]
    assert possible, "a restart that waits for nothing"
    act, child = possible[choice % len(possible)]
    act(child)
    rolling.step(2.0)


@settings(max_examples=100)
@given(st.integers(1, 5), st.booleans(), st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_every_worker_is_replaced_and_no_capacity_is_lost(
    num_workers: int, drains_first: bool, choices: list[int]
) -> None:
    fleet = Fleet(num_workers)
    old = list(fleet.children)
    rolling = begun(fleet, drains_first)
    remaining = iter(choices)
    while rolling.is_under_way:
        assert fleet.num_ready >= num_workers - drains_first
        assert len(fleet.children) <= num_workers + 1, "one replacement at a time"
        advance(fleet, rolling, next(remaining))
    for child in [child for child in fleet.children if child.deadline_s is not None]:
        fleet.ends(child)
    assert not set(old) & set(fleet.children)
    assert len(fleet.children) == fleet.num_ready == fleet.wanted == num_workers


def test_a_successor_that_cannot_start_ends_the_restart_and_the_workers_stay() -> None:
    fleet = Fleet(2)
    old = list(fleet.children)
    rolling = begun(fleet, drains_first=False)
    fleet.fails(fleet.children[-1])
    rolling.step(2.0)
    assert not rolling.is_under_way
    assert fleet.children == old == fleet.staying
    assert fleet.wanted == 2


def test_where_the_old_one_drained_first_one_less_is_wanted_if_its_successor_cannot_start() -> None:
    fleet = Fleet(2)
    first, second = fleet.children
    rolling = begun(fleet, drains_first=True)
    assert first.deadline_s is not None
    assert len(fleet.children) == 2, "its place is not free yet"
    fleet.ends(first)
    rolling.step(2.0)
    fleet.fails(fleet.children[-1])
    rolling.step(2.0)
    assert not rolling.is_under_way
    assert (fleet.children, fleet.wanted) == ([second], 1)


@pytest.mark.parametrize("drains_first", [False, True])
def test_a_restart_begun_again_replaces_also_what_the_first_one_started(drains_first: bool) -> None:
    fleet = Fleet(2)
    rolling = begun(fleet, drains_first)
    for _ in range(2):
        advance(fleet, rolling, 0)
    present = list(fleet.staying)
    rolling.begin()
    rolling.step(2.0)
    for _ in range(20):
        if rolling.is_under_way:
            advance(fleet, rolling, 0)
    assert not rolling.is_under_way
    assert not set(present) & set(fleet.staying)


def test_a_worker_that_is_gone_meanwhile_is_not_replaced() -> None:
    fleet = Fleet(2)
    first, second = fleet.children
    rolling = begun(fleet, drains_first=False)
    fleet.ends(second)
    (new,) = (child for child in fleet.children if child is not first)
    fleet.becomes_ready(new)
    rolling.step(2.0)
    assert first.deadline_s is not None
    fleet.ends(first)
    rolling.step(2.0)
    assert not rolling.is_under_way
    assert fleet.children == [new]
