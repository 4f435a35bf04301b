"""What an application tests with: the fake's vectors, jobs in this process, a real worker, and the fixtures of all three."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery import Celery, chain, group
from hypothesis import given
from hypothesis import strategies as st

from embedq import tasks, testing
from embedq.core.errors import CannotLoadModel, InvalidInput, InvalidSettings, OperatorError, UnknownModel
from embedq.testing import FakeEngine
from tests.conftest import GOLDEN
from tests.doc_blocks import code_of
from tests.running import ROOT

TINY = str(GOLDEN / "flagreranker_bert" / "model")

#: Any text that can be sent.
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)

#: Nobody listens there.
NOWHERE = "redis://127.0.0.1:1/0"


@given(st.lists(TEXTS, unique=True, max_size=8), st.integers(2, 1030))
def test_vectors_have_the_width_and_length_1_and_differ_where_the_texts_do(texts: list[str], width: int) -> None:
    dense = FakeEngine(width).embed(texts).dense
    assert dense is not None
    assert dense.shape == (len(texts), width)
    assert dense.dtype == np.float32
    assert np.linalg.norm(dense, axis=1) == pytest.approx(1, abs=1e-5)
    assert len({row.tobytes() for row in dense}) == len(texts)


@given(st.lists(TEXTS, max_size=6), TEXTS)
def test_a_vector_follows_from_its_text_alone(others: list[str], text: str) -> None:
    one, other = FakeEngine(16).embed([text]).dense, FakeEngine(16).embed([*others, text]).dense
    assert one is not None
    assert other is not None
    assert np.array_equal(one[0], other[-1])


def test_vectors_are_those_of_every_process_and_version() -> None:
    dense = FakeEngine(4).embed(["The cat sleeps.", ""]).dense
    assert dense == pytest.approx(np.array(VECTORS, np.float32), abs=1e-6)


#: Stored by users in their own tests: a change of these needs a word in the changelog.
VECTORS = [[-0.057758, 0.386100, 0.129515, 0.911491], [0.004750, -0.666075, 0.073325, 0.742257]]


def test_texts_that_share_words_are_nearer_and_a_query_finds_them() -> None:
    passages = ["Stock prices fell.", "the CAT, sleeping", "a cat sleeps on the mat"]
    fake = FakeEngine()
    ranking = fake.rerank("where does the cat sleep?", passages)
    assert ranking.order.tolist()[-1] == 0
    assert fake.rerank("a cat sleeps on the mat", passages, top_k=1).order.tolist() == [2]
    assert ranking.scores.max() < 1


@pytest.mark.parametrize("mode", [None, "dense", "sparse", "colbert", "weighted"])
def test_an_equal_text_is_the_best_in_every_mode(mode: str | None) -> None:
    ranking = FakeEngine().rerank("two words", ["other ones", "two words", "two"], mode=mode, timings=True)
    assert ranking.order.tolist()[0] == 1
    assert ranking.timings is not None
    assert 0 < FakeEngine().rerank("a", ["a"], normalize=True).scores[0] < 1


def test_options_have_the_effect_they_have_in_a_worker() -> None:
    fake = FakeEngine(64)
    full = fake.embed(["a text"], outputs=["dense", "sparse", "colbert"], timings=True)
    assert full.sparse is not None
    assert full.colbert is not None
    assert (len(full.sparse[0].ids), full.colbert[0].shape, full.timings is not None) == (2, (3, 64), True)
    assert fake.embed(["a text"], dimensions=8).shape == (1, 8)
    assert np.linalg.norm(fake.embed(["a text"], dimensions=8)) == pytest.approx(1)
    assert fake.embed(["a text"], dtype="ubinary").shape == (1, 8)
    assert fake.embed(["a text", "b"], dtype="int8").int8_ranges is not None
    assert fake.embed([]).shape == (0, 64)
    assert fake.embed(["a text"], model="mine").model == "mine"


@pytest.mark.parametrize("options", [{"dimensions": 65}, {"dtype": "int4"}, {"nonsense": 1}])
def test_wrong_options_are_refused_as_in_a_worker(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        FakeEngine(64).embed(["a text"], **options)


def test_results_are_read_only_as_those_of_a_worker() -> None:
    dense = FakeEngine().embed(["a text"]).dense
    assert dense is not None
    with pytest.raises(ValueError, match="read-only"):
        dense[0, 0] = 1


def test_each_model_has_its_width_and_others_are_unknown() -> None:
    fake = FakeEngine({"minilm": 384, "bge-m3": 1024})
    assert [fake.embed(["a"], model=one).shape[1] for one in (None, "minilm", "bge-m3")] == [384, 384, 1024]
    with pytest.raises(UnknownModel, match="unknown model 'other'; this fake has minilm, bge-m3"):
        fake.embed(["a"], model="other")


@pytest.mark.parametrize("width", [0, 1, 3.0, True, "384"])
def test_a_width_that_none_can_have_is_refused(width: Any) -> None:
    with pytest.raises(InvalidSettings, match="whole number from 2"):
        FakeEngine(width)


def test_jobs_answer_at_once_however_they_are_sent(embedq_fake: FakeEngine) -> None:
    assert tasks.embed.delay(["one", "two"]).get(timeout=1).shape == (2, 384)
    assert tasks.rerank.delay("q", ["a", "q"]).get().order.tolist() == [1, 0]
    assert [len(job.get()) for job in tasks.embed_many([["a"], ["b", "c"]])] == [1, 2]
    assert len(asyncio.run(tasks.aget(tasks.embed.delay(["a"])))) == 1
    assert len(chain(tasks.embed.si(["a"]), tasks.embed.si(["b", "c"]))().get()) == 2
    assert [len(one) for one in group(tasks.embed.s([word]) for word in "ab")().get()] == [1, 1]
    assert [len(one) for one in tasks.embed.map([["a"], ["b", "c"]]).delay().get()] == [1, 2]
    with pytest.raises(InvalidInput, match="texts must be a list of strings"):
        tasks.embed.delay("no list")
    with pytest.raises(InvalidInput, match="dimensions may be up to 384"):
        tasks.embed.delay(["a"], dimensions=1000).get()


def test_afterwards_jobs_are_sent_again() -> None:
    with testing.fake(8) as engine:
        assert tasks.EngineTask.engine is engine
    assert (tasks.EngineTask.engine, tasks.app.conf.task_always_eager) == (None, False)


def test_models_are_loaded_and_jobs_computed_in_this_process() -> None:
    with testing.in_process({"tiny": TINY}):
        assert tasks.rerank.delay("a question", ["a", "b"]).get().model == "tiny"
    assert tasks.EngineTask.engine is None


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(CannotLoadModel, match="there is no model directory"),
        testing.in_process({"x": f"{tmp_path}/x"}),
    ):
        pass


@pytest.fixture
def connected() -> Iterator[Celery]:
    """An application whose tasks are computed where they are sent, as its tests have it."""
    app = Celery("mine", broker=tasks.app.conf.broker_url, set_as_current=False)
    app.conf.update(task_default_queue="mine", task_always_eager=True)
    tasks.connect(app)
    yield app
    tasks.app.connected.pop(app)
    app.close()


def test_jobs_are_computed_where_those_of_a_connected_application_are(
    connected: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.EngineTask, "engine", FakeEngine(8))
    assert len(tasks.embed.delay(["a"]).get()) == 1
    assert [len(one) for one in group(tasks.embed.s([word]) for word in "ab")().get()] == [1, 1]
    assert len(tasks.embed_many([["a"]])[0].get()) == 1
    connected.conf.task_always_eager = False
    tasks.app.follow_eager()
    assert not tasks.app.conf.task_always_eager


def test_a_setting_of_ones_own_is_left_alone(connected: Celery) -> None:
    tasks.app.conf.task_always_eager = True
    for theirs in (True, False):
        connected.conf.task_always_eager = theirs
        tasks.app.follow_eager()
        assert tasks.app.conf.task_always_eager


@pytest.mark.parametrize("models", ["", "x=/nowhere"])
def test_where_no_model_can_be_loaded_the_error_names_the_fake(models: str) -> None:
    script = (
        "from embedq import tasks\ntasks.app.conf.task_always_eager = True\n"
        "try: tasks.embed.delay(['a']).get()\nexcept Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "EMBEDQ_MODELS": models, "EMBEDQ_REDIS_URL": NOWHERE}
    printed = subprocess.check_output([sys.executable, "-c", script], env=environment, cwd=ROOT, text=True)
    assert printed.startswith("CannotLoadModel" if models else "InvalidSettings")
    assert printed.endswith("Unit tests need no model with embedq.testing.fake()\n")


PAGE = "docs/how-to/testing.md"

#: Beside what the page shows.
_MORE = """
import os, subprocess, sys

