"""`python -m tests.bench scale`: a thousand workers on paper, and what a job costs the one server they share.

Simulated, in seconds: the scheduler in each of up to a thousand workers, and the policies that say how many there are.
With --measure also a real server and a real worker: bytes, operations and microseconds of the server for each job.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from embedq.deploy.demo import minilm
from embedq.workers.launcher.scaling_policy import Policy
from tests.bench.arguments import whole
from tests.bench.autoscaling import ByCluster, ByLauncher, Deciding, simulate
from tests.bench.many_workers import ManyWorkers
from tests.bench.report import Figure, show, write

#: Seconds from a worker's start to its first job in the simulation: a cold image, weights from a volume, warm-up.
LOAD_S = 60.0

#: Simulated seconds of a load; it ends half-way.
LOAD_SECONDS = 4 * 3600.0

#: Loads, in workers that they keep busy, by the largest pool they need.
LOADS: dict[str, Callable[[int], Callable[[float], float]]] = {
    "burst": lambda most: lambda now_s: 0.8 * most if 600 <= now_s < 1800 else 0.002 * most,
    "waves": lambda most: lambda now_s: most * (0.45 + 0.4 * math.sin(now_s / 600)),
    "trickle": lambda most: lambda now_s: 0.3 if now_s % 1200 < 30 else 0.0,
}


def main(arguments: list[str]) -> int:
    """Run it; returns the exit code."""
    asked = _parser().parse_args(arguments)
    figures = [*schedulers(asked.workers, asked.seconds), *policies(asked.workers)]
    if asked.measure:
        from tests.bench.server_cost import measured

        figures += measured(asked.model or minilm.directory(), asked.jobs)
    show(f"{asked.workers:,} workers", figures)
    if asked.json:
        write(asked.json, {"workers": asked.workers, "seconds": asked.seconds}, figures)
    return 0


def schedulers(num_workers: int, seconds: float) -> list[Figure]:
    """One worker against many on the same queue."""
    figures = []
    for number in sorted({1, num_workers}):
        # A single worker gives few interactive jobs a second: as long as it takes to have some hundreds.
        seen = ManyWorkers(number).run(seconds if number > 1 else 150.0)
        key, of = f"workers_{number}", f"{number:,} worker{'s' if number > 1 else ''}: "
        figures += [
            Figure(f"{key}_use", f"{of}wanted tokens of what the devices could do", 100 * seen.use, "%", 90),
            Figure(f"{key}_sequences", f"{of}sequences", seen.sequences_per_s, "per s"),
            Figure(f"{key}_interactive_p50", f"{of}interactive, p50", 1e3 * seen.interactive_p50_s, "ms"),
            Figure(f"{key}_interactive_p99", f"{of}interactive, p99", 1e3 * seen.interactive_p99_s, "ms"),
            Figure(f"{key}_fetches", f"{of}calls for jobs", seen.fetches_per_s, "per s"),
            Figure(f"{key}_jobs", f"{of}jobs taken", seen.jobs_per_s, "per s"),
            Figure(f"{key}_least_share", f"{of}least work of one, for its speed", 100 * seen.least_share, "%", 90),
        ]
    return figures


def policies(max_workers: int) -> list[Figure]:
    """Both policies on every load."""
    figures = []
    for name, load in LOADS.items():
        deciding: dict[str, Deciding] = {
            "launcher": ByLauncher(Policy(0, max_workers)),
            "cluster": ByCluster(max_workers),
        }
        for who, decide in deciding.items():
            row = simulate(decide, load(max_workers), LOAD_SECONDS, LOAD_S, 0)
            key, of = f"{name}_{who}", f"{name}, {who}: "
            figures += [
                Figure(f"{key}_worst", f"{of}worst backlog", row.worst_backlog_s, "s"),
                Figure(f"{key}_late", f"{of}longest time above a minute of it", row.late_s, "s"),
                Figure(f"{key}_most", f"{of}most workers", row.most_workers, ""),
                Figure(f"{key}_paid", f"{of}worker hours for one of work", row.worker_hours / row.needed_hours, "h"),
                Figure(f"{key}_turns", f"{of}changes of direction", row.num_turns, ""),
                Figure(f"{key}_emptied", f"{of}none left after the work's end", row.emptied_after_s, "s"),
            ]
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench scale", description=__doc__)
    add = parser.add_argument
    add("--workers", type=whole(), default=1000, help="workers simulated (default: %(default)s)")
    add("--seconds", type=float, default=3.0, help="seconds simulated of them (default: %(default)s)")
    add("--measure", action="store_true", help="also measure a real server and a real worker")
    add("--model", type=Path, help="of --measure: a model directory (default: the demo's MiniLM)")
    add("--jobs", type=whole(), default=1000, help="of --measure: one-text jobs (default: %(default)s)")
    add("--json", type=Path, help="write the figures there")
    return parser
