"""`python -m embedq.workers`: the operator's commands of `embedq`, under the names they had before.

python -m embedq.workers [start] …                  embedq workers …
python -m embedq.workers devices|status|drain|scale embedq devices|status|drain|scale
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from embedq.core.command_line import run
from embedq.workers import commands

_PROGRAM = "python -m embedq.workers"

_COMMANDS = {
    "start": commands.workers,
    "devices": commands.devices,
    "status": commands.status,
    "drain": commands.drain,
    "scale": commands.scale,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    first, *rest = words = [*(sys.argv[1:] if arguments is None else arguments)] or ["start"]
    if first in _COMMANDS:
        return run(_COMMANDS[first], f"{_PROGRAM} {first}", rest)
    return run(commands.workers, _PROGRAM, words)


if __name__ == "__main__":
    sys.exit(main())
