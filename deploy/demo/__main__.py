"""`embedq demo`, also `python -m embedq.deploy.demo`: everything once, on real texts, on this machine.

Starts a server, the workers and Flower, embeds docstrings of the standard library through the
queue, ranks the best of them for some questions, embeds them once more as a dataset during which a
worker is killed, and ends all it has started. Keeps its data and
logs in `.demo/` below the working directory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from embedq.core.command_line import CONTEXT, examples, needs, run
from embedq.deploy.demo import minilm
from embedq.deploy.demo import texts as demo_texts
from embedq.deploy.demo.running import Running

#: Texts embedded unless asked otherwise: about a minute on two cores.
_NUM_TEXTS = 5_000


@click.command(context_settings=CONTEXT, epilog=examples("embedq demo", "embedq demo --texts 500 --keep"))
@click.option("--keep", is_flag=True, help="Leave everything running until Ctrl-C.")
@click.option("--texts", type=click.IntRange(min=1), default=_NUM_TEXTS, show_default=True, help="How many to embed.")
@needs("demo")
def demo(keep: bool, texts: int) -> int:
    """Run everything once, on real texts.

    Starts a server, the workers and Flower, embeds docstrings of Python's standard library through the queue, ranks the
    best of them for some questions, and ends all it has started. Its data and logs are in .demo below this directory.
    """
    running = Running()
    with running:
        _run(texts, keep, running)
    return running.exit_code


def _run(num_texts: int, keep: bool, running: Running) -> None:
    directory = _prepare()
    # Only now: `tasks`, which the steps use, reads the environment when it is imported.
    from rich.console import Console

    from embedq.deploy.demo import steps
    from embedq.deploy.demo.dataset_step import dataset

    console = Console()
    url = steps.start_server(running, console)
    child = steps.start_workers(running, directory, url)
    address = steps.start_flower(running, directory, url, console)
    found = demo_texts.read(num_texts)
    pool = steps.wait_for_workers(child, console)
    vectors, job_id = steps.embed(found, pool, running, console)
    for query in steps.QUERIES:
        steps.rerank(query, found, vectors, pool, console)
    dataset(found, pool, directory, console)
    steps.report(job_id, url, address if keep else None, console)
    if keep:
        steps.stay(pool, console)


def _prepare() -> Path:
    """Make the demo's directory and set what this process, the workers and Flower read."""
    directory = Path.cwd() / ".demo"
    directory.mkdir(mode=0o700, exist_ok=True)
    os.environ.update(minilm.environment())
    os.environ["EMBEDQ_DATA_DIR"] = str(directory / "server")
    os.environ["EMBEDQ_DATA_ROOTS"] = str(directory)
    os.environ.setdefault("EMBEDQ_LEASE_S", "6")  # a worker is killed on the way, and whoever watches shall not wait
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(demo, "python -m embedq.deploy.demo", arguments)


if __name__ == "__main__":
    sys.exit(main())
