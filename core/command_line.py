"""Shared by the commands of embedq: exit codes, errors in one line, examples in the help, missing extras.

Knows click and our errors, no command: those of a pool's operator are in `workers.commands`, those of a producer in
`tasks.commands`, the demo and Flower in `deploy`; `embedq.__main__` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import click

from embedq.core.errors import EmbedqError

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

#: Every exit code of every command. Those of workers and launchers alone stand in `workers/exit_codes.py`.
EXIT_CODES = {
    EXIT_DONE: "done",
    EXIT_FAILED: "not done; the last line says why, and trying again without a change fails again",
    EXIT_USAGE: "the command line is wrong",
    3: "of a worker: its device hung or failed every batch; it may be started again",
    4: "of a worker or launcher: an unexpected error; it may be started again",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C",
    143: "of the demo: ended with SIGTERM",
}

#: For every group, and for each command that is run by itself.
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}

_WORKER = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "pydantic_settings", "rich")

#: Modules that each extra of pyproject.toml installs and that its commands import.
EXTRAS = {
    "worker": (*_WORKER, "prometheus_client"),
    "exporter": ("prometheus_client",),
    "flower": ("flower",),
    "datasets": ("pyarrow", "fsspec", "rich"),
    "demo": (*_WORKER, "prometheus_client", "flower", "pyarrow", "fsspec"),
}

_P = ParamSpec("_P")
_R = TypeVar("_R")


class MissingExtra(click.ClickException):
    """The command needs packages that only an extra installs."""

    exit_code = EXIT_FAILED

    def __init__(self, extra: str, absent: Sequence[str]) -> None:
        path = click.get_current_context().command_path
        super().__init__(
            f"{path} needs the extra '{extra}': pip install \"embedq[{extra}]\" (no module {', '.join(absent)})"
        )

    def show(self, file: object = None) -> None:
        """Print the message alone: it starts with the command."""
        click.echo(self.message, err=True)


def needs(extra: str, *modules: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a command that needs an extra: without it, it ends with one line that names the extra.

    `modules` are those it imports, by default all of the extra. It must import them inside itself, so that its help
    shows everywhere.
    """

    def decorated(command: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(command)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if absent := [name for name in modules or EXTRAS[extra] if find_spec(name) is None]:
                raise MissingExtra(extra, absent)
            return command(*args, **kwargs)

        return checked

    return decorated


def examples(*lines: str) -> str:
    """The end of a command's help: command lines to copy, one per line."""
    return _block("Examples:", lines)


def exit_codes() -> str:
    """The end of the help: a line for each exit code."""
    return _block("Exit codes:", [f"{code:<4} {meaning}" for code, meaning in EXIT_CODES.items()])


def _block(title: str, lines: Sequence[str]) -> str:
    """A paragraph that click does not wrap (`\\b` on a line of its own says so)."""
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])


def run(command: click.Command | str, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own; returns the exit code.

    A command may be named, "embedq.workers.commands:status": what its module raises when it is imported, such as a wrong
    setting, is told like all else. Our own errors, those of the operating system and Ctrl-C become one line on standard error.
    """
    try:
        code = _imported(command).main(arguments, program, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):  # the second while a module is imported
        click.echo(f"{program}: interrupted", err=True)
        return EXIT_INTERRUPTED
    except (EmbedqError, OSError) as error:
        click.echo(f"{program}: {error}", err=True)
        return EXIT_FAILED
    return code if isinstance(code, int) else EXIT_DONE


def _imported(command: click.Command | str) -> click.Command:
    if isinstance(command, click.Command):
        return command
    module, _, name = command.partition(":")
    found: click.Command = getattr(import_module(module), name)
    return found
