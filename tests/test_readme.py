"""What the README promises, done: its code runs as printed, its tables name what exists."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from embedq import tasks
from embedq.core.settings import ModelSettings, Settings
from tests.running import ROOT, require

README = (ROOT / "README.md").read_text(encoding="utf-8")

#: An environment with a producer's dependencies only; `make test` builds it.
PRODUCER = Path(sys.prefix) / "producer" / "bin" / "python"


def block(name: str) -> str:
    """The code block behind `<!-- test: name -->`."""
    found = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, name
    return found[1]


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
        "import importlib.util, sys, tasks\n"
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
    assert "tasks" not in block("blob")
    printed = run_as_producer(f"redis_url, job_id = {server!r}, {job.id!r}\n" + block("blob"), tmp_path, {})
    shape, told = printed.splitlines()
    assert (shape, ast.literal_eval(told)) == ("(2, 384)", asdict(timings))


@pytest.mark.usefixtures("worker")
def test_an_application_with_a_tasks_module_of_its_own_sends_by_name(server: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text("mine = True\n")
    script = (
        f"import sys; sys.path.insert(0, ''); redis_url = {server!r}\n"
        "import tasks; assert tasks.mine\n" + block("foreign") + "print(dense['shape'], len(dense['data']))\n"
        "assert 'core' not in sys.modules\n"
    )
    assert run_as_producer(script, tmp_path, {}) == f"[2, 384] {2 * 384 * 4}\n"


@pytest.fixture
def documented() -> Iterator[dict[str, str]]:
    """Variables in the README's tables, with the default each is said to have."""
    rows = re.findall(r"^\| (`EMBEDQ_.*?) \| (.*?) \|", README, re.MULTILINE)
    return {name: default for names, default in rows for name in re.findall(r"`(EMBEDQ_\w+)`", names)}


def test_every_setting_is_documented_with_its_default(documented: dict[str, str]) -> None:
    known = {f"EMBEDQ_{name.upper()}": default for name, default in tasks.config.WIRE.items()}
    known |= {
        f"EMBEDQ_{name.upper()}": field.default for name, field in Settings.model_fields.items() if name != "wire"
    }
    assert set(documented) - {"EMBEDQ_LOG_LEVEL"} == set(known)
    for name, default in known.items():
        if isinstance(default, int | float):
            assert float(documented[name]) == default, name


def test_every_model_setting_is_documented() -> None:
    row = next(line for line in README.splitlines() if line.startswith("| `EMBEDQ_MODELS`"))
    assert set(re.findall(r"`(\w+)`", row)) >= set(ModelSettings.model_fields)


def test_every_file_of_the_code_map_exists_and_none_is_missing() -> None:
    listing = README.split("## The code")[1].split("```")[1]
    named = {line.split()[0] for line in listing.strip().splitlines()}
    assert all((ROOT / name).exists() for name in named)
    files = {
        str(path.relative_to(ROOT)) for folder in ("core", "tasks", "workers") for path in (ROOT / folder).rglob("*.py")
    }
    assert files - named <= {"workers/__init__.py", "workers/logs.py", "workers/processes.py", "core/convert.py"}


def test_every_error_is_documented() -> None:
    from embedq.core import errors

    leaves = {cls.__name__ for cls in vars(errors).values() if isinstance(cls, type) and not cls.__subclasses__()}
    assert leaves <= set(re.findall(r"`(\w+)`", README.split("## Errors")[1].split("## Settings")[0]))
