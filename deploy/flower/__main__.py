"""`embedq flower`, also `python -m embedq.deploy.flower`: Flower with embedq's settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from embedq.core.command_line import CONTEXT, examples, needs, run
from embedq.deploy.flower import command


@click.command(
    context_settings=CONTEXT | {"ignore_unknown_options": True},
    epilog=examples(
        "embedq flower", "embedq flower --port 8888", "FLOWER_BASIC_AUTH=user:password embedq flower --address=0.0.0.0"
    ),
)
@click.option("--port", type=int, default=5555, show_default=True, help="Port to listen at; 0 takes a free one.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="[FLOWER OPTIONS]...")
@needs("flower")
def flower(port: int, address: str, more: tuple[str, ...]) -> None:
    """Show jobs and workers in a browser.

    Runs Flower with embedq's settings (deploy/flower/flowerconfig.py). It asks for the user and password of
    FLOWER_BASIC_AUTH; where that is not set it makes one up and prints it; "none" asks for nothing. Options of Flower's
    own may follow.
    """
    from embedq import celeryconfig

    celeryconfig.redis_url()  # a wrong setting is said here in one line; Celery would print a traceback around it
    words = command(port, f"--address={address}", *more)
    sys.stdout.flush()
    os.execv(words[0], words)  # in our place, so that signals reach Flower


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(flower, "python -m embedq.deploy.flower", arguments)


if __name__ == "__main__":
    sys.exit(main())
