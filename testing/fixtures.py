"""Fixtures of pytest; `pytest_plugins = ["embedq.testing"]` in a project's root `conftest.py` loads them.

embedq_fake          jobs answer at once, with vectors of `embedq_dimensions` that follow from the texts
embedq_in_process    jobs are computed in this process by `embedq_models`, loaded once in the run
embedq_worker        jobs are sent to a real worker that serves `embedq_models`, started once in the run
embedq_models        directories by alias; yours may replace it
embedq_dimensions    384, or a width by alias; yours may replace it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pytest

from embedq.testing.computing_here import computing_with, fake, loaded
from embedq.testing.fake_engine import FakeEngine
from embedq.testing.real_worker import Worker, worker

if TYPE_CHECKING:
    from embedq.core.engine import Engine


@pytest.fixture(scope="session")
def embedq_models() -> Mapping[str, str] | None:
    """Directories of the models by alias; None for `minilm`, all-MiniLM-L6-v2."""
    return None


@pytest.fixture
def embedq_dimensions() -> int | Mapping[str, int]:
    """Width of the fake's vectors, or a width by alias."""
    return 384


@pytest.fixture
def embedq_fake(embedq_dimensions: int | Mapping[str, int]) -> Iterator[FakeEngine]:
    """Jobs answer at once; see `embedq.testing.fake`."""
    with fake(embedq_dimensions) as engine:
        yield engine


@pytest.fixture(scope="session")
def embedq_engine(embedq_models: Mapping[str, str] | None) -> Iterator[Engine]:
    """An engine with `embedq_models`, loaded once. Jobs use it where `embedq_in_process` is asked for."""
    with loaded(embedq_models) as engine:
        yield engine


@pytest.fixture
def embedq_in_process(embedq_engine: Engine) -> Iterator[Engine]:
    """Jobs are computed in this process; see `embedq.testing.in_process`."""
    with computing_with(embedq_engine):
        yield embedq_engine


@pytest.fixture(scope="session")
def embedq_worker(embedq_models: Mapping[str, str] | None) -> Iterator[Worker]:
    """A real worker for the rest of the run; see `embedq.testing.worker`."""
    with worker(embedq_models) as running:
        yield running
