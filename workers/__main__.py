"""`python -m embedq.workers`: the operator's commands of `embedq`, under the names they had before.

python -m embedq.workers [start] …                  embedq workers …
python -m embedq.workers devices|status|drain|scale embedq devices|status|drain|scale
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from embedq.core.command_line import run

_PROGRAM = "python -m embedq.workers"

#: The command that runs where none is named, and all by their names here. Imported once it is used: see `run`.
START = "embedq.workers.commands:workers"
COMMANDS = {
    "start": START,
    "devices": "embedq.workers.commands:devices",
    "status": "embedq.workers.commands:status",
    "drain": "embedq.workers.commands:drain",
    "scale": "embedq.workers.commands:scale",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    first, *rest = words = [*(sys.argv[1:] if arguments is None else arguments)] or ["start"]
    if first in COMMANDS:
        return run(COMMANDS[first], f"{_PROGRAM} {first}", rest)
    return run(START, _PROGRAM, words)


if __name__ == "__main__":
    sys.exit(main())
