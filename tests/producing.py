"""A producer in a process of its own, with settings of its own, that does what a test says.

    with Producing({"EMBEDQ_REDIS_URL": url}) as producer:
        producer.do("tasks.embed.delay(['a text']).get(timeout=30).dense.shape")  # (1, 384)

`python -m tests.producing` is that process: it reads one expression a line and answers with its value.
"""

from __future__ import annotations

import ast
import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import celery

from embedq import tasks
from embedq.workers.processes import spawn, stop
from tests.running import ROOT


class Failed(Exception):
    """What an expression raised: `name` of the class and its message."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class Producing:
    """The process; a context manager that ends it."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.producing"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = spawn(command, {"PYTHONPATH": str(ROOT)} | environment, cwd=ROOT, **pipes)

    def __enter__(self) -> Producing:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        stop(self._process, timeout_s=5)
        self._process.stdout.close()

    def do(self, expression: str) -> Any:
        """The value of `expression` there, where it is plain; else its repr. Failed if it raises."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(expression).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise Failed(answer["error"], answer["message"])
        try:
            return ast.literal_eval(answer["value"])
        except (SyntaxError, ValueError):
            return answer["value"]


def main() -> None:
    """Answer until the input ends. `jobs` keeps what later expressions look at."""
    names = {"tasks": tasks, "app": tasks.app, "celery": celery, "asyncio": asyncio, "time": time, "jobs": {}}
    for line in sys.stdin:
        try:
            answer = {"value": repr(eval(json.loads(line), names))}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
