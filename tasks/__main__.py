"""`python -m embedq.tasks`: the producer's commands of `embedq`, under the name they had before."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from embedq.core.command_line import CONTEXT, run
from embedq.tasks import commands


@click.group(context_settings=CONTEXT)
def producer() -> None:
    """Send jobs and look at what the pool serves. The same commands as `embedq`'s."""


for _command in (
    commands.models,
    commands.forget,
    commands.embed,
    commands.rerank,
    commands.cancel,
    commands.dead,
    commands.exporter,
):
    producer.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(producer, "python -m embedq.tasks", arguments)


if __name__ == "__main__":
    sys.exit(main())
