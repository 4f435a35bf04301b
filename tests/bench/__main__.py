"""`python -m tests.bench <command>`: measurements against real servers and real worker processes.

    engine    batching across jobs: throughput, latency under a load, what a job costs beside its forward pass
    start     from the start of a worker's process to its first answer; with --against another checkout, in turns
    peers     the whole path against sentence-transformers, ONNX Runtime, OpenVINO, FlagEmbedding, Infinity
    accelerator   one accelerator bare, under the engine and through the queue, in ten minutes
    host      texts per second that Python, tokenizing and copies leave to any device
    jobs      jobs per second of a worker whose model costs nothing, and of producers, against stock Celery
    growth    memory of a worker, a producer and the server over many jobs
    idle      memory of a worker that is warm, at most, and idle after its largest jobs
    linear    a thousand texts to a million: the same cost each, the same memory
    metrics   what counting costs each job, each batch and each scrape
    flower    memory of Flower over many jobs
    scale     a thousand workers simulated; with --measure what a job costs the server
    fairness  what bulk gets, and interactive jobs pay for it, when the encode threads are overloaded
    estimates how far estimates of when a job is done are from what comes
    datasets  a dataset through a worker against its engine alone; memory; millions of rows planned
    quality   what bfloat16 and int8 cost in search, against float32

`python -m tests.bench <command> --help` tells a command's options.
"""

from __future__ import annotations

import importlib
import os
import sys

#: Commands, each the module of that name here, with a `main(arguments) -> exit code`.
COMMANDS = [
    "engine",
    "start",
    "peers",
    "accelerator",
    "host",
    "quality",
    "jobs",
    "growth",
    "idle",
    "linear",
    "metrics",
    "flower",
    "scale",
    "fairness",
    "estimates",
    "datasets",
]


def main(arguments: list[str]) -> int:
    """Run the command named first; returns its exit code."""
    if not arguments or arguments[0] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    # Before anything of ours is imported: somebody's own settings must not change what is measured.
    for name in [name for name in os.environ if name.startswith("EMBEDQ_")] + ["REDIS_URL"]:
        os.environ.pop(name, None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["EMBEDQ_CONFIG"] = ""
    return int(importlib.import_module(f"tests.bench.{arguments[0]}").main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
