"""Runs Celery's own integration tests with JSON, and with our serializer and result backend; says what fails with ours only.

    python -m tests.celery_own CELERY [FILE …] [-k EXPRESSION]

CELERY is a directory with Celery's sources of the version that is installed: what `pip download --no-deps --no-binary :all:
celery==…` brings, unpacked. Its tests are copied, and not a line of them is changed: configuration alone chooses
serializers and result backend. Each file runs on an empty server of its own. What fails with ours only runs again with both,
because some of these tests fail now and then. Exit code 1 if one of them fails again, and never does with JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedq import celeryconfig
from tests.bench.report import show_rows
from tests.celery_own_plugin import NOTES
from tests.own_server import OwnServer
from tests.running import ROOT

#: Celery's files of tests that depend on serializer or result backend, and run on Redis.
FILES = ("test_canvas", "test_group_chains", "test_tasks", "test_inspect", "test_redis_backend", "test_serialization")

#: How often a test that failed with ours only runs again.
_NUM_REPEATS = 5

_LATE = "asks that who sends a job is subscribed to its result at once; with ours, who waits for it is"
_JSON = "reads as JSON, by a setting of its own, what its worker stores by the settings of the run"

#: What must fail with ours, and why. `tests/test_waiting.py` says what holds instead of the first kind.
_EXPECTED = {
    "test_redis_backend.py::test_pubsub_reentrant_cancel_from_finalizer": _LATE,
    "test_tasks.py::test_task_redis_result_backend::test_asyncresult_forget_cancels_subscription": _LATE,
    "test_tasks.py::test_task_redis_result_backend::test_asyncresult_get_cancels_subscription": _LATE,
    "test_redis_backend.py::test_concurrent_result_gets_on_shared_pubsub": _JSON,
}

#: Seconds after which a test that hangs fails: what most of these tests allow themselves.
_TEST_LIMIT_S = 300

_WORDS = ("passed", "failed", "xfailed", "skipped")

#: Settings and variables of each of the two.
_SETTINGS: dict[str, dict[str, Any]] = {
    "json": {},
    "embedq": {name: getattr(celeryconfig, name) for name in ("task_serializer", "result_serializer", "accept_content")}
    | {"result_accept_content": celeryconfig.accept_content},  # some tests have results of both kinds
}
_VARIABLES: dict[str, dict[str, str]] = {"json": {}, "embedq": {"CELERY_LOADER": "tests.celery_own_plugin:Loader"}}


def main(arguments: list[str]) -> int:
    """Run what is asked for, print a table; returns the exit code."""
    given = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        trees = {name: _copy(given.celery, Path(directory) / name, settings) for name, settings in _SETTINGS.items()}
        rows, worse = [], []
        for file in given.files or FILES:
            outcomes = {name: _run(name, tree, [f"t/integration/{file}.py"], given.k) for name, tree in trees.items()}
            rows.append([file, *(str(_count(outcomes[name], word)) for name in trees for word in _WORDS)])
            worse += _worse(**outcomes)
        show_rows("Celery's own tests", ["file", *(f"{name}: {word}" for name in trees for word in _WORDS)], rows)
        faults = [test for test in worse if _is_fault(test, trees)]
    return 1 if faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.celery_own", description=__doc__.partition("\n")[0])
    parser.add_argument("celery", type=Path, metavar="CELERY", help="directory with Celery's sources")
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"files of tests; without: {', '.join(FILES)}")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="only these tests, as pytest names them")
    return parser


def _copy(celery: Path, directory: Path, settings: dict[str, Any]) -> Path:
    """Celery's tests without Celery, so that the installed one is tested, and the settings that they read."""
    shutil.copytree(celery / "t", directory / "t")
    shutil.copy(celery / "pyproject.toml", directory)
    (directory / "integration-tests-config.json").write_text(json.dumps(settings))
    return directory


def _run(name: str, tree: Path, tests: Sequence[str], expression: str = "") -> dict[str, str]:
    """The outcome of each test with one of the two serializers."""
    with tempfile.TemporaryDirectory() as directory, OwnServer(Path(directory)) as server:
        notes = Path(directory) / "notes"
        notes.touch()
        plugins = ("celery.contrib.pytest", "tests.celery_own_plugin", "no:cacheprovider")
        options = [part for plugin in plugins for part in ("-p", plugin)]
        options += ["--timeout", str(_TEST_LIMIT_S), "--quiet", "--tb", "short", "--disable-warnings"]
        command = [sys.executable, "-m", "pytest", *options, "-k", expression, *tests]
        environment = _environment(server) | _VARIABLES[name] | {NOTES: str(notes)}
        subprocess.run(command, cwd=tree, env=environment, check=False, stdout=sys.stderr)
        return _outcomes(notes)


def _environment(server: OwnServer) -> dict[str, str]:
    """Without what configures Celery or us, and with the server as these tests want it named."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "EMBEDQ_", "TEST_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"  # some start `celery`
    paths = {"PATH": path, "PYTHONPATH": str(ROOT)}
    urls = {"TEST_BROKER": server.url, "TEST_BACKEND": server.url, "REDIS_PORT": str(server.port)}
    return kept | paths | urls | {"WORKER_LOGLEVEL": "INFO"}  # some read the worker's log


def _outcomes(notes: Path) -> dict[str, str]:
    """The outcome of each test that came to an end; "failed" if any part of it failed."""
    outcomes: dict[str, str] = {}
    for line in notes.read_text(encoding="utf-8").splitlines():
        note = json.loads(line)
        if outcomes.get(note["test"]) != "failed":
            outcomes[note["test"]] = note["outcome"]
    return outcomes


def _count(outcomes: dict[str, str], word: str) -> int:
    return Counter(outcomes.values())[word]


def _worse(json: dict[str, str], embedq: dict[str, str]) -> list[str]:
    """What passes with JSON and not with ours, be it that the process ended before."""
    return [test for test, outcome in json.items() if outcome == "passed" and embedq.get(test) != "passed"]


def _is_fault(test: str, trees: dict[str, Path]) -> bool:
    """Run again what failed with ours only; True if it fails again, and never does with JSON."""
    if reason := _EXPECTED.get(test.rpartition("/")[2]):
        print(f"{test} {reason}")
        return False
    failures = {
        name: sum("failed" in _run(name, tree, [test]).values() for _ in range(_NUM_REPEATS))
        for name, tree in trees.items()
    }
    print(f"{test} failed with ours only; again, of {_NUM_REPEATS} runs each failed: {failures}")
    return bool(failures["embedq"] and not failures["json"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
