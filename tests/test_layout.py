"""The rules that hold the parts apart, read off the source; and what importing `tasks` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layout import FILES, MAIN_PATH, OURS, ROOT, arrows, floors, folders, imported, module_name, ours, parsed

#: Words that say nothing about what a file is for.
EMPTY_NAMES = frozenset(
    {"utils", "util", "helpers", "helper", "common", "base", "misc", "manager", "handler", "service"}
)

MAX_FUNCTION_LINES = 60

#: Seconds that `from embedq import tasks` may take, the best of a few tries on a busy machine.
MAX_IMPORT_S = 0.5

HEAVY = ("torch", "transformers", "tokenizers", "pydantic", "huggingface_hub", "safetensors")


def files_of(package: str) -> list[Path]:
    """The files of a package, `embedq.workers.jobs`, or of a module."""
    return [path for path in FILES if f"{module_name(path)}.".startswith(f"{package}.")]


def breaches(package: str, allowed: tuple[str, ...], with_type_checking: bool = True) -> list[str]:
    """Imports of our own modules by `package` that are not `allowed`, nor inside it."""
    return [
        f"{module_name(path)} imports {name}"
        for path in files_of(package)
        for name in sorted(ours(imported(path, with_type_checking)))
        # The root itself says the version, and nothing else.
        if name != "embedq" and not any(name == one or name.startswith(f"{one}.") for one in (package, *allowed))
    ]


def test_the_files_under_test_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} == set(OURS)


def test_core_imports_core_alone() -> None:
    assert breaches("embedq.core", ()) == []


@pytest.mark.parametrize("foreign", ["celery", "kombu", "redis", "amqp", "flower"])
def test_core_knows_no_queue(foreign: str) -> None:
    files = files_of("embedq.core")
    assert [module_name(path) for path in files if foreign in {name.partition(".")[0] for name in imported(path)}] == []


def test_tasks_import_only_what_a_producer_has() -> None:
    allowed = (
        "core.errors",
        "core.codec",
        "core.command_line",
        "core.options",
        "core.results",
        "core.setting_names",
        "celeryconfig",
    )
    assert breaches("embedq.tasks", tuple(f"embedq.{name}" for name in allowed), with_type_checking=False) == []


def test_celeryconfig_imports_only_the_codec_the_errors_and_names() -> None:
    allowed = ("embedq.core.errors", "embedq.core.codec", "embedq.core.setting_names")
    assert breaches("embedq.celeryconfig", allowed) == []


def test_workers_import_tasks_and_core() -> None:
    assert breaches("embedq.workers", ("embedq.tasks", "embedq.core", "embedq.celeryconfig", "embedq.workers")) == []


#: Wings that must not know each other: whoever works on one never needs to open the other.
WALLS = [
    ("embedq.workers.launcher", "embedq.workers.jobs"),
    ("embedq.workers.launcher", "embedq.workers.broker"),
    ("embedq.workers.launcher", "embedq.workers.monitoring"),
    ("embedq.workers.broker", "embedq.workers.jobs"),
    ("embedq.workers.broker", "embedq.workers.monitoring"),
    ("embedq.core.models", "embedq.core.batching"),
    ("embedq.core.checkpoint", "embedq.core.models"),
]


@pytest.mark.parametrize(("wing", "other"), WALLS)
def test_wings_are_kept_apart(wing: str, other: str) -> None:
    crossings = [
        f"{module_name(path)} imports {name}"
        for path in files_of(wing)
        for name in sorted(imported(path))
        if name == other or name.startswith(f"{other}.")
    ]
    assert files_of(wing)
    assert files_of(other)
    assert crossings == []


@pytest.mark.parametrize("folder", folders())
def test_no_folder_has_a_circle_of_imports(folder: str) -> None:
    assert floors(arrows(folder)) >= 1


def test_the_path_of_a_job_names_files_that_exist() -> None:
    assert [path for path in MAIN_PATH if not (ROOT / path).is_file()] == []


def importers(package: str) -> set[str]:
    """First parts of the dotted names, below `embedq`, of whoever imports a package."""
    users = [path for path in FILES if any(f"{name}.".startswith(f"{package}.") for name in imported(path))]
    return {module_name(path).removeprefix("embedq.").partition(".")[0] for path in users}


def test_nobody_imports_workers_but_commands_deploy_and_what_is_for_tests() -> None:
    assert importers("embedq.workers") <= {"workers", "__main__", "deploy", "testing", "tests"}


def test_nobody_imports_the_tests() -> None:
    assert importers("tests") <= {"tests"}


def offenders(offends: Callable[[Path, ast.Module], bool], but_not: tuple[str, ...] = ()) -> list[str]:
    """Names of the files that offend a rule, outside the packages in `but_not`."""
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] not in but_not]
    return [module_name(path) for path in files if offends(path, parsed(path))]


def test_nothing_that_runs_in_production_can_unpickle() -> None:
    pickles = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

    def loads_freely(path: Path, tree: ast.Module) -> bool:
        if not pickles.isdisjoint(name.partition(".")[0] for name in imported(path)):
            return True
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        loads = [call for call in calls if ast.unparse(call.func) in ("torch.load", "np.load", "numpy.load")]
        return any("weights_only=True" not in ast.unparse(call) for call in loads)

    assert offenders(loads_freely, but_not=("tests",)) == []


def test_every_function_can_be_read_in_one_go() -> None:
    def is_long(node: ast.AST) -> bool:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return False
        return (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES

    assert offenders(lambda path, tree: any(map(is_long, ast.walk(tree)))) == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert offenders(lambda path, tree: not EMPTY_NAMES.isdisjoint(path.stem.removeprefix("test_").split("_"))) == []


def test_every_file_says_what_it_is_for() -> None:
    assert offenders(lambda path, tree: bool(tree.body) and not ast.get_docstring(tree)) == []


def fresh(code: str) -> str:
    """Returns what `code` prints in a new interpreter."""
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_importing_tasks_is_quick_and_loads_no_model_library() -> None:
    code = f"""
import sys, time
begun_s = time.process_time()  # what a neighbour on the machine takes does not count
from embedq import tasks
print(time.process_time() - begun_s, *sorted(set(sys.modules).intersection({HEAVY})))
"""
    tries = [fresh(code).split() for _ in range(3)]
    assert [loaded for _, *loaded in tries] == [[], [], []]
    assert min(float(took_s) for took_s, *_ in tries) < MAX_IMPORT_S


def test_tasks_stay_tasks_after_every_module_of_their_package_is_imported() -> None:
    code = """
import importlib, pkgutil
from embedq import tasks
from celery import Celery, Task
names = [one.name for one in pkgutil.iter_modules(tasks.__path__)]
for name in names:
    importlib.import_module(f"embedq.tasks.{name}")
assert isinstance(tasks.embed, Task) and isinstance(tasks.rerank, Task) and isinstance(tasks.app, Celery)
assert names and not {"embed", "rerank", "app"} & set(names)
print("still tasks")
"""
    assert fresh(code) == "still tasks"


def test_importing_core_loads_nothing_heavy() -> None:
    assert fresh(f"import sys, embedq.core; print(*set(sys.modules).intersection({HEAVY}))") == ""


def test_importing_what_is_for_tests_loads_no_test_framework_and_nothing_that_a_producer_has_not() -> None:
    wanted = (*HEAVY, "pytest", "unittest", "embedq.workers", "embedq.deploy")
    assert fresh(f"import sys, embedq.testing; print(*set(sys.modules).intersection({wanted}))") == ""
