"""`python -m embedq.deploy.demo`: everything once, on real texts, on this machine.

Starts a server, the workers and Flower, embeds docstrings of the standard library through the
queue, ranks the best of them for some questions, and ends all it has started. Keeps its data and
logs in `.demo/` below the working directory.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from embedq.core.errors import EmbedqError
from embedq.deploy.demo import minilm, texts
from embedq.deploy.demo.running import Running

#: Texts embedded unless asked otherwise: about a minute on two cores.
_NUM_TEXTS = 5_000


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    running = Running()
    try:
        with running:
            _run(asked, running)
    except (EmbedqError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return running.exit_code


def _run(asked: argparse.Namespace, running: Running) -> None:
    directory = _prepare()
    # Only now: `tasks`, which the steps use, reads the environment when it is imported.
    from rich.console import Console

    from embedq.deploy.demo import steps

    console = Console()
    url = steps.start_server(running, console)
    child = steps.start_workers(running, directory, url)
    address = steps.start_flower(running, directory, url, console)
    found = texts.read(asked.texts)
    pool = steps.wait_for_workers(child, console)
    vectors, job_id = steps.embed(found, pool, running, console)
    for query in steps.QUERIES:
        steps.rerank(query, found, vectors, pool, console)
    steps.report(job_id, url, address, console)
    if asked.keep:
        steps.stay(pool, console)


def _prepare() -> Path:
    """Make the demo's directory and set what this process, the workers and Flower read."""
    directory = Path.cwd() / ".demo"
    directory.mkdir(mode=0o700, exist_ok=True)
    os.environ.update(minilm.environment())
    os.environ["EMBEDQ_DATA_DIR"] = str(directory / "server")
    return directory


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m embedq.deploy.demo", description="Embed and rerank real texts through a queue on this machine."
    )
    parser.add_argument("--keep", action="store_true", help="leave everything running until Ctrl-C")
    parser.add_argument(
        "--texts", type=_positive, default=_NUM_TEXTS, metavar="N", help="embed N texts (default: %(default)s)"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1; given {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
