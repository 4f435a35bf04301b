"""Retries and the worker's signals: a worker of its own whose checkpoint fails on one word.

The weights of MiniLM, with NaN in the vector of that word: the forward pass is the real one, and so
is its failure.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from embedq import tasks
from embedq.core.errors import DeviceFailure, InvalidInput
from tests.events import TIMEOUT_S, Events
from tests.running import Running

#: One token of MiniLM's vocabulary.
BAD_WORD = "zebra"

MODEL = "damaged"


@pytest.fixture(scope="module")
def damaged(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of MiniLM that cannot compute texts with `BAD_WORD`."""
    directory = tmp_path_factory.mktemp(MODEL) / "model"
    shutil.copytree(minilm, directory)
    weights = safetensors.numpy.load_file(directory / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("word_embeddings.weight")]
    row = (directory / "vocab.txt").read_text(encoding="utf-8").splitlines().index(BAD_WORD)
    weights[name] = weights[name].copy()
    weights[name][row] = np.nan
    safetensors.numpy.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def noting(server: str, damaged: Path) -> Iterator[Running]:
    """The worker, whose output tells the signals it sent."""
    environment = {
        "EMBEDQ_REDIS_URL": server,
        "EMBEDQ_MODELS": f"{MODEL}={damaged}",
        "EMBEDQ_DEFAULT_EMBED": "none",
        "EMBEDQ_DEFAULT_RERANK": "none",
        "EMBEDQ_DEVICE": "cpu",
    }
    with Running([sys.executable, "-m", "tests.noting_worker"], environment) as running:
        running.wait_for("action=worker_ready")
        yield running
    tasks.embed.registry.forget(MODEL)


@pytest.fixture(scope="module")
def events(noting: Running) -> Iterator[Events]:
    with Events() as events:
        yield events


def signals(noting: Running, job_id: str, last: str) -> list[str]:
    """The signals of one job in their order, once `last` has been sent."""
    noting.wait_for(f"signal={last} job={job_id} ")
    lines = [line for line in noting.output.splitlines() if f"job={job_id} " in line and line.startswith("signal=")]
    return [line.split()[0].removeprefix("signal=task_") for line in lines]


def test_a_job_that_the_device_failed_on_is_retried_with_back_off_up_to_a_limit(events: Events) -> None:
    neighbours = [tasks.embed.delay([f"a horse {index}"], model=MODEL) for index in range(10)]
    job = tasks.embed.delay([f"a {BAD_WORD}"], model=MODEL)
    with pytest.raises(DeviceFailure, match="NaN"):
        job.get(timeout=TIMEOUT_S)
    assert all(neighbour.get(timeout=TIMEOUT_S).dense.shape == (1, 384) for neighbour in neighbours)
    events.wait_for("failed", job.id)
    num_retries = tasks.embed.max_retries
    assert num_retries >= 1
    types = events.types(job.id)  # a short retry may be received before the try it follows has ended
    assert {kind: types.count(kind) for kind in types} == {
        "received": num_retries + 1,
        "started": num_retries + 1,
        "retried": num_retries,
        "failed": 1,
    }
    assert types[-1] == "failed"
    received = [event for event in events.of(job.id) if event["type"] == "task-received"]
    assert [event["retries"] for event in received] == list(range(num_retries + 1))
    assert all(event["eta"] for event in received[1:]), "a retry did not wait"


def test_a_wrong_call_is_not_retried(events: Events) -> None:
    job = tasks.embed.delay(["x"], model=MODEL, dimensions=385)
    with pytest.raises(InvalidInput):
        job.get(timeout=TIMEOUT_S)
    events.wait_for("failed", job.id)
    assert events.types(job.id) == ["received", "started", "failed"]


def test_the_signals_of_a_job_are_sent_once_and_in_order(noting: Running) -> None:
    good = tasks.embed.delay(["a horse"], model=MODEL)
    bad = tasks.embed.delay(["a horse"], model=MODEL, dimensions=385)
    good.get(timeout=TIMEOUT_S)
    assert signals(noting, good.id, "task_postrun") == ["received", "prerun", "success", "postrun"]
    assert signals(noting, bad.id, "task_postrun") == ["received", "prerun", "failure", "postrun"]
    (line,) = noting.wait_for(f"signal=task_success job={good.id} ")
    assert "sender=tasks.embed kind=Embeddings" in line
    (line,) = noting.wait_for(f"signal=task_failure job={bad.id} ")
    assert "sender=tasks.embed kind=InvalidInput" in line


def test_a_revoked_job_sends_its_signal(noting: Running, events: Events) -> None:
    job = tasks.embed.apply_async((["a horse"],), {"model": MODEL}, countdown=1)
    events.wait_for("received", job.id)
    job.revoke()
    assert signals(noting, job.id, "task_revoked") == ["received", "revoked"]
