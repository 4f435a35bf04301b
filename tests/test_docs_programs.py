"""Programs that have little or nothing of ours do what the documentation shows them."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from celery.result import AsyncResult

from embedq import tasks
from embedq.core.errors import InvalidInput
from tests.doc_blocks import code_of
from tests.running import ROOT, Running, require

#: An environment with a producer's dependencies only; `make test` builds it.
PRODUCER = Path(sys.prefix) / "producer" / "bin" / "python"


def run_as_producer(script: str, directory: Path, environment: dict[str, str]) -> str:
    """Run `script` in `directory` with a producer's dependencies only; returns what it printed."""
    require(PRODUCER.exists(), "the producer's environment is not there: run `make test`")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EMBEDQ_", "PYTHON"))}
    done = subprocess.run(
        [str(PRODUCER), "-c", script],
        cwd=directory,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("worker")
def test_a_process_with_only_the_producers_dependencies_gets_vectors(server: str, tmp_path: Path) -> None:
    script = (
        "import importlib.util, sys\n"
        "from embedq import tasks\n"
        "print(tasks.embed.delay(['a']).get(timeout=60))\n"
        "try: tasks.embed.delay(['a'], dimensions=999).get(timeout=60)\n"
        "except Exception as error: print(type(error).__module__, type(error).__name__)\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'pydantic') if importlib.util.find_spec(name)])\n"
    )
    printed = run_as_producer(script, tmp_path, {"EMBEDQ_REDIS_URL": server})
    assert printed.splitlines() == ["1 × 384 float32", "embedq.core.errors InvalidInput", "[]"]


@pytest.mark.usefixtures("worker")
def test_the_blob_is_read_without_our_code(server: str, tmp_path: Path) -> None:
    job = tasks.embed.delay(["one", "two"], timings=True)
    timings = job.get(timeout=60).timings
    code = code_of("docs/reference/blob.md", "blob")
    assert "embedq" not in code
    printed = run_as_producer(f"redis_url, job_id = {server!r}, {job.id!r}\n{code}", tmp_path, {})
    shape, told = printed.splitlines()
    assert (shape, ast.literal_eval(told)) == ("(2, 384)", asdict(timings))


@pytest.mark.usefixtures("worker")
def test_the_blob_of_a_failure_is_read_without_our_code(server: str, tmp_path: Path) -> None:
    job = tasks.embed.delay(["one"], dimensions=999)
    with pytest.raises(InvalidInput) as caught:
        job.get(timeout=60)
    code = code_of("docs/reference/blob.md", "failure blob")
    printed = run_as_producer(f"redis_url, job_id = {server!r}, {job.id!r}\n{code}", tmp_path, {})
    name, message = printed.splitlines()
    assert (name, ast.literal_eval(message)) == ("InvalidInput", [str(caught.value)])


_STORE = """
from celery import Celery

app = Celery("mine", broker=URL, backend=URL)
app.conf.update(task_default_queue="mine", broker_connection_retry_on_startup=True)

@app.task(name="mine.store")
def store(result):
    dense = result["dense"]
    return [result["embedq"], dense["dtype"], dense["shape"], len(dense["data"])]
"""


@pytest.fixture
def storing(server: str, tmp_path: Path) -> Iterator[Running]:
    """The worker of an application that has nothing of ours and knows JSON alone."""
    (tmp_path / "mine.py").write_text(_STORE.replace("URL", repr(server)))
    command = [sys.executable, "-m", "celery", "-A", "mine", "worker", "--pool", "solo", "--loglevel", "INFO"]
    with Running(command, {"PYTHONPATH": str(tmp_path)}, tmp_path) as running:
        running.wait_for(" ready.")
        yield running


@pytest.mark.usefixtures("worker")
def test_an_application_with_a_tasks_module_of_its_own_sends_by_name(
    server: str, storing: Running, tmp_path: Path
) -> None:
    """Also a chain back to a task of its own, whose worker knows JSON alone."""
    (tmp_path / "tasks.py").write_text("mine = True\n")
    page = "docs/how-to/other-languages.md"
    code, more = code_of(page, "foreign"), code_of(page, "foreign chain")
    script = (
        f"import sys; sys.path.insert(0, ''); redis_url = {server!r}\n"
        f"import tasks; assert tasks.mine\n{code}print(dense['shape'], len(first))\n"
        + more.replace("chain(embed", "stored = chain(embed")
        + "print(stored.get(timeout=60))\n"
        "wrong = app.signature('tasks.embed', args=['no list'], queue='embed', headers=in_json)\n"
        "try: chain(wrong, app.signature('mine.store', queue='mine')).delay().get(timeout=60)\n"
        "except TaskError as error: print(type(error).__module__, error)\n"
        "assert 'embedq' not in sys.modules\n"
    )
    error = "InvalidInput: texts must be a list of strings; given str; for one text write [text]"
    printed = run_as_producer(script, tmp_path, {}).splitlines()
    assert printed[:2] == [error, "[2, 384] 384"]
    assert printed[2:] == [str(["embeddings", "<f4", [2, 384], 2 * 384 * 4 * 4 // 3]), f"celery.exceptions {error}"]


@pytest.mark.usefixtures("worker")
def test_a_message_of_a_program_without_celery_is_answered(server: str, tmp_path: Path) -> None:
    code = code_of("docs/how-to/other-languages.md", "message").replace("redis://localhost:6379/0", server)
    assert "celery" not in code
    script = f"import sys\n{code}\nassert 'celery' not in sys.modules\nprint(job_id)\n"
    job_id = run_as_producer(script, tmp_path, {}).strip()
    vectors = AsyncResult(job_id, app=tasks.app).get(timeout=60)
    assert vectors.dense.shape == (2, 128)


WIRE = ROOT / "tests" / "examples" / "wire"

#: Program of the page "The wire" -> the command that runs it.
PROGRAMS = {"embed.js": ("node",), "embed.go": ("go", "run")}


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A program in another language, with nothing but what its language brings."""
    command, *rest = PROGRAMS[request.param]
    require(shutil.which(command) is not None, f"{command} is not there")
    monkeypatch.setenv("GOCACHE", str(tmp_path))
    monkeypatch.setenv("GO111MODULE", "off")
    assert len((WIRE / request.param).read_text(encoding="utf-8").splitlines()) <= 40
    return [command, *rest, str(WIRE / request.param)]


@pytest.mark.usefixtures("worker")
def test_a_program_in_another_language_sends_and_reads(server: str, program: list[str]) -> None:
    texts = ["a text", "Ein zweiter, größer: 灯塔"]
    parts = urlsplit(server)
    named = (
        [server] if program[0] == "node" else [f"{parts.hostname}:{parts.port}", "default", parts.password or "none"]
    )
    printed = (
        subprocess.check_output([*program, *named, *texts], text=True, timeout=110).replace("[", "").replace("]", "")
    )
    *shape, first = printed.split()
    dense = tasks.embed.delay(texts).get(timeout=60).dense
    assert [int(one) for one in shape] == [2, 384]
    assert float(first) == pytest.approx(float(dense[0, 0]), abs=1e-5)


@pytest.mark.usefixtures("worker")
def test_a_failure_is_read_in_another_language(server: str) -> None:
    require(shutil.which("node") is not None, "node is not there")
    code = (WIRE / "embed.js").read_text(encoding="utf-8").replace("[texts], {}", "[texts], { dimensions: 999 }")
    done = subprocess.run(
        ["node", "-", server, "a"], input=code, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("InvalidInput: dimensions may be up to 384")


def test_the_commands_of_the_quickstart_run(worker: dict[str, str], tmp_path: Path) -> None:
    """In a shell, with the command `embedq` as an installation has it."""
    import numpy as np

    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "embedq"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m embedq "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, **worker, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT / ".venv" / "name")
    code = code_of("docs/quickstart.md", "run").replace("embedq rerank", "embedq rerank --model minilm")
    done = subprocess.run(
        ["sh", "-e", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "vectors.npy").shape == (2, 384)
    assert "minilm" in done.stdout
    assert done.stdout.rstrip().splitlines()[-2].endswith("The cat sleeps.")
