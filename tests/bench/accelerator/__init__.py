"""`python -m tests.bench accelerator`: how fast a device is bare, under the engine, and through the queue, in ten minutes.

Random weights of the shapes of BERT-base, bge-m3 and bge-reranker-v2-m3, in bfloat16. Each model's steps run in
processes of their own with a time limit each; what does not fit the whole run's limit is left out, and told so.

    tokenizing  texts to token ids, by threads: what one process can feed
    forward     the bare pass, without padding and with it, beside the products of matrices in the same process
    engine      the engine in one process: what batching, and the interpreter, leave of the bare pass
    queue       a real server and a real worker; jobs of 256 texts, and of one
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from embedq.core.devices import cpu_devices
from tests.bench import report
from tests.bench.accelerator.asked import MODELS, Asked, directory_of
from tests.bench.report import Figure
from tests.running import Running

#: Steps, and which of them share a process: a model is loaded once for each.
STEPS = ("tokenizing", "forward", "engine", "queue")
_TOGETHER = (("tokenizing", "forward", "engine"), ("queue",))

#: Seconds of the whole run: a slot of ten minutes, less what starting and ending takes.
_LIMIT_S = 560.0

#: Seconds of one process at most, and those under which none is started any more.
_PROCESS_S, _LEAST_S = 150.0, 25.0

#: Seconds in which a process that was told to end has stopped its worker and server.
_END_S = 20.0

#: Between two looks at what a process printed.
_LOOK_S = 0.2


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; 1 if a step failed or had to be left out."""
    given = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="embedq-bench-") as temporary:
        run = _Run(given, given.folder or Path(temporary))
        run.save()
        for model in given.models:
            for steps in _TOGETHER:
                run.measure(model, tuple(step for step in steps if step in given.steps))
    figures = run.figures + _compared(run.figures)
    for model in given.models:
        own = [figure for figure in figures if figure.key.startswith(f"{model}_")]
        if own:
            report.show(f"{model} on {_device_name(given.device)}, {given.precision}", own)
    for line in run.faults:
        print(line, file=sys.stderr)
    if given.json:
        told = {"command": "accelerator", "arguments": arguments, "device": _device_name(given.device)}
        report.write(given.json, told | {"faults": run.faults}, figures)
    return 1 if run.faults else 0


class _Run:
    """Children one after the other, within the time there is."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self._given = given
        self._folder = folder
        self._started_s = time.monotonic()
        self.figures: list[Figure] = []
        #: What failed or was left out, a line each.
        self.faults: list[str] = []

    def save(self) -> None:
        """Write all models at once; nothing else runs yet."""
        missing = [
            model for model in self._given.models if not directory_of(model, self._folder, self._given.quick).is_dir()
        ]
        children = [(model, self._start(model, ("save",))) for model in missing]
        for model, child in children:
            self._finish(child, f"{model}: save", self._left_s())

    def measure(self, model: str, steps: tuple[str, ...]) -> None:
        """Run one process, and take the figures it printed, also if it failed on the way."""
        name = f"{model}: {', '.join(steps)}"
        limit_s = min(self._given.process_s, self._left_s())
        if not steps:
            return
        if limit_s < _LEAST_S or not directory_of(model, self._folder, self._given.quick).is_dir():
            self.faults.append(f"{name}: left out, with {max(self._left_s(), 0):.0f} s left")
            return
        self._say(f"{name}, at most {limit_s:.0f} s")
        self._finish(self._start(model, steps), name, limit_s)

    def _start(self, model: str, steps: tuple[str, ...]) -> Running:
        given = self._given
        directory = str(directory_of(model, self._folder, given.quick))
        asked = Asked(model, directory, steps, given.device, given.precision, given.seconds, given.quick)
        # On a CPU with as many threads as a worker has, which sleep where they have nothing to do.
        environment = cpu_devices(1)[0].environment() if given.device == "cpu" else {}
        return Running([sys.executable, "-m", "tests.bench.accelerator.step", asked.as_json()], environment)

    def _finish(self, child: Running, name: str, limit_s: float) -> None:
        end_s, num_seen = time.monotonic() + limit_s, 0
        while child.process.poll() is None and time.monotonic() < end_s:
            num_seen = self._take(child, num_seen)
            time.sleep(_LOOK_S)
        is_late = child.process.poll() is None
        code = child.stop(_END_S)
        self._take(child, num_seen)
        if is_late:
            self.faults.append(f"{name}: stopped after {limit_s:.0f} s; what it had measured is told")
        elif code:
            last = [line for line in child.lines if not line.startswith("{")][-4:]
            self.faults.append(f"{name}: ended with {code}: " + " | ".join(last))

    def _take(self, child: Running, num_seen: int) -> int:
        lines = list(child.lines)
        for line in lines[num_seen:]:
            if line.startswith('{"key"'):
                figure = Figure(**json.loads(line))
                self.figures.append(figure)
                self._say(f"{figure.key} {report.shown(figure.value)} {figure.unit}")
        return len(lines)

    def _left_s(self) -> float:
        return float(self._given.limit_s - _END_S - (time.monotonic() - self._started_s))

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started_s:5.0f} s] {line}", file=sys.stderr, flush=True)


def _compared(figures: list[Figure]) -> list[Figure]:
    """What the engine, and the queue, leave of the bare pass."""
    rates = {figure.key: figure.value for figure in figures if figure.key.endswith("_tokens_per_s")}
    found = []
    for key, value in rates.items():
        model, step, rest = next(
            ((model, step, key.removeprefix(f"{model}_{step}_")) for model in MODELS for step in ("engine", "queue")
             if key.startswith(f"{model}_{step}_")), ("", "", ""),
        )  # fmt: skip
        bare = rates.get(f"{model}_forward_{rest.split('_')[0]}_packed_tokens_per_s")
        if value and bare:
            kind = rest.removesuffix("_tokens_per_s").replace("_", " ")
            found.append(Figure(f"{key}_of_bare", f"{step}, {kind}: of the bare pass", value / bare, ""))
    return found


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def _names(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cuda:0", help="where to compute (default: %(default)s)")
    add("--precision", default="bfloat16", help="arithmetic of the models (default: %(default)s)")
    add("--models", type=_names(tuple(MODELS)), default=list(MODELS), help="names with commas between (default: all)")
    add("--steps", type=_names(STEPS), default=list(STEPS), help="names with commas between (default: all)")
    add("--seconds", type=float, default=3.0, help="seconds that each rate is counted for (default: %(default)s)")
    add("--limit-s", type=float, default=_LIMIT_S, help="seconds of the whole run (default: %(default)s)")
    add("--process-s", type=float, default=_PROCESS_S, help="seconds of one process (default: %(default)s)")
    add("--folder", type=Path, help="where models are kept for the next run (default: a temporary directory)")
    add("--quick", action="store_true", help="tiny models and texts: shows that it works, not how fast")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser
