"""Infinity's HTTP server, and a client that keeps a number of requests under way on open connections.

The client writes and reads HTTP by itself: a general one would take more of the cores that the server needs.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from answering import serve

#: Seconds until it must answer; it computes some batches first.
_START_TIMEOUT_S = 300.0

#: Seconds it may take to end.
_END_TIMEOUT_S = 20.0

#: Each answer whole in memory: 256 vectors of 1,024 numbers are 1.4 MB.
_MAX_LINE_BYTES = 1 << 26


class Infinity:
    """`engine` is "torch" or "optimum"; `per_request` texts or passages travel in one request."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile(prefix="embedq-bench-")  # noqa: SIM115 - as long as this process

    def load(
        self, model: str, task: str, engine: str, precision: str, batch_size: int, pooling: str, **_: Any
    ) -> dict[str, Any]:
        self.close()
        directory = _exported(model) if engine == "optimum" else model
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        command = [str(Path(sys.executable).with_name("infinity_emb")), "v2", "--model-id", "."]
        command += ["--engine", engine, "--device", "cpu", "--dtype", precision, "--batch-size", str(batch_size)]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--log-level", "warning"]
        command += ["--pooling-method", pooling]
        # What it offers beside: the one is broken with current transformers, the other made for accelerators.
        command += ["--no-bettertransformer", "--no-compile"]
        self._log.truncate(0)
        self._log.seek(0)
        # From within the directory: of a longer name its ONNX engine makes a path that it does not find.
        self._server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, cwd=directory
        )
        self._wait()
        return {"version": version("infinity_emb"), "precision": precision, "engine": engine}

    def embed(self, texts: list[str], per_request: int, concurrency: int, **_: Any) -> np.ndarray:
        bodies = [
            {"model": "default/not-specified", "encoding_format": "base64", "input": texts[at : at + per_request]}
            for at in range(0, len(texts), per_request)
        ]
        answers = asyncio.run(_all(self._port, "/embeddings", bodies, concurrency))
        rows = [base64.b64decode(one["embedding"]) for answer in answers for one in answer["data"]]
        return np.frombuffer(b"".join(rows), np.float32).reshape(len(texts), -1)

    def rerank(self, calls: list[tuple[str, list[str]]], per_request: int, concurrency: int, **_: Any) -> np.ndarray:
        bodies = [
            {"query": query, "documents": passages[at : at + per_request], "raw_scores": True}
            for query, passages in calls
            for at in range(0, len(passages), per_request)
        ]
        scores = []
        for answer in asyncio.run(_all(self._port, "/rerank", bodies, concurrency)):
            found = sorted(answer["results"], key=lambda one: int(one["index"]))
            scores += [one["relevance_score"] for one in found]
        return np.array(scores)

    def close(self) -> None:
        """End the server; also called when standard input has ended."""
        if self._server is None:
            return
        self._server.terminate()
        try:
            self._server.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server = None

    def _wait(self) -> None:
        assert self._server
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._server.poll() is not None:
                raise RuntimeError(f"the server ended: {self._reason()}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(f"the server did not answer within {_START_TIMEOUT_S:.0f} s")

    def _reason(self) -> str:
        """The last line of its log that names an error."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no word")[:300]


def _exported(model: str) -> str:
    """A directory that this server can open: it makes no export of its own, and finds one beside the tokenizer only."""
    exported = Path(f"{model}.onnx")
    if not exported.is_dir():
        raise FileNotFoundError('no ONNX file; the peer "onnx" makes one')
    flat = tempfile.mkdtemp(prefix="embedq-bench-")
    atexit.register(shutil.rmtree, flat, ignore_errors=True)
    for file in [*exported.iterdir(), *(exported / "onnx").iterdir()]:
        if file.is_file() and "qint8" not in file.name:
            (Path(flat) / file.name).symlink_to(file)
    return flat


async def _all(port: int, path: str, bodies: list[dict[str, Any]], concurrency: int) -> list[Any]:
    """Answers in the order of the bodies; `concurrency` connections, each with one request at a time."""
    waiting = iter(enumerate(bodies))
    answers: list[Any] = [None] * len(bodies)

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_MAX_LINE_BYTES)
        for number, body in waiting:
            answers[number] = await _one(reader, writer, path, json.dumps(body).encode())
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(connection() for _ in range(min(concurrency, len(bodies)))))
    return answers


async def _one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes) -> Any:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in headers if line)
    answer = await reader.readexactly(int(fields["content-length"]))
    if " 200 " not in status:
        raise RuntimeError(f"the server answered {status}: {answer[:300]!r}")
    return json.loads(answer)


if __name__ == "__main__":
    infinity = Infinity()
    try:
        serve(infinity)
    finally:
        infinity.close()
