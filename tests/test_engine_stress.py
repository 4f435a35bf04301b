"""Many callers at once, at random: every row right, nothing left behind. Over fake models."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedq.core.engine import Engine
from tests.checkpoints import PATIENCE_S, FakeModel, expected_rows
from tests.engines import left_over, running, texts_of

NUM_THREADS = 32
NUM_AWAITED = 100

#: So small that batches, waiting room and slices all matter.
LIMITS = {"max_batch_tokens": 300, "max_waiting_tokens": 2000, "encode_threads": 3}

#: What all callers take their texts from, so that they often ask for the same.
WORDS = texts_of(0, 50)


def texts_from(random_: random.Random) -> list[str]:
    return random_.choices(WORDS, k=random_.choice([1, 2, 7, 40, 300]))


def call(engine: Engine, seed: int) -> int:
    """A dozen jobs, one after the other; returns how many were cancelled."""
    random_ = random.Random(seed)
    num_cancelled = 0
    for _ in range(12):
        texts, priority, kind = texts_from(random_), random_.randint(0, 9), random_.choice(["drop", "rerank", "embed"])
        if kind == "drop":
            job = engine.submit(lambda texts=texts: engine.calls.embed(texts), priority, 10)  # type: ignore[misc]
            num_cancelled += job.answer.cancel()
        elif kind == "rerank":
            assert engine.rerank("q", texts, priority=priority).scores.shape == (len(texts),)
        else:
            np.testing.assert_array_equal(engine.embed(texts, priority=priority).dense, expected_rows(texts))
    return num_cancelled


async def call_from_loop(engine: Engine, seed: int) -> int:
    """One awaited job; returns 1 if the wait was cancelled."""
    random_ = random.Random(seed)
    texts = texts_from(random_)
    asked = asyncio.ensure_future(engine.aembed(texts, priority=random_.randint(0, 9)))
    if random_.random() < 0.4:
        for _ in range(random_.randint(0, 20)):
            await asyncio.sleep(0)  # the others' turn
        asked.cancel()
    (answer,) = await asyncio.gather(asked, return_exceptions=True)
    if isinstance(answer, asyncio.CancelledError):
        return 1
    np.testing.assert_array_equal(np.asarray(answer), expected_rows(texts))
    return 0


async def call_all_from_loop(engine: Engine, seed: int) -> int:
    return sum(await asyncio.gather(*(call_from_loop(engine, seed + one) for one in range(NUM_AWAITED))))


@pytest.mark.parametrize(("device", "num_streams"), [("cpu", 1), ("cpu", 3), ("cuda:0", 1)])
@pytest.mark.parametrize("seed", range(2))
def test_threads_and_an_event_loop_with_random_jobs_and_cancels(seed: int, device: str, num_streams: int) -> None:
    models = FakeModel("embedder"), FakeModel("reranker", "cross_encoder")
    for model in models:
        model.device = device
    with running(*models, cpu_streams=num_streams, **LIMITS) as engine, ThreadPoolExecutor(NUM_THREADS + 1) as callers:
        in_loop = callers.submit(asyncio.run, call_all_from_loop(engine, 10_000 * (seed + 1)))
        called = [callers.submit(call, engine, 1000 * seed + one) for one in range(NUM_THREADS)]
        assert sum(one.result(PATIENCE_S) for one in called) > 20
        assert in_loop.result(PATIENCE_S) > 5
        engine.embed(["the last"])
        assert left_over(engine) == (0, 0, 0, 0)
        assert engine.is_alive
