"""Programs that have little or nothing of ours do what the documentation shows them."""

from __future__ import annotations

import ast
import base64
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.result import AsyncResult

from embedq import tasks
from embedq.core.errors import InvalidInput
from tests.doc_blocks import code_of
from tests.running import ROOT, require

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


@pytest.mark.usefixtures("worker")
def test_an_application_with_a_tasks_module_of_its_own_sends_by_name(server: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text("mine = True\n")
    script = (
        f"import sys; sys.path.insert(0, ''); redis_url = {server!r}\n"
        "import tasks; assert tasks.mine\n"
        + code_of("docs/how-to/other-languages.md", "foreign")
        + "print(dense['shape'], len(dense['data']))\n"
        "assert 'embedq' not in sys.modules\n"
    )
    assert run_as_producer(script, tmp_path, {}) == f"[2, 384] {2 * 384 * 4}\n"


@pytest.mark.usefixtures("worker")
def test_a_message_of_a_program_without_celery_is_answered(server: str, tmp_path: Path) -> None:
    code = code_of("docs/how-to/other-languages.md", "message").replace("redis://localhost:6379/0", server)
    assert "celery" not in code
    script = f"import sys\n{code}\nassert 'celery' not in sys.modules\nprint(job_id)\n"
    job_id = run_as_producer(script, tmp_path, {}).strip()
    vectors = AsyncResult(job_id, app=tasks.app).get(timeout=60)
    assert vectors.dense.shape == (2, 128)


@pytest.mark.usefixtures("worker")
def test_a_message_of_a_javascript_program_is_answered(server: str) -> None:
    node = shutil.which("node")
    require(node is not None, "node is not there")
    code = code_of("docs/how-to/other-languages.md", "javascript")
    done = subprocess.run([str(node), "-e", code], capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    with redis.Redis.from_url(server) as client:
        client.lpush("embed", made["message"])
    assert AsyncResult(made["id"], app=tasks.app).get(timeout=60).dense.shape == (2, 384)


def test_the_two_programs_send_the_same_message(tmp_path: Path) -> None:
    """But for ids, language and options."""
    node = shutil.which("node")
    require(node is not None, "node is not there")
    page = "docs/how-to/other-languages.md"
    done = subprocess.run([str(node), "-e", code_of(page, "javascript")], capture_output=True, text=True, check=True)
    by_javascript = json.loads(json.loads(done.stdout)["message"])
    code = code_of(page, "message").replace("client.lpush", "print(json.dumps(message)) or (lambda *_: None)")
    by_python = json.loads(run_as_producer(code, tmp_path, {}))
    assert by_javascript["properties"].keys() == by_python["properties"].keys()
    assert by_javascript["headers"].keys() == by_python["headers"].keys()
    assert decoded(by_javascript)[0] == decoded(by_python)[0]


def decoded(message: dict[str, Any]) -> Any:
    return json.loads(base64.b64decode(message["body"]))


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
