"""The simulations behind `docs/scale.md`: repeatable, and what they show of scheduler and policies."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from embedq.workers.launcher.scaling_policy import Policy
from tests.bench.autoscaling import ByCluster, ByLauncher, Pool, Row, simulate
from tests.bench.many_workers import ManyWorkers
from tests.benches import figures_of

MOST, LOAD_S = 50, 60.0


def steady(now_s: float) -> float:
    return 20.0


def run(name: str, load_s: float = LOAD_S) -> Row:
    decide = ByCluster(MOST) if name == "cluster" else ByLauncher(Policy(0, MOST))
    return simulate(decide, steady, 2 * 3600.0, load_s, 0)


def test_many_workers_keep_their_devices_as_busy_as_one_and_share_fairly() -> None:
    seen = ManyWorkers(60).run(1.5)
    assert seen.use > 0.9
    assert seen.least_share > 0.85
    assert seen.interactive_p99_s < 0.25


def test_a_simulation_gives_the_same_again() -> None:
    assert ManyWorkers(10).run(1.0) == ManyWorkers(10).run(1.0)
    assert run("cluster") == run("cluster")


@pytest.mark.parametrize("policy", ["launcher", "cluster"])
def test_a_policy_meets_a_steady_load_with_about_the_workers_it_needs(policy: str) -> None:
    row = run(policy)
    assert 20 <= row.most_workers <= MOST
    assert row.num_turns <= 4
    assert row.late_s < 1200
    assert row.worker_hours < 3 * row.needed_hours


def test_the_cluster_goes_to_none_soon_after_the_work() -> None:
    emptied_after_s = run("cluster").emptied_after_s
    assert emptied_after_s is not None
    assert emptied_after_s < 600


def test_workers_that_load_do_nothing_yet() -> None:
    pool = Pool(load_s=10.0)
    for step in range(10):
        pool.step(float(step), 1.0, wanted=5)
    assert (pool.num_ready, pool.work_s) == (0, 10.0)
    pool.step(10.0, 0.0, wanted=5)
    assert (pool.num_ready, pool.work_s) == (5, 5.0)
    pool.step(11.0, 0.0, wanted=2)
    assert (pool.num_workers, pool.work_s) == (2, 0.0)


def test_the_command_tells_every_figure(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, "scale", "--workers", "20", "--seconds", "1")
    assert len(figures) == 2 * 7 + 3 * 2 * 6
    assert all(value is None or math.isfinite(value) for value in figures.values())
    assert all(value is not None for key, value in figures.items() if not key.endswith("_emptied"))
