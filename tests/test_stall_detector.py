"""When a worker counts as standing still, and when not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from embedq.workers.heartbeat_line import DRAINING, LOADING, READY, Beat
from embedq.workers.launcher.stall_detector import Patience, Progress

PATIENCE = Patience(silent_s=5, working_s=100, loading_s=1800)


def progress(*beats: tuple[float, Beat], is_server_up: bool = True) -> Progress:
    made = Progress(0)
    for now_s, beat in beats:
        made.beat(beat, now_s, is_server_up)
    return made


def beats(**counts: Any) -> list[tuple[float, Beat]]:
    """One each second for 200 seconds; the event loop turns."""
    return [(now, Beat(READY, num_turns=now, **counts)) for now in range(201)]


def test_a_silent_worker_stands_still() -> None:
    seen = progress((10, Beat(READY)))
    assert seen.standstill(15, PATIENCE) is None
    assert seen.standstill(16, PATIENCE) == "no heartbeat for 6 s"


def test_one_that_holds_jobs_and_computes_none_stands_still() -> None:
    assert (
        progress(*beats(num_held=3)).standstill(200, PATIENCE)
        == "3 jobs are held and none was computed or answered for 200 s"
    )


def test_one_whose_event_loop_hangs_stands_still() -> None:
    stuck = [(now, Beat(READY, num_turns=7)) for now in range(201)]
    assert progress(*stuck).standstill(200, PATIENCE) == "its event loop has not turned for 200 s"


@pytest.mark.parametrize("counted", ["num_jobs", "num_batches"])
def test_one_that_computes_or_answers_gets_on(counted: str) -> None:
    held = Beat(READY, num_held=3)
    changes: list[tuple[int, dict[str, Any]]] = [(now, {"num_turns": now, counted: now // 90}) for now in range(201)]
    seen = progress(*((now, replace(held, **counts)) for now, counts in changes))
    assert seen.standstill(200, PATIENCE) is None


def test_an_idle_worker_and_one_that_drains_do_not_stand_still() -> None:
    assert progress(*beats()).standstill(200, PATIENCE) is None
    assert progress((0, Beat(READY)), (1, Beat(DRAINING, num_held=3))).standstill(1e9, PATIENCE) is None


@pytest.mark.parametrize("told", [[], [(0, Beat(LOADING))], [(now, Beat(LOADING)) for now in range(1801)]])
def test_loading_takes_its_time_and_not_for_ever(told: list[tuple[float, Beat]]) -> None:
    seen = progress(*told)
    assert seen.standstill(1800, PATIENCE) is None
    assert seen.standstill(1801, PATIENCE) == (
        "it has not loaded in 1800 s; if it needs longer, raise EMBEDQ_LOAD_TIMEOUT_S"
    )
    seen.excuse(1801)
    assert seen.standstill(3600, PATIENCE) is None


def test_one_that_has_loaded_may_be_as_old_as_it_likes() -> None:
    assert progress((1700, Beat(LOADING)), (1799, Beat(READY))).standstill(1802, PATIENCE) is None


def test_what_waits_for_the_server_does_not_stand_still_and_has_its_time_afterwards() -> None:
    away = [(now, Beat(READY, num_held=3)) for now in range(1000)]
    seen = progress(*away, is_server_up=False)
    assert seen.standstill(1000, PATIENCE) is None
    for now_s in range(1000, 1100):
        seen.beat(away[0][1], now_s)
    assert seen.standstill(1099, PATIENCE) is None
    seen.beat(away[0][1], 1101)
    assert seen.standstill(1101, PATIENCE) is not None


def test_whoever_slept_judges_nobody_by_that_time() -> None:
    seen = progress(*beats(num_held=3))
    seen.excuse(1000)
    assert seen.standstill(1004, PATIENCE) is None
