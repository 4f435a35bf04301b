"""`python -m tests.bench.padding`: what share of a batch is padding, and what the scheduler's own work costs.

A backlog that is refilled as batches leave, so that always as much waits; lengths are drawn like
those of real texts. Seconds do not come into it, but for the two timings at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np

from embedq.core.batching.batch_stats import Totals
from embedq.core.batching.scheduler import Limits, Scheduler
from embedq.core.sequence import Sequence, Tokens
from tests.bench.arguments import whole

SEED = 7

#: Logarithm of the median length and its spread, by the mean that comes of it; cut at 512 tokens.
TEXTS = {132: (4.48, 1.0), 200: (5.0, 1.0)}
MAX_LENGTH = 512

MAX_SEQUENCES = 512

#: Starting a batch is taken to cost as much as this share of a full one.
OVERHEAD_SHARE = 1 / 32

#: Batches at the start that do not count: the backlog has not settled yet.
NUM_SETTLING = 100

#: Sequences that wait while adding and taking is timed.
NUM_TIMED = 320_000


def sequence(num_tokens: int, arrived: int = 0) -> Sequence:
    return Sequence(Tokens(np.broadcast_to(np.int32(0), num_tokens)), "model", is_bulk=True, rows=[(None, arrived)])


def drawn(mean: int) -> Iterator[int]:
    """Lengths without end."""
    draw = np.random.default_rng(SEED)
    while True:
        yield from draw.lognormal(*TEXTS[mean], 10_000).clip(3, MAX_LENGTH).astype(int).tolist()


@dataclass(frozen=True)
class Row:
    """What a simulation gave."""

    #: Of all tokens computed, those that are padding.
    padding: float
    #: Of the budgets, what was used.
    fill: float
    #: Tokens wanted, of tokens computed and the cost of starting the batches.
    use: float
    #: Longest wait of any sequence, in multiples of what it would have been in turn.
    longest_wait: float


def simulate(mean: int, max_tokens: int, depth: int, num_batches: int, overhead_share: float = OVERHEAD_SHARE) -> Row:
    """Take `num_batches` while always `depth` batches' worth of bulk texts of `mean` tokens waits."""
    overhead = int(max_tokens * overhead_share)
    scheduler = Scheduler({"model": Limits(max_tokens, MAX_SEQUENCES, overhead)}, np.inf, np.inf)
    lengths, longest_wait, settled = drawn(mean), 0.0, scheduler.totals
    for number in range(NUM_SETTLING + num_batches):
        if number == NUM_SETTLING:
            settled, longest_wait = replace(scheduler.totals), 0.0
        # The clock is the tokens that left so far.
        now = scheduler.totals.num_tokens
        while scheduler.num_tokens(is_bulk=True) < depth * max_tokens:
            scheduler.add(sequence(next(lengths), arrived=now))
        longest_wait = max(longest_wait, *(now - one.rows[0][1] for one in scheduler.next_batch(now)), 0.0)
    counts = asdict(settled)
    total = Totals(**{name: count - counts[name] for name, count in asdict(scheduler.totals).items()})
    use = total.num_tokens / (total.num_padded_tokens + total.num_batches * overhead)
    return Row(total.padding_share, total.fill, use, longest_wait / (depth * max_tokens))


def seconds_each(step: Callable[[], object], num_steps: int) -> float:
    started_s = time.perf_counter()
    for _ in range(num_steps):
        step()
    return (time.perf_counter() - started_s) / num_steps


def print_timings() -> None:
    for name, mean, most in (("lengths of real texts", 200, MAX_LENGTH), ("at most 16 tokens", 132, 16)):
        scheduler = Scheduler({"model": Limits(16_384, MAX_SEQUENCES, 512)}, np.inf, np.inf)
        lengths = drawn(mean)
        waiting = iter([sequence(min(most, next(lengths))) for _ in range(NUM_TIMED + 1)])
        while scheduler.num_sequences < NUM_TIMED - 10_000:
            scheduler.add(next(waiting))
        add_s = seconds_each(lambda: scheduler.add(next(waiting)), 10_000)  # noqa: B023
        batch_s = seconds_each(lambda: scheduler.next_batch(0.0), 200)  # noqa: B023
        size = scheduler.totals.num_sequences / scheduler.totals.num_batches
        print(
            f"{NUM_TIMED:,} waiting, {name}: add {add_s * 1e6:.1f} us, next_batch of {size:.0f} {batch_s * 1e6:.0f} us"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.padding", description=__doc__)
    parser.add_argument("--batches", type=whole(), default=500, help="batches simulated for each row")
    num_batches = parser.parse_args().batches
    print("tokens each  budget  batches waiting  padding  fill  wanted per computed  longest wait / depth")
    for max_tokens in (2_048, 16_384):
        for mean in TEXTS:
            for depth in (4, 8, 16, 32):
                row = simulate(mean, max_tokens, depth, num_batches)
                shares = f"{row.padding:8.1%} {row.fill:5.0%} {row.use:20.1%}"
                print(f"{mean:11} {max_tokens:7} {depth:16} {shares} {row.longest_wait:21.1f}")
    print_timings()


if __name__ == "__main__":
    main()
