"""The command that runs Celery's own tests: what it configures, and what it makes of their outcomes."""

from __future__ import annotations

from pathlib import Path

from tests import celery_own

#: Tests as Celery has them, with its conftest's ways to a server and to settings.
TESTS = """
import json, os
from pathlib import Path
import pytest
from celery.contrib.testing.app import TestApp

def test_its_backend_and_serializer_are_ours(request):
    settings = json.loads((request.config.rootpath / "integration-tests-config.json").read_text())
    app = TestApp(config={"result_backend": os.environ["TEST_BACKEND"], **settings})
    assert type(app.backend).__module__ == "embedq.tasks.result_backend"
    app.backend.store_result("job", {1, 2}, "SUCCESS")
    assert app.AsyncResult("job").get(timeout=5) == {1, 2}

@pytest.fixture
def unsteady():
    yield
    assert False

def test_fails_behind_its_call(unsteady): ...

@pytest.mark.timeout(300)
@pytest.mark.xfail
def test_is_expected_to_fail():
    assert False

@pytest.mark.skip
def test_is_skipped(): ...

def test_ends_the_process():
    os._exit(1)

def test_behind_it(): ...
"""


def test_tests_run_by_configuration_alone_and_their_outcomes_are_known_up_to_a_crash(tmp_path: Path) -> None:
    tests = tmp_path / "celery" / "t"
    tests.mkdir(parents=True)
    (tests.parent / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['timeout']\n")
    (tests / "test_few.py").write_text(TESTS)
    tree = celery_own._copy(tests.parent, tmp_path / "tree", celery_own._SETTINGS["embedq"])
    outcomes = celery_own._run("embedq", tree, ["t/test_few.py"])
    assert {test.partition("::")[2]: outcome for test, outcome in outcomes.items()} == {
        "test_its_backend_and_serializer_are_ours": "passed",
        "test_fails_behind_its_call": "failed",
        "test_is_expected_to_fail": "xfailed",
        "test_is_skipped": "skipped",
    }


def test_what_passes_with_json_and_not_with_ours_is_worse_also_what_never_ran() -> None:
    json = {"a": "passed", "b": "passed", "c": "passed", "d": "failed", "e": "skipped"}
    embedq = {"a": "passed", "b": "failed", "d": "failed", "e": "failed"}
    assert celery_own._worse(json, embedq) == ["b", "c"]
