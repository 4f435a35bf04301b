"""Engines over fake models, and texts for them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from core.engine import Engine
from core.settings import Settings, read_settings
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.loops import num_waiting


@contextmanager
def running(*models: FakeModel, **chosen: Any) -> Iterator[Engine]:
    """An engine over `models`, closed at the end with every gate open."""
    served = {model.spec.alias: model for model in models}
    with Engine(served, settings(models, **chosen)) as engine, ExitStack() as gates:
        for model in models:
            gates.callback(model.gate.set)
        yield engine


def settings(models: tuple[FakeModel, ...], **chosen: Any) -> Settings:
    return read_settings(models={model.spec.alias: "/nowhere" for model in models}, **chosen)


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


def texts_of(seed: int, count: int) -> list[str]:
    """Texts of 1 to 60 characters, nearly all different."""
    random_ = random.Random(seed)
    return ["".join(random_.choices("abcdefghij", k=random_.randint(1, 60))) for _ in range(count)]
