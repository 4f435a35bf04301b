"""The command that starts Flower with embedq's settings; `embedq flower` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

#: Its settings, each with its reason.
CONFIG = Path(__file__).parent / "flowerconfig.py"

#: Stands in the line that Flower writes once it listens, before its address.
READY = "Visit me at "

#: Told to stop while it starts its threads, Flower 2.2 can wait for one of them for ever. It has
#: nothing to save, so it may be killed; otherwise it ends within its inspection timeout of 1 s.
STOP_TIMEOUT_S = 5.0


#: Environment of a Flower that asks for no password: on loopback, for a demo or a test.
OPEN = {"FLOWER_BASIC_AUTH": "none"}


def command(port: int, *options: str) -> list[str]:
    """The command that runs Flower on loopback; port 0 takes a free one, which it then names in its log."""
    started = [sys.executable, "-m", "celery", "-A", "embedq.tasks", "flower", f"--conf={CONFIG}"]
    return [*started, f"--port={port}", *options]
