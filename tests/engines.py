"""Engines over fake models, and texts for them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from embedq.core.engine import Engine
from embedq.core.settings import Settings, read_settings
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.loops import num_waiting

#: Lengths so near that one batch is the best for all of them.
NEAR = (30, 32)


@contextmanager
def running(*models: FakeModel, **chosen: Any) -> Iterator[Engine]:
    """An engine over `models`, closed at the end with every gate open."""
    served = {model.spec.alias: model for model in models}
    with Engine(served, settings(models, **chosen)) as engine, ExitStack() as gates:
        for model in models:
            gates.callback(model.gate.set)
        yield engine


def settings(models: tuple[FakeModel, ...], **chosen: Any) -> Settings:
    # A pass that a test holds at its gate must not pass for a slow device, which would get smaller batches.
    # One stream: a pass held at its gate is to hold everything behind it.
    given = {"max_batch_s": 1e6, "cpu_streams": 1, **chosen}
    return read_settings(models={model.spec.alias: "/nowhere" for model in models}, **given)


@contextmanager
def busy(engine: Engine, model: FakeModel) -> Iterator[None]:
    """The device is inside a pass; all that comes waits."""
    model.gate.clear()
    blocker = engine.submit(lambda: engine.calls.embed(["blocker"]))
    assert model.begun.acquire(timeout=PATIENCE_S)
    yield
    model.gate.set()
    blocker.answer.result(PATIENCE_S)


def left_over(engine: Engine) -> tuple[int, ...]:
    """What must be nothing once all jobs are over: bytes and tokens of each class, sequences, texts in flight."""
    encoding, backlog = engine.encoding, engine.backlog
    by_class = [encoding.num_bytes(is_bulk) + backlog.num_tokens(is_bulk) for is_bulk in (False, True)]
    return *by_class, num_waiting(backlog), len(backlog._in_flight)


def texts_of(seed: int, count: int, lengths: tuple[int, int] = (1, 60)) -> list[str]:
    """Texts of as many characters, nearly all different."""
    random_ = random.Random(seed)
    return ["".join(random_.choices("abcdefghij", k=random_.randint(*lengths))) for _ in range(count)]
