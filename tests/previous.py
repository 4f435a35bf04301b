"""The previous release: its sources from the history, and its processes beside ours."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.running import ROOT, Running

#: The last commit of 0.1.0.
COMMIT = "27d99f57583e4d4276ae9ef3c194bb4dda57d067"


def unpack(directory: Path) -> bool:
    """Write the sources of the previous release into `directory`; False where this checkout has no history of it."""
    archive = subprocess.run(["git", "archive", COMMIT], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        return False
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as sources:
        sources.extractall(directory, filter="data")
    return True


def start_workers(sources: Path, url: str, notes: Path, num_workers: int = 1, **settings: str) -> Running:
    """Workers of the previous release over a model that costs nothing, kept running."""
    notes.mkdir(exist_ok=True)
    environment = {
        "EMBEDQ_REDIS_URL": url,
        "EMBEDQ_CONFIG": "",
        "CHAOS_NOTES": str(notes),
        "EMBEDQ_MODELS": f"light={notes}",  # any directory: nothing is loaded from it
        "PYTHONPATH": str(sources),
    }
    command = [sys.executable, "-m", "tests.chaos.light_worker", str(num_workers)]
    return Running(command, environment | settings, sources)


def produce(sources: Path, url: str, expression: str, timeout_s: float) -> str:
    """What a producer of the previous release prints: the expression's value, or the module and name of an error."""
    program = (
        f"import tasks\ntry: print({expression})\n"
        "except Exception as error: print(type(error).__module__, type(error).__name__)"
    )
    environment = {"EMBEDQ_REDIS_URL": url, "EMBEDQ_CONFIG": "", "PYTHONPATH": str(sources)}
    with Running([sys.executable, "-c", program], environment, sources) as running:
        assert running.wait(timeout_s) == 0
    return running.lines[-1]
