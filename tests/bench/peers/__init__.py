"""`python -m tests.bench peers`: embedq through its queue against its peers, same model, same texts, one run.

Peers run in environments of their own, built by `make bench-peers`; one that is missing is told as such.
Peers compute in-process, Infinity behind its own HTTP server; ours is sent through a real server to a real worker,
and its time runs from the first send to the last stored result. Ratios count, and only within one run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedq.core.errors import EmbedqError
from tests.bench import report
from tests.bench.arguments import whole
from tests.bench.peers import comparing, flops, models, table, texts
from tests.bench.peers.comparing import Case, Compared
from tests.bench.peers.models import Model
from tests.bench.peers.ours import Ours
from tests.bench.peers.systems import System, all_peers
from tests.bench.running import server

#: Without --texts: as many as take this much work, so that no model takes hours; MiniLM's mixed ones are 1,500.
_FLOPS = 5e12

#: Within these bounds whatever they take.
_MIN_TEXTS, _MAX_TEXTS = 32, 5_000

#: What a quick run takes.
_QUICK_TEXTS = 24


def main(arguments: list[str]) -> int:
    """Measure, print the tables, write the JSON, also of a run that is interrupted; returns the exit code."""
    given = _parser().parse_args(arguments)
    if given.quick:
        given.rounds, given.texts = 1, given.texts or _QUICK_TEXTS
    found: list[Compared] = []
    code = 0
    try:
        found.extend(_measure(given))
    except EmbedqError as error:
        print(f"python -m tests.bench peers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("python -m tests.bench peers: interrupted; what was compared until then is kept", file=sys.stderr)
        code = 130
    if given.json:
        run = {"command": "peers", "arguments": arguments, "cases": [table.rows(compared) for compared in found]}
        report.write(given.json, run, [figure for compared in found for figure in table.figures(compared)])
    return code


def _measure(given: argparse.Namespace) -> Iterator[Compared]:
    """All comparisons, each told as soon as it is done, for a run may take hours."""
    peers = all_peers(given.concurrency, given.folder)
    with server() as url:
        for model_name in given.models:
            for task in given.tasks:
                if task not in models.TASKS[model_name]:
                    continue
                model = models.prepare(model_name, task, given.folder / "models")
                for kind in given.kinds:
                    if texts.SPREADS[kind][-1] > model.max_length:
                        continue
                    case = _case(model, kind, given.texts)
                    comparing.say(comparing.describe(case))
                    are_several = len(given.precision) > 1
                    ours = [Ours(url, each, given.concurrency, are_several) for each in given.precision]
                    yield _compare(case, [*(peers[name] for name in given.peers), *ours], given.rounds)


def _compare(case: Case, systems: list[Any], num_rounds: int) -> Compared:
    for system in systems:
        system.forget()
    taking_part: list[System] = systems
    compared = comparing.compare(case, taking_part, num_rounds)
    table.show(compared)
    return compared


def _case(model: Model, kind: str, num_texts: int | None) -> Case:
    make = texts.to_embed if model.task == "embed" else texts.to_rerank
    if num_texts is None:
        few = make(kind, _MIN_TEXTS, model.directory)
        each = flops.of_sequences(model.config, few.lengths) / few.num_sequences
        num_texts = min(max(round(_FLOPS / each), _MIN_TEXTS), _MAX_TEXTS)
    return Case(model, kind, make(kind, num_texts, model.directory))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench peers", description=__doc__)
    add: Any = parser.add_argument
    peers, names, kinds = list(all_peers(1)), list(models.TASKS), list(texts.SPREADS)
    add("--quick", action="store_true", help="few texts, one round: shows that it works, not how fast")
    add("--models", type=_some_of(names), default=["minilm"], help=f"of {','.join(names)} (minilm), or all")
    add("--tasks", type=_some_of(["embed", "rerank"]), default=["embed"], help="of embed,rerank (embed), or all")
    add("--kinds", type=_some_of(kinds), default=["mixed", "short"], help="of short,mixed,long (mixed,short), or all")
    add("--peers", type=_some_of(peers), default=peers, help=f"of {','.join(peers)} (all), or none")
    add("--precision", type=lambda text: text.split(","), default=["auto"], help="of ours, one or several (auto)")
    add("--texts", type=whole(), metavar="N", help="texts of each kind (as many as take 5 TFLOP, 32 to 5,000)")
    add("--rounds", type=whole(), default=3, metavar="N", help="rounds of which the median is told (%(default)s)")
    add(
        "--concurrency", type=whole(), default=256, metavar="N", help="one-text jobs and requests at once (%(default)s)"
    )
    add("--folder", type=Path, default=models.PEERS, metavar="PATH", help="the peers' environments and models")
    add("--json", type=Path, metavar="FILE", help="write all figures there as well")
    return parser


def _some_of(names: list[str]) -> Any:
    """Names parted by commas, "all" or "none"."""

    def parse(text: str) -> list[str]:
        if text in ("all", "none"):
            return names if text == "all" else []
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(f"must be of {','.join(names)}; given {','.join(unknown)}")
        return chosen

    return parse
