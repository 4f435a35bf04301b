"""`python -m tests.chaos [NAME …]`: real workers, a real server, and everything done to them that may happen.

    storm    workers, connections and the server are killed, stopped and frozen under load
    fuzz     messages that are no jobs among good ones
    poison   jobs that kill every worker that computes them, among others
    threads  threads of workers that end one by one under load
    forks    producers that fork, wait in all processes at once, and lose their connections
    upgrade  workers of the previous release, killed and drained while ours take over
    datasets parts of datasets while workers, broker, store and loaders are killed

Without a name all. Ends with code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

from tests.chaos.runs import RUNS, make

#: Whoever reads a failure can run it again.
_DEFAULT_SEED = 1


def main(arguments: list[str]) -> int:
    """Run what is asked for; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    what = given.what or RUNS
    if unknown := set(what) - set(RUNS):
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    # Before anything of ours is imported: somebody's own settings must not change what is tested.
    for name in [name for name in os.environ if name.startswith(("EMBEDQ_", "CHAOS_"))] + ["REDIS_URL"]:
        os.environ.pop(name, None)
    os.environ["EMBEDQ_CONFIG"] = ""

    from tests.bench.report import Figure, show, write

    begun_s = time.monotonic()
    print(f"seed {given.seed}", file=sys.stderr, flush=True)
    figures: list[Figure] = []
    for name in what:
        # A process for each: what a producer remembers of its server is not for another one.
        with multiprocessing.get_context("spawn").Pool(1) as process:
            figures += process.apply(make, (name, given.seed, given.quick, given.messages, given.appendfsync))
    show(f"chaos, seed {given.seed}, {time.monotonic() - begun_s:.0f} s", figures)
    if given.json:
        write(given.json, {"seed": given.seed, "quick": given.quick, "what": what}, figures)
    return int(any(figure.is_met is False for figure in figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", nargs="*", metavar="|".join(RUNS), help="default: all")
    add("--quick", action="store_true", help="few of everything: what the test suite runs")
    add("--seed", type=int, default=_DEFAULT_SEED, help="of all that is random (default: %(default)s)")
    add("--messages", type=int, metavar="N", help="fuzzed messages (default: 10,000)")
    add("--appendfsync", choices=["always", "everysec", "no"], default="always", help="of the server that is killed")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
