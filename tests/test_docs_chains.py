"""The modules that the documentation shows, started as it says: an application of one's own beside embedq's worker."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.doc_blocks import code_of
from tests.running import ROOT, Running
from tests.said import run

PAGE, WAITING = "docs/how-to/chains.md", "docs/how-to/waiting-in-a-task.md"

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def mine(worker: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's module, with its worker running."""
    path = tmp_path_factory.mktemp("chains") / "mine.py"
    parts = (code_of(PAGE, "chains"), code_of(WAITING, "waiting: index"), code_of(WAITING, "waiting: compare"))
    path.write_text("\n\n".join(parts))
    environment = worker | {"PYTHONPATH": f"{path.parent}:{ROOT}"}
    command = [sys.executable, "-m", "celery", "-A", "mine", "worker", "--concurrency", "1", "--loglevel", "INFO"]
    with Running(command, environment) as running:
        running.wait_for(" ready.")
        spec = importlib.util.spec_from_file_location("mine", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["mine"] = module
        spec.loader.exec_module(module)
        yield module
        del sys.modules["mine"]
        module.app.close()


def test_chains_groups_chords_and_callbacks_give_what_the_page_says(mine: ModuleType) -> None:
    run(code_of(PAGE, "chains: use"), PAGE, vars(mine))


def test_a_task_replaces_itself_with_a_chain(mine: ModuleType) -> None:
    assert mine.index.delay("The cat sleeps. Stock prices fell. It rains").get(timeout=TIMEOUT_S) == 3


def test_a_task_waits_for_a_job_and_for_a_group(mine: ModuleType) -> None:
    assert mine.compare.delay("The cat sleeps.", "The cat sleeps.").get(timeout=TIMEOUT_S) == pytest.approx(1, abs=1e-5)
    same, other = mine.compare_many.delay([["a", "a"], ["The cat sleeps.", "Stock prices fell."]]).get(
        timeout=TIMEOUT_S
    )
    assert same == pytest.approx(1, abs=1e-5)
    assert other < 0.9
