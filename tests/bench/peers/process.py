"""A program in another environment that answers one request per line."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from embedq.workers.processes import stop
from tests.bench import usage

PROGRAMS = Path(__file__).parent / "programs"

#: One answer: a large model's export, or a round of its longest texts in float32.
_TIMEOUT_S = 3_600.0

#: Nothing is looked up on a network, nothing reported to one, nothing said that is not an error.
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "INFINITY_ANONYMOUS_USAGE_STATS": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "PYTHONWARNINGS": "ignore",
}

#: Ours would limit a peer's threads, or lead it to our modules.
_DROPPED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH", "PYTHONHOME")


class CannotMeasure(Exception):
    """A peer that is not there, does not have what is asked, or failed; says why in one line."""


class Program:
    """One running program; a context manager that ends it."""

    def __init__(self, python: Path, name: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _DROPPED} | _QUIET
        self._log = tempfile.TemporaryFile(prefix="embedq-bench-")  # noqa: SIM115 - closed with the program
        self._process = subprocess.Popen(
            [str(python), str(PROGRAMS / f"{name}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            cwd=tempfile.gettempdir(),
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer. CannotMeasure if it has none."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise CannotMeasure(self._last_words()) from None
        answer = dict(json.loads(self._read_line()))
        if "error" in answer:
            raise CannotMeasure(answer["error"].splitlines()[0][:300])
        return answer

    @property
    def peak_bytes(self) -> int:
        """The most memory it ever had in use, with what it has started."""
        return usage.peak_bytes(self._process.pid)

    def close(self) -> None:
        """End it: it ends with its input, and what it has started with it."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.close()
            self._process.wait(30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            stop(self._process, 10)
        self._process.stdout.close()
        self._log.close()

    def _read_line(self) -> bytes:
        assert self._process.stdout
        line = b""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not line.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                raise CannotMeasure(f"no answer within {_TIMEOUT_S:.0f} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise CannotMeasure(self._last_words())
            line += part
        return line

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"it ended: {lines[-1].strip()[:300] if lines else 'without a word'}"
