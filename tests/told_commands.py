"""Commands as people are told them, held against the commands there are: `embedq …` in texts and in the help itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import click

from embedq.__main__ import embedq

#: A code span that is a command line, variables before it or not.
_SPAN = re.compile(r"`(?:[A-Z_]+=\S+ )*embedq(?: ([^`]+))?`")

#: A line of a code block.
_LINE = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:\S+/)?embedq ([^#\n|>]*)", re.MULTILINE)

#: What a unit starts.
_STARTED = re.compile(r"^ExecStart=\S+/embedq (.*)", re.MULTILINE)

#: The list form of YAML and of a Dockerfile.
_LISTED = re.compile(r"(?:command: |CMD )\[\"?embedq\"?, ?([^\]]*)\]")

_BLOCK = re.compile(r"```\w*\n(.*?)```", re.DOTALL)


def told(text: str) -> Iterator[list[str]]:
    """The words behind `embedq` of each command line in a text; of prose only what is marked as code."""
    lines = [*_SPAN.findall(_BLOCK.sub("", text)), *_STARTED.findall(text)]
    lines += [line for block in _BLOCK.findall(text) for line in _LINE.findall(block)]
    yield from (line.split() for line in lines)
    yield from ([word.strip(" \"'") for word in listed.split(",")] for listed in _LISTED.findall(text))


def misfit(words: Sequence[str], command: click.Command = embedq) -> str:
    """The first word that is no command or no option where it stands; "" if all fit."""
    context = click.Context(command)
    for word in words:
        if word == "…" or (isinstance(command, click.Group) and word.isupper()):
            continue
        if word.startswith("-"):
            if word.partition("=")[0] not in options(command):
                return word
        elif isinstance(command, click.Group):
            found = [command.get_command(context, name) for name in word.split("|")]
            if None in found:
                return word
            command = found[-1] or command
    return ""


def options(command: click.Command) -> set[str]:
    """Every option of a command, as it is written."""
    return {
        name for option in command.get_params(click.Context(command)) for name in (*option.opts, *option.secondary_opts)
    }