def test_a_worker(embedq_worker):
    assert "action=worker_ready" in embedq_worker.log.read_text()
    code = "from embedq import tasks; print(tasks.rerank.delay('q', ['a']).get(timeout=60).model)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "reranker\\n"
    assert os.environ["EMBEDQ_REDIS_URL"] == embedq_worker.url

def test_a_fake_beside_it(embedq_worker, embedq_fake):
    assert tasks.embed.delay(["a"], model="any").get().shape == (1, 384)

def test_the_worker_again(embedq_worker):
    assert tasks.rerank.delay("a question", ["a", "b"]).get(timeout=60).model == "reranker"
"""


def test_the_fixtures_run_in_a_project_of_ones_own(tmp_path: Path) -> None:
    """Whose environment and settings file name another server, which must not be reached."""
    (tmp_path / "conftest.py").write_text(code_of(PAGE, "testing: conftest"))
    (tmp_path / "test_fake.py").write_text(code_of(PAGE, "testing: fake"))
    (tmp_path / "test_dimensions.py").write_text(code_of(PAGE, "testing: dimensions"))
    models = code_of(PAGE, "testing: models").replace("/models/bge-reranker-v2-m3", TINY)
    (tmp_path / "test_models.py").write_text(models + _MORE)
    (tmp_path / "embedq.toml").write_text('default_embed = "none"\n')
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "error",
        "--rootdir",
        str(tmp_path),
    ]
    environment = {**os.environ, "EMBEDQ_REDIS_URL": NOWHERE}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "7 passed" in done.stdout, done.stdout + done.stderr


def test_a_worker_that_cannot_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    environment = dict(os.environ)
    said = r"ended; its log ends with:\n(.|\n)*there is no model directory"
    with pytest.raises(OperatorError, match=said), testing.worker({"x": f"{tmp_path}/x"}, url=NOWHERE):
        pass
    assert dict(os.environ) == environment
