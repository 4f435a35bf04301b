"""The producer's interface: the names that application code imports.

    from embedq import tasks

    vectors = tasks.embed.delay(["a text", "another"]).get(timeout=30)       # Embeddings, (2, dim)
    ranking = tasks.rerank.delay("a question", ["a text", "another"]).get()  # Ranking
    jobs = tasks.embed_many([["a text"], ["another"]])                       # many jobs, few round trips
    vectors = await tasks.aget(jobs[0], timeout=30)                          # in asyncio
    tasks.estimate(1_000), tasks.eta(jobs[0])                                # seconds until they are done
    tasks.cancel(jobs)                                                       # nobody wants them any more
    tasks.connect(app)                                 # chains, groups and chords with tasks of your own application

Arguments are checked here, at the call, and never reach the queue if they are wrong. Loads no
torch, transformers or tokenizers: a producer needs celery, redis, msgpack and numpy.

No module in this package may be named after a task or `app`: importing it would replace the task.
"""

from __future__ import annotations

import sys

from embedq.core.results import Embeddings, Ranking
from embedq.tasks import datasets
from embedq.tasks.application import app, config, key_prefix
from embedq.tasks.calls import (
    acancel,
    aestimate,
    aeta,
    aget,
    cancel,
    embed,
    embed_many,
    estimate,
    eta,
    rerank,
    rerank_many,
)
from embedq.tasks.connect import connect
from embedq.tasks.engine_task import EngineTask, ready_answer
from embedq.tasks.maps import MapTask

__all__ = [
    "Embeddings",
    "EngineTask",
    "MapTask",
    "Ranking",
    "acancel",
    "aestimate",
    "aeta",
    "aget",
    "app",
    "cancel",
    "config",
    "connect",
    "datasets",
    "embed",
    "embed_many",
    "estimate",
    "eta",
    "key_prefix",
    "ready_answer",
    "rerank",
    "rerank_many",
]

if __name__ == "tasks":  # `import tasks` in the checkout's root: the same module, not a second copy of its state
    sys.modules[__name__] = sys.modules["embedq.tasks"]
