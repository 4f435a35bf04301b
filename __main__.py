"""`embedq` and `python -m embedq`: every command, each imported when it is used.

    workers status drain scale devices convert        workers/commands.py
    check                                             core/check.py
    models forget embed rerank cancel dead exporter   tasks/commands.py
    dataset                                           tasks/datasets/commands.py
    flower                                            deploy/flower/__main__.py
    demo                                              deploy/demo/__main__.py

Importing this loads click and nothing else of weight: help and completion must be quick, and must show what a command
is for where its extra is not installed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from embedq import __version__
from embedq.core.command_line import CONTEXT, examples, exit_codes, run

_WORKERS, _TASKS = "embedq.workers.commands", "embedq.tasks.commands"

#: By the titles of the help: each command, the module that holds it under its own name, and its help in short.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Run a pool": {
        "workers": (_WORKERS, "Start workers on this machine, and watch them."),
        "status": (_WORKERS, "Show every worker that answers."),
        "drain": (_WORKERS, "Let a worker finish its jobs and end."),
        "scale": (_WORKERS, "Set the number of a launcher's workers."),
        "devices": (_WORKERS, "List the devices of this machine."),
        "dead": (_TASKS, "List, show, send again or drop dead letters."),
        "exporter": (_TASKS, "Serve metrics of the queues to Prometheus."),
        "flower": ("embedq.deploy.flower.__main__", "Show jobs and workers in a browser."),
    },
    "Use a pool": {
        "models": (_TASKS, "List the models that workers serve."),
        "forget": (_TASKS, "Withdraw a model that no worker will serve again."),
        "embed": (_TASKS, "Embed a file of texts into a .npy file, or files of rows into a folder."),
        "rerank": (_TASKS, "Rank a file of passages for a query."),
        "cancel": (_TASKS, "Cancel jobs that wait or run."),
        "dataset": ("embedq.tasks.datasets.commands", "Embed or rerank the rows of files, millions of them."),
    },
    "Begin": {
        "demo": ("embedq.deploy.demo.__main__", "Run everything once, on real texts."),
        "check": ("embedq.core.check", "Say how a model would be run, and why not."),
        "convert": (_WORKERS, "Convert a pickled checkpoint to safetensors."),
    },
}

_SHELLS = ("bash", "zsh", "fish")


class LazyGroup(click.Group):
    """A group that knows its commands' names and help by a table, and imports a command once it is used."""

    def __init__(self, *args: Any, table: Mapping[str, Mapping[str, tuple[str, str]]] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sections = table or {}
        self._table = {name: place for section in self._sections.values() for name, place in section.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help."""
        return [*self._table, *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None if there is none of this name."""
        if cmd_name not in self._table:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(import_module(self._table[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table, a section for each of its titles, without importing a command."""
        sections = {title: {name: text for name, (_, text) in rows.items()} for title, rows in self._sections.items()}
        last = next(reversed(sections))
        sections[last] |= {name: command.get_short_help_str() for name, command in self.commands.items()}
        width = max(map(len, self.list_commands(ctx)))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{width}}", text) for name, text in rows.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name from the table."""
        helps = {name: text for name, (_, text) in self._table.items()}
        helps |= {name: command.get_short_help_str() for name, command in self.commands.items()}
        found = [CompletionItem(name, help=text) for name, text in helps.items() if name.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(
    "embedq",
    cls=LazyGroup,
    table=COMMANDS,
    context_settings=CONTEXT,
    epilog="\n\n".join(
        (
            examples(
                "embedq workers --model minilm=/srv/models/minilm",
                "embedq embed texts.txt vectors.npy",
                "embedq status",
            ),
            exit_codes(),
        )
    ),
)
@click.version_option(__version__, message="embedq %(version)s")
def embedq() -> None:
    """Embedding and reranking through a durable queue.

    The server is the one of EMBEDQ_REDIS_URL, else the one that `embedq workers` started for this user. Every command
    has help of its own: embedq COMMAND --help.
    """


@embedq.command(
    short_help="Print the script for a shell's completion.",
    epilog=examples(
        'eval "$(embedq completion bash)"                                 # in ~/.bashrc',
        'eval "$(embedq completion zsh)"                                  # in ~/.zshrc',
        "embedq completion fish > ~/.config/fish/completions/embedq.fish",
    ),
)
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands and options in a shell."""
    kind = get_completion_class(shell)
    assert kind
    click.echo(kind(embedq, {}, "embedq", "_EMBEDQ_COMPLETE").source())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run(embedq, "embedq", arguments)


if __name__ == "__main__":
    sys.exit(main())
